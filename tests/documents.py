"""The pages of the documentation: their code blocks, headings and links.

A block of `bash` or `python` is run by `tests/integration/docs/test_blocks.py`, in a checkout with
a small data root. A comment before it says otherwise: `<!-- run: pipeline -->`, in a checkout with
services and a trained model (`tests/e2e/test_documentation.py`), `<!-- run: stand-ins -->` there
too, with what `tests/e2e/stand_ins.py` puts in the place of names, or `<!-- not run: why -->`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "infra/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
MARK = re.compile(r"<!-- (run: pipeline|run: stand-ins|not run: \S.*) -->")


class Block(NamedTuple):
    """A fenced block of code."""

    page: str
    line: int
    language: str
    mark: str
    """What the comment before it says; empty without one."""
    code: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def tokens(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def blocks(page: Path) -> Iterator[Block]:
    """Yield the code blocks of a page, in their order."""
    before = ""
    for token in tokens(page.read_text("utf-8")):
        if token.type == "fence":
            assert token.map is not None
            mark = MARK.fullmatch(before.strip())
            assert mark or "run:" not in before, f"{page.name}: {before.strip()}"
            name = page.relative_to(ROOT).as_posix()
            yield Block(name, token.map[0] + 1, token.info, mark[1] if mark else "", token.content)
        before = token.content if token.type == "html_block" else ""


def commands(block: Block) -> list[str]:
    """Return the commands of a bash block, with lines that go on joined."""
    lines = re.sub(r"\\\n\s*", "", block.code).splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def anchors(text: str) -> set[str]:
    """Return the names of the headings of a page, as GitHub makes them."""
    found: dict[str, int] = {}
    result = set()
    parsed = tokens(text)
    for index, token in enumerate(parsed):
        if token.type == "heading_open":
            title = "".join(
                part.content
                for part in parsed[index + 1].children or ()
                if part.type in {"text", "code_inline"}
            )
            slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
            seen = found.get(slug, 0)
            found[slug] = seen + 1
            result.add(f"{slug}-{seen}" if seen else slug)
    return result


def links(text: str) -> Iterator[str]:
    """Yield the targets of links and pictures that are no addresses."""
    for token in tokens(text):
        for part in token.children or ():
            target = part.attrGet("href") or part.attrGet("src")
            if target is not None and not re.match(r"[a-z]+:", str(target)):
                yield str(target)
