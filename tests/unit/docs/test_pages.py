"""Links lead somewhere, commands exist, and every block of code is run or says why not."""

import re
import shlex
from collections import Counter
from urllib.parse import unquote

import pytest

from infra.docs import reference
from tests.documents import PAGES, ROOT, anchors, blocks, commands, links
from ursa.cli import app
from ursa.config import PRESETS, load_config

BLOCKS = [block for page in PAGES for block in blocks(page)]
CODE = [block for block in BLOCKS if block.language in {"bash", "python"}]
URSA = [
    pytest.param(line, id=f"{block.name} {line[:40]}")
    for block in CODE
    if block.language == "bash"
    for line in commands(block)
    if re.match(r"(\.venv/bin/)?ursa ", line)
]


@pytest.fixture(scope="module")
def generated():
    return {ROOT / "docs" / uri: text for uri, text in reference.pages().items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page, generated):
    text = page.read_text("utf-8")
    for link in links(text):
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if target in generated:
            found = generated[target]
        else:
            assert target.exists(), f"{page.name} links to {link}"
            found = target.read_text("utf-8") if target.suffix == ".md" else ""
        assert not anchor or anchor in anchors(found), f"{page.name} links to {link}"


def test_links_are_found_where_they_lead_nowhere():
    assert list(links("a [b](c.md#d), ![e](f.png) and <https://g>, `[h](i)`")) == [
        "c.md#d",
        "f.png",
    ]
    assert anchors("# A `b` c!\n\n## Resume\n\n## Resume\n") == {"a-b-c", "resume", "resume-1"}


def test_commands_hide_in_no_other_block():
    for block in BLOCKS:
        assert block.language in {"bash", "python", "json", ""}, block.name
        if not block.language:
            hidden = re.search(r"^\s*(\$ |ursa |make |prefect |pip |export |docker )", block.code)
            assert hidden is None, f"{block.name} is to be a bash block"


def test_blocks_are_run_somewhere():
    """All but six; a new one that is not is to be counted here."""
    left_out = Counter(block.page for block in CODE if block.mark.startswith("not run"))
    assert left_out == {
        "docs/how-to/secure-a-deployment.md": 1,  # Docker
        "docs/evaluation.md": 1,  # the benchmarks' own programs
        "infra/README.md": 3,  # Docker, and a Kubernetes cluster twice
        "CONTRIBUTING.md": 1,  # all targets of make, that of these tests among them
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_targets_of_make_exist(page):
    """In blocks that are not run too."""
    rules = (ROOT / "Makefile").read_text()
    for line in (line for block in blocks(page) for line in commands(block)):
        if found := re.match(r"(?:[A-Z_]+=\S+ )*make ([a-z][\w-]*)", line):
            assert re.search(rf"^{found[1]}:", rules, re.MULTILINE), f"{page.name}: {line}"


@pytest.mark.parametrize("line", URSA)
def test_the_command_line_takes_it(line):
    """Of blocks that are not run too: every option is there and has a value that it takes."""
    words = shlex.split(line, comments=True)[1:]
    app.parse_args(words, exit_on_error=False, print_error=False)


def test_a_wrong_option_is_found():
    with pytest.raises(Exception, match="--sources"):
        app.parse_args(["data", "stats", "--sources"], exit_on_error=False, print_error=False)


def test_the_reference_has_everything(generated):
    text = {path.stem: page for path, page in generated.items()}
    assert "## ursa data what-if" in text["cli"]
    values = " | ".join(f"`{load_config(name).selection.min_motion_px_per_s}`" for name in PRESETS)
    assert f"| `min_motion_px_per_s` | number or null | {values} |" in text["configuration"]
    assert "### ursa/scheduled-retraining" in text["flows"]
    assert "| `URSA_DATA_URI` | `.ursa/data` |" in text["environment"]
    assert "| `visual_ids` | `list<element: uint16 not null>` | no |" in text["schemas"]
    assert "## ClipScores" in text["records"]
