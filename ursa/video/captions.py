"""What is said about a clip: from a caption file, a text beside the video, or its name."""

import codecs
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

logger = logging.getLogger(__name__)

MAX_CAPTION_CHARACTERS = 2000
MAX_LINE_CHARACTERS = 1 << 20
"""Of a line of JSON or CSV: objects in it may take 30 times that."""
_MAX_SHOWN = 80
_TEXT_ENDS = (".txt", ".TXT", ".json", ".JSON")

CaptionSource = Literal["sidecar", "manifest", "tar", "template"]

_MANIFEST: CaptionSource = "manifest"


class RepeatedKeyError(ValueError):
    """An object of JSON has a key more than once."""


class Caption(NamedTuple):
    """A caption, its longer form if there is one, and where both come from."""

    text: str
    text_long: str | None
    source: CaptionSource


class Notes(NamedTuple):
    """What is written about a video or a span of it, each in one clean line; None is not said."""

    caption: str | None = None
    caption_long: str | None = None
    license: str | None = None
    attribution: str | None = None


class CaptionRow(NamedTuple):
    """One row of a caption file: what is written about a span of a video."""

    path: str
    start_s: float
    end_s: float
    notes: Notes


def parse_caption_rows(data: bytes) -> tuple[list[CaptionRow], list[int]]:
    """Read `captions.jsonl`: one JSON object a line.

    Keys are `path` or `uri` (as in a manifest), `caption` or `caption_long` and, optional,
    `start_s`, `end_s`, `license` and `attribution`; others are passed over.

    Args:
        data: UTF-8 text; other bytes count in `path`, as surrogates, and nowhere else.

    Returns:
        The rows, and the numbers (from 1) of the lines that cannot be used.
    """
    rows: list[CaptionRow] = []
    bad_lines: list[int] = []
    text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_parse_row(line))
        except (ValueError, TypeError, RecursionError):
            bad_lines.append(number)
    return rows, bad_lines


