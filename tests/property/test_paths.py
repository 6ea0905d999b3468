"""No name that somebody else has chosen leads out of the folder that it is meant for (S4).

Ten thousand names, in parts: `..`, absolute, percent-encoded, backslashes, NUL, links that lead
out, very long, dots of other scripts. Whatever opens, makes, moves or removes a file says so to an
audit hook; none of these places may be outside. A twentieth of the names is drawn in every run, all
of them in a slow one.
"""

import contextlib
import io
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

import ursa
from tests import factories, media
from ursa import decisions, storage
from ursa.artifacts import SelectedClip, SourceVideo, VideoInfo
from ursa.errors import UrsaError
from ursa.evaluation import benchmarks
from ursa.inspection.examples import write_examples
from ursa.inspection.gallery import sample_figures
from ursa.model import pretrained
from ursa.sources.listing import discover_videos
from ursa.sources.notes import SourceNotes
from ursa.sources.reading import copy_source
from ursa.tokenizers import weights

SHARE = 20
EVENTS = frozenset(
    {
        *("open", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir"),
        *("os.chmod", "os.truncate", "os.listdir", "os.scandir", "shutil.rmtree", "os.utime"),
    }
)
PARTS = (
    *("..", ".", "", "a", "s", "out", "link.mp4", "a.mp4", "secret.mp4", "outside", "root"),
    *("%2e%2e", "..%2f", "%2e%2e%2f", "%00", "%5c", "..\\", "\\", "C:\\x", "\0", "a\0.mp4"),
    # dots of other scripts, and characters that are no text
    *("\u2024\u2024", "\uff0e\uff0e", "\u2025", "\u2026", "\udcff", "\ud800", "\u202e", "\u00e9"),
    *("~", "~root", "$HOME", "#", "?", "x" * 300, "y" * 5000, " ", "\n", "\r", "\x1b[31m"),
    *("file:", "s3:", "-", "con", ".hidden.mp4"),
)


class Place(NamedTuple):
    """A folder for which names are meant, and one beside it that no name may reach."""

    root: Path
    outside: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    top = tmp_path_factory.mktemp("paths")
    found = Place(top / "root", top / "outside")
    for folder in found:
        folder.mkdir()
        (folder / "s").mkdir()
        (folder / "a.mp4").write_bytes(b"\x00\x00\x00\x18ftypisom" + b"inside" * 20)
    (found.outside / "secret.mp4").write_bytes(b"\x00\x00\x00\x18ftypisom" + b"secret" * 20)
    (found.outside / "secret.safetensors").write_bytes(b"secret")
    (found.root / "out").symlink_to(found.outside)
    (found.root / "link.mp4").symlink_to(found.outside / "secret.mp4")
    return found


touched: list[str] = []
watched: list[Place] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if watched and event in EVENTS:
        # a place by its number is one that was opened by its name
        found = [os.fsdecode(x) for x in arguments[:2] if isinstance(x, str | bytes)]
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_NOFOLLOW:
            folder, name = os.path.split(found[0])  # of a link this open fails
            found = [os.path.realpath(folder) if name else found[0]]
        touched.extend(found)


sys.addaudithook(watch)


@contextlib.contextmanager
def inside(place: Place, *allowed: Path) -> Iterator[None]:
    """Fail if a file is touched beside the root, the allowed folders and Python itself."""
    touched.clear()
    watched.append(place)
    try:
        yield
    finally:
        watched.clear()
    prefix = os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix), "/proc", "/sys"
    homes = (
        *map(os.path.realpath, (place.root, *allowed, Path(ursa.__file__).parent, "/dev")),
        *prefix,
    )
    for name in touched:
        if "\0" in name or not Path(name).is_absolute():
            continue
        path = os.path.realpath(name)
        assert not path.startswith(f"{place.outside}/"), name
        assert path.startswith(homes) or path.endswith((".py", ".pyc", "ursa")), name


