"""What runs on one machine listens on the loopback address, and images are by digest (S9)."""

import re
from pathlib import Path

from ursa import demo

ROOT = Path(__file__).resolve().parents[3]


def test_nothing_that_is_started_here_listens_on_all_addresses() -> None:
    paths = [
        *(ROOT / "infra" / "local").glob("*"),
        ROOT / "prefect.yaml",
        ROOT / "pyproject.toml",
        *(path for name in ("ursa", "tasks", "flows") for path in (ROOT / name).rglob("*.py")),
    ]
    assert len(paths) > 200
    open_hosts = re.compile(r"""["'=\s:](0\.0\.0\.0|\[?::\]?)(:\d+)?["'\s,)]""")
    found = [
        f"{path.name}: {line.strip()}"
        for path in paths
        if path.is_file()
        for line in path.read_text(errors="replace").splitlines()
        if open_hosts.search(line)
    ]
    assert found == []
    services = (ROOT / "infra" / "local" / "services.py").read_text()
    assert re.findall(r'"--host", "([^"]+)"', services) == ["127.0.0.1"]
    assert demo._HOST == "127.0.0.1"


def test_images_that_are_built_on_are_named_by_their_digest() -> None:
    lines = (ROOT / "infra" / "Dockerfile").read_text().splitlines()
    stages: set[str] = set()
    bases = []
    for words in (line.split() for line in lines if line.startswith("FROM ")):
        bases += [words[1]] if words[1] not in stages else []
        stages |= {words[3]} if len(words) > 3 else set()
    assert bases
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", "\n".join(lines), re.MULTILINE))
    for base in bases:
        image = re.sub(r"\$\{?(\w+)\}?", lambda found: arguments[found[1]], base)
        assert re.search(r"@sha256:[0-9a-f]{64}$", image), image
