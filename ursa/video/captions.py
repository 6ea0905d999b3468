"""What is said about a clip: from a caption file, a text beside the video, or its name."""

import json
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

MAX_CAPTION_CHARACTERS = 2000

CaptionSource = Literal["sidecar", "manifest", "template"]


class Caption(NamedTuple):
    """A caption and where it comes from."""

    text: str
    source: CaptionSource


class CaptionRow(NamedTuple):
    """One row of a caption file: what is to be seen in a span of a video."""

    path: str
    start_s: float
    end_s: float
    text: str


def parse_caption_rows(data: bytes) -> tuple[list[CaptionRow], list[int]]:
    """Read `captions.jsonl`: one JSON object a line.

    Keys are `path` (relative to the file), `caption` and, optional, `start_s` and `end_s`;
    others are passed over.

    Args:
        data: UTF-8 text; what is not is replaced.

    Returns:
        The rows, and the numbers (from 1) of the lines that cannot be used.
    """
    rows: list[CaptionRow] = []
    bad_lines: list[int] = []
    for number, line in enumerate(data.decode("utf-8", "replace").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_parse_row(line))
        except (ValueError, TypeError, KeyError, RecursionError):
            bad_lines.append(number)
    return rows, bad_lines


def clean_caption(text: str) -> str:
    """Return text in one line, without control characters and of bounded length.

    Args:
        text: Any text; it is cut to `MAX_CAPTION_CHARACTERS`.
    """
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())[:MAX_CAPTION_CHARACTERS].strip()


def caption_of(
    name: str, start_s: float, end_s: float, *, rows: Sequence[CaptionRow], sidecar: str | None
) -> Caption:
    """Return the caption of a span of a video.

    Args:
        name: File name of the video.
        start_s: Start of the span.
        end_s: End of the span.
        rows: Caption rows of this video; the one that overlaps the span most is used.
        sidecar: Text beside the video, or None.
    """
    best_overlap_s = 0.0
    best: CaptionRow | None = None
    for row in rows:
        overlap_s = min(end_s, row.end_s) - max(start_s, row.start_s)
        if overlap_s > best_overlap_s:
            best_overlap_s, best = overlap_s, row
    if best is not None:
        return Caption(best.text, "manifest")
    if sidecar:
        return Caption(sidecar, "sidecar")
    return Caption(template_caption(name), "template")


def template_caption(name: str) -> str:
    """Make a caption of the words in a file name.

    Args:
        name: File name of the video.

    Returns:
        Such as "a video of red ball 2" for red_ball-2.mp4, or "a video" without words.
    """
    stem = name.rsplit(".", 1)[0] or name
    words = " ".join(re.findall(r"[^\W\d_]+|\d+", stem)).lower()
    return clean_caption(f"a video of {words}") if words else "a video"


def _parse_row(line: str) -> CaptionRow:
    row = json.loads(line)
    text = clean_caption(_text(row["caption"]))
    start_s, end_s = float(row.get("start_s") or 0.0), row.get("end_s")
    end_s = float("inf") if end_s is None else float(end_s)
    if not text or not start_s < end_s:
        raise ValueError(f"empty caption or span: {line[:80]!r}")
    return CaptionRow(_text(row["path"]), start_s, end_s, text)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r}")
    return value
