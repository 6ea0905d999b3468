"""What MkDocs does beside its own work: make the reference, bring in what pages link to.

MkDocs calls the functions by their names (mkdocs.yml, `hooks`).
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import reference  # noqa: E402  (of this folder, which is on the path now)

LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]+)")
OUTSIDE = "repository"
"""Folder of the site for files that pages link to and that lie outside docs/."""


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and every file of the repository that a page links to."""
    for uri, text in reference.pages().items():
        files.append(File.generated(config, uri, content=text))
    todo = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    seen: set[Path] = set()
    while todo:
        page = todo.pop()
        for target in _targets_outside(page) - seen:
            seen.add(target)
            uri = f"{OUTSIDE}/{target.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, uri, abs_src_path=str(target)))
            if target.suffix == ".md":
                todo.append(target)
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Point links that leave docs/ at the copies of their files."""
    here = _place(page.file.src_uri)

    def to_copy(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(here.parent / match[1]))
        if not target.is_file():
            return match[0]
        site = _site_uri(target)
        start = PurePosixPath(page.file.src_uri).parent
        return f"]({os.path.relpath(site, start)}"

    return LINK.sub(to_copy, markdown)


def _place(uri: str) -> Path:
    """Return where the file of a page lies in the repository."""
    inside = uri.removeprefix(f"{OUTSIDE}/")
    return ROOT / (inside if inside != uri else f"docs/{uri}")


def _site_uri(path: Path) -> str:
    if path.is_relative_to(ROOT / "docs"):
        return path.relative_to(ROOT / "docs").as_posix()
    return f"{OUTSIDE}/{path.relative_to(ROOT).as_posix()}"


def _targets_outside(page: Path) -> set[Path]:
    return {path for path in _targets(page) if not path.is_relative_to(ROOT / "docs")}


def _targets(page: Path) -> Iterator[Path]:
    if not page.is_file():  # a generated one
        return
    for link in LINK.findall(page.read_text("utf-8")):
        target = Path(os.path.normpath(page.parent / link))
        if target.is_file() and target.is_relative_to(ROOT):
            yield target