def parse_object(text: str) -> object:
    """Read a line of JSON in which no key may be there twice: the last one would win in silence.

    Args:
        text: JSON.

    Returns:
        Its value.

    Raises:
        ValueError: If it is no JSON, or a number in it has more digits than Python reads;
            RepeatedKeyError if a key of an object is repeated.
        RecursionError: If it is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeated_keys)
    except (json.JSONDecodeError, RepeatedKeyError):
        raise
    except ValueError as error:  # Python's own words tell a programmer what to do
        raise ValueError(
            f"a number in {_shortened(text)} has more digits than can be read; shorten it"
        ) from error


def _without_repeated_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if repeated := repeated_names([key for key, _ in pairs]):
        raise RepeatedKeyError(f"{', '.join(map(repr, repeated))} is there more than once")
    return dict(pairs)


def repeated_names(names: Iterable[str]) -> list[str]:
    """Return the names that are there more than once, sorted.

    Args:
        names: Keys of an object or columns of a table.
    """
    return sorted(name for name, count in Counter(names).items() if count > 1)


def parse_notes(values: Mapping[str, object]) -> Notes:
    """Return what a row or an object says about a video; other keys are passed over.

    Args:
        values: May hold `caption`, `caption_long`, `license` (or `licence`) and `attribution`.

    Raises:
        TypeError: If one of them is neither text nor None.
    """
    return Notes(
        caption=_optional_text(values.get("caption")),
        caption_long=_optional_text(values.get("caption_long")),
        license=_optional_text(values.get("license") or values.get("licence")),
        attribution=_optional_text(values.get("attribution")),
    )


def name_of(values: Mapping[str, object]) -> str:
    """Return the file that a row names: its `path`, or if it has none its `uri`.

    Args:
        values: May hold `path` and `uri`.

    Raises:
        TypeError: If it is no text.
    """
    name = values.get("path") or values.get("uri")
    if not isinstance(name, str):
        raise TypeError(f"`path` or `uri` must be text, got {_shortened(name)}")
    return name


def parse_span(values: Mapping[str, object]) -> tuple[float, float]:
    """Return the span of a row, `start_s` and `end_s` in seconds: all of the video if not given.

    Args:
        values: May hold numbers or their texts; an empty text counts as not given.

    Raises:
        ValueError: If one is no number of seconds, or the start is not before the end.
    """
    start_s, end_s = (
        default if values.get(key) in (None, "") else _seconds(key, values[key])
        for key, default in (("start_s", 0.0), ("end_s", float("inf")))
    )
    if not start_s < end_s:
        raise ValueError(f"start_s {start_s:g} must be before end_s {end_s:g}")
    return start_s, end_s


def _seconds(key: str, value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{key} must be seconds, got {_shortened(value)}") from error


def _shortened(value: object) -> str:
    """Return a value of a row for an error, of bounded length."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def parse_text_beside(name: str, data: bytes) -> Notes:
    """Read a text beside a video: `.json` is an object as `parse_notes` reads it, else a caption.

    Args:
        name: File name of the text.
        data: UTF-8; what is not is replaced.

    Returns:
        What it says; nothing of UTF-16, and of JSON that is damaged or no object. Damage is named
        in the log, such as a key that is there twice: the last one would win in silence.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        logger.warning("%r is left out: it is UTF-16, expected UTF-8", name)
        return Notes()
    text = data.decode("utf-8-sig", "replace")
    if not name.lower().endswith(".json"):
        return Notes(caption=clean_caption(text) or None)
    try:
        values = parse_object(text)
        return parse_notes(values) if isinstance(values, dict) else Notes()
    except (ValueError, TypeError, RecursionError) as error:
        logger.warning("%r is left out: %s", name, error)
        return Notes()


def names_beside(name: str, *, in_tar: bool = False) -> tuple[str, ...]:
    """Return the names of texts that may say something about a video, the first ones first.

    Args:
        name: Such as `d/a.b.mp4`, for which it may be `d/a.b.mp4.txt` or `d/a.b.txt`; likewise
            with `.TXT`, `.json` and `.JSON`, in this order.
        in_tar: Whether it is a member of a tar file: then it may also be `d/a.txt`, since the key
            of a webdataset sample ends at the first dot.
    """
    folder, slash, base = name.rpartition("/")
    stems = dict.fromkeys((base, base.rpartition(".")[0] or base))
    if in_tar:
        stems[base.partition(".")[0] or base] = None
    return tuple(f"{folder}{slash}{stem}{end}" for end in _TEXT_ENDS for stem in stems)


def join_notes(first: Notes, *others: Notes) -> Notes:
    """Return the notes in which what the first ones do not say is taken from the next.

    Args:
        first: What counts most.
        *others: What counts less, in this order.
    """
    return Notes(*(next(filter(None, said), None) for said in zip(first, *others, strict=True)))


def clean_caption(text: str) -> str:
    """Return text in one line, without control characters and of bounded length.

    Args:
        text: Any text; it is cut to `MAX_CAPTION_CHARACTERS`.
    """
    line = ""
    for start in range(0, len(text), MAX_CAPTION_CHARACTERS):
        # the text may be a thousand times longer than what is kept of it
        if len(line) > MAX_CAPTION_CHARACTERS:
            break
        part = text[start : start + MAX_CAPTION_CHARACTERS]
        printable = "".join(character if character.isprintable() else " " for character in part)
        # a space at the end stays: the next part may begin with another word
        line = " ".join(f"{line}{printable}|".split())[:-1]
    return line[:MAX_CAPTION_CHARACTERS].strip()


def caption_of(
    name: str,
    start_s: float,
    end_s: float,
    *,
    rows: Sequence[CaptionRow],
    beside: Notes,
    beside_source: CaptionSource = "sidecar",
) -> Caption:
    """Return the caption of a span of a video; one that is only long counts as short as well.

    Args:
        name: File name of the video.
        start_s: Start of the span.
        end_s: End of the span.
        rows: Caption rows of this video; of those with a caption the one that overlaps the span
            most is used.
        beside: What the texts beside the video say.
        beside_source: Where these texts are.
    """
    best_overlap_s = 0.0
    best: CaptionRow | None = None
    for row in rows:
        overlap_s = min(end_s, row.end_s) - max(start_s, row.start_s)
        if overlap_s > best_overlap_s and (row.notes.caption or row.notes.caption_long):
            best_overlap_s, best = overlap_s, row
    notes, source = (beside, beside_source) if best is None else (best.notes, _MANIFEST)
    text = notes.caption or notes.caption_long
    if text:
        return Caption(text, notes.caption_long, source)
    return Caption(template_caption(name), None, "template")


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
    if len(line) > MAX_LINE_CHARACTERS:
        raise ValueError(f"{len(line)} characters, expected at most {MAX_LINE_CHARACTERS}")
    row = parse_object(line)
    if not isinstance(row, dict):
        raise TypeError(f"expected an object, got {line[:80]!r}")
    notes = parse_notes(row)
    if not (notes.caption or notes.caption_long):
        raise ValueError(f"empty caption: {line[:80]!r}")
    return CaptionRow(name_of(row), *parse_span(row), notes)


def _optional_text(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {_shortened(value)}")
    return clean_caption(value) or None