def names(place: Place) -> st.SearchStrategy[str]:
    parts = st.lists(st.sampled_from(PARTS) | st.text(max_size=6), min_size=1, max_size=6)
    joined = st.builds(str.join, st.sampled_from(["/", "\\", ""]), parts)
    starts = ["", "", "", "/", "//", "./", "../", "../outside/", "out/", "s/../../outside/"]
    aimed = [f"{place.outside}/", f"/../..{place.outside}/", "../outside/secret.mp4/.."]
    return st.builds(str.__add__, st.sampled_from([*starts, *aimed]), joined) | st.sampled_from(
        [
            *(f"{place.outside}/secret.mp4", "../outside/secret.mp4", "out/secret.mp4", "link.mp4"),
            *("../outside/secret.safetensors", "..", ".", "/", "", "../root/../outside/secret.mp4"),
        ]
    )


def check(number: int, place: Place, test: Callable[[str], None]) -> None:
    """Run a test on so many names."""
    drawn = settings(
        max_examples=number,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    drawn(given(names(place))(test))()


def cases(number: int) -> Any:
    every = pytest.param(number, marks=pytest.mark.slow, id=f"{number}")
    return pytest.mark.parametrize("number", [pytest.param(number // SHARE, id="few"), every])


def copied(sources: tuple[SourceVideo, ...], scratch: Path) -> list[bytes]:
    """Return the content of what is copied of sources to be decoded."""
    config = factories.tiny_config().ingestion
    found = []
    for source in sources:
        with contextlib.suppress(UrsaError), tempfile.TemporaryDirectory(dir=scratch) as folder:
            copy_source(source, Path(folder), config)
            found.append(b"".join(path.read_bytes() for path in Path(folder).iterdir()))
    return found


@cases(2400)
def test_names_in_a_manifest(place: Place, tmp_path: Path, number: int) -> None:
    def test(name: str) -> None:
        if name.startswith("/"):
            return  # absolute paths are allowed there, see docs/sources.md
        manifest = place.root / "list.jsonl"
        manifest.write_text(json.dumps({"path": name}) + "\n" + json.dumps({"path": "a.mp4"}))
        with inside(place, tmp_path), contextlib.suppress(UrsaError):
            assert b"secret" not in b"".join(copied(discover_videos(str(manifest)), tmp_path))

    check(number, place, test)


@cases(1600)
def test_members_of_a_tar_file(place: Place, tmp_path: Path, number: int) -> None:
    kinds = (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)

    def test(name: str) -> None:
        path = place.root / "x.tar"
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for index, kind in enumerate((kinds[len(name) % len(kinds)], tarfile.REGTYPE)):
                info = tarfile.TarInfo(name if index == 0 else f"{name}.mp4")
                info.type, info.linkname = kind, str(place.outside / "secret.mp4")
                data = b"\x00\x00\x00\x18ftypisom" if kind == tarfile.REGTYPE else b""
                info.size = len(data)
                with contextlib.suppress(UnicodeEncodeError):
                    tar.addfile(info, io.BytesIO(data))
        path.write_bytes(buffer.getvalue())
        with inside(place, tmp_path), contextlib.suppress(UrsaError):
            found = discover_videos(str(path))
            assert b"secret" not in b"".join(copied(found, tmp_path))

    check(number, place, test)


@cases(1000)
def test_names_in_a_file_of_captions(place: Place, number: int) -> None:
    source = SourceVideo(uri=(place.root / "a.mp4").as_uri(), num_bytes=1, etag="x" * 64)

    def test(name: str) -> None:
        row = {"path": name, "caption": "a secret"}
        (place.root / "captions.jsonl").write_text(json.dumps(row) + "\n")
        with inside(place), contextlib.suppress(UrsaError):
            SourceNotes.read(str(place.root), [source]).digest()

    check(number, place, test)
    (place.root / "captions.jsonl").unlink(missing_ok=True)


@cases(1000)
def test_files_in_the_index_of_a_model(place: Place, number: int) -> None:
    folder = place.root / "model"
    folder.mkdir(exist_ok=True)

    def test(name: str) -> None:
        index = json.dumps({"weight_map": {"x": name}})
        (folder / weights.INDEX_FILE).write_text(index)
        with inside(place), contextlib.suppress(UrsaError):
            for path in pretrained._weight_files(folder).values():
                assert path.parent == folder
                with contextlib.suppress(UrsaError, SafetensorError):
                    pretrained._open(path)
        with inside(place), contextlib.suppress(UrsaError):
            weights._read_weights(folder)

    check(number, place, test)


@cases(800)
def test_names_of_samples(place: Place, number: int) -> None:
    folder = place.root / "samples"
    folder.mkdir(exist_ok=True)

    def test(name: str) -> None:
        (folder / "prompts.tsv").write_bytes(f"{name}\ta tree\n".encode("utf-8", "replace"))
        with inside(place), contextlib.suppress(UrsaError, FileNotFoundError):
            assert b"c2VjcmV0" not in "".join(sample_figures(str(folder))).encode()

    check(number, place, test)


@cases(600)
def test_ids_and_reasons_of_clips(place: Place, tmp_path: Path, number: int) -> None:
    clip_path = media.save_video(place.root / "clip.mp4", media.panning(8, step=1), 8.0)
    info = VideoInfo(codec="h264", width_px=96, height_px=64, fps=8.0, num_frames=8, duration_s=1.0)
    clip = factories.clip_of(Path(clip_path), caption="a tree", info=info)

    def test(name: str) -> None:
        item = SelectedClip(
            clip=clip.model_copy(update={"clip_id": name}), kept=False, reason=name, split=None
        )
        with inside(place, tmp_path), contextlib.suppress(UnicodeEncodeError, UrsaError):
            (path,) = write_examples([item], tmp_path / "examples")
            assert tmp_path / "examples" in Path(os.path.normpath(path)).parents

    check(number, place, test)


@cases(1000)
def test_prompts_and_images_of_a_benchmark(place: Place, tmp_path: Path, number: int) -> None:
    samples = tmp_path / "samples"

    def test(name: str) -> None:
        listed = tmp_path / "info.json"
        for layout, rows in (
            ("vbench", [{"prompt_en": name}]),
            ("dpg", [{"id": name, "prompt": "a tree"}]),
            ("vbench-i2v", [{"prompt_en": "a tree", "image_name": name}]),
        ):
            listed.write_text(json.dumps(rows))
            images = place.root if layout == "vbench-i2v" else None
            with inside(place, tmp_path), contextlib.suppress(UrsaError):
                for asked in benchmarks.read_prompts(layout, listed, images):
                    path = benchmarks._place(layout, samples, asked, 0)
                    assert Path(os.path.normpath(path)).parent == samples
                    assert asked.image is None or asked.image.parent == place.root

    check(number, place, test)


@cases(600)
def test_names_of_models(place: Place, number: int) -> None:
    def test(name: str) -> None:
        with inside(place), contextlib.suppress(UrsaError, UnicodeEncodeError):
            assert decisions.list_decisions(str(place.root), name) == []
            folder = decisions._folder_uri(str(place.root), name)
            assert storage.is_below(folder, str(place.root)) or len(folder) > 4000

    check(number, place, test)


@cases(1000)
def test_keys_of_objects_and_places_in_records(place: Place, number: int) -> None:
    def test(name: str) -> None:
        with contextlib.suppress(UrsaError):
            path = storage.path_inside(place.outside, name)
            assert Path(os.path.normpath(path)).is_relative_to(place.outside)
            assert path != place.outside
        for uri in (f"{place.root}/{name}", f"file://{place.root}/{name}", name):
            if storage.is_below(uri, str(place.root)):
                assert os.path.realpath(storage.local_path(uri)).startswith(f"{place.root}/")
        if storage.is_below(f"s3://b/root/{name}", "s3://b/root"):
            assert ".." not in name.split("/")

    check(number, place, test)


def test_the_watch_sees_what_is_touched(place: Place) -> None:
    for touch in (
        (place.root / "out" / "secret.mp4").read_bytes,
        (place.root / "link.mp4").read_bytes,
        lambda: (place.root / ".." / "outside" / "new").mkdir(exist_ok=True),
    ):
        with pytest.raises(AssertionError), inside(place):
            touch()


def test_there_are_ten_thousand_names() -> None:
    counts = [2400, 1600, 1000, 1000, 800, 600, 1000, 600, 1000]
    assert sum(counts) == 10_000
