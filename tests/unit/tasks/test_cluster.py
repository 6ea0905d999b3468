"""`map_units` with the local launcher; Ray itself is in the integration tests."""

import functools
from pathlib import Path

import pytest

from tasks.cluster import map_units
from tasks.settings import RuntimeSettings
from ursa.artifacts import SourceVideo
from ursa.errors import DataError, ServiceError, StorageError, UrsaError

LOCAL = RuntimeSettings(launcher="local", data_uri="/nowhere")
ITEMS = [SourceVideo(uri=f"/videos/{i}.mp4", num_bytes=i, etag=str(i)) for i in range(5)]


class Doubler:
    """Doubles a number, or fails as told; notes every call in a folder."""

    def __init__(self, folder: Path, failing: dict[str, tuple[type[Exception], int]]) -> None:
        self.folder = folder
        self.failing = failing

    def __call__(self, item: SourceVideo) -> SourceVideo:
        note = self.folder / item.etag
        calls = int(note.read_text()) if note.exists() else 0
        note.write_text(str(calls + 1))
        error, times = self.failing.get(item.etag, (None, 0))
        if error is not None and calls < times:
            raise error(f"{item.uri} failed")
        return item.model_copy(update={"num_bytes": item.num_bytes * 2})


def test_all_items_are_done_and_progress_is_told(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    results = list(
        map_units(
            functools.partial(Doubler, tmp_path, {}),
            ITEMS,
            SourceVideo,
            LOCAL,
            on_progress=lambda done, total: seen.append((done, total)),
        )
    )
    assert sorted(item.num_bytes for item in results) == [0, 2, 4, 6, 8]
    assert seen == [(i + 1, 5) for i in range(5)]


def test_nothing_to_do() -> None:
    assert list(map_units(functools.partial(Doubler, Path(), {}), [], SourceVideo, LOCAL)) == []


def test_transient_errors_are_tried_again(tmp_path: Path) -> None:
    make = functools.partial(Doubler, tmp_path, {"2": (StorageError, 2)})
    assert len(list(map_units(make, ITEMS, SourceVideo, LOCAL))) == 5
    assert (tmp_path / "2").read_text() == "3"
    assert (tmp_path / "1").read_text() == "1"


def test_transient_errors_are_not_tried_for_ever(tmp_path: Path) -> None:
    make = functools.partial(Doubler, tmp_path, {"2": (ServiceError, 99)})
    with pytest.raises(ServiceError, match=r"/videos/2\.mp4 failed"):
        list(map_units(make, ITEMS, SourceVideo, LOCAL))
    assert (tmp_path / "2").read_text() == "3"


def test_lasting_error_is_raised_after_the_others_are_done(tmp_path: Path) -> None:
    make = functools.partial(Doubler, tmp_path, {"0": (StorageError, 99), "1": (DataError, 99)})
    with pytest.raises(DataError, match=r"/videos/1\.mp4 failed"):
        list(map_units(make, ITEMS, SourceVideo, LOCAL))
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "2", "3", "4"}


def test_unexpected_error_keeps_its_kind_in_the_message(tmp_path: Path) -> None:
    make = functools.partial(Doubler, tmp_path, {"3": (ZeroDivisionError, 99)})
    with pytest.raises(UrsaError, match=r"ZeroDivisionError: /videos/3\.mp4 failed"):
        list(map_units(make, ITEMS, SourceVideo, LOCAL))


def test_unit_that_cannot_be_made_is_an_error_row() -> None:
    with pytest.raises(UrsaError, match="TypeError"):
        list(map_units(Doubler, ITEMS, SourceVideo, LOCAL))  # type: ignore[arg-type]
