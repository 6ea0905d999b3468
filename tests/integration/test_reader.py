"""The child that reads our clips: the same frames, and no clip that takes this process down."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests import media
from ursa.errors import ClipUnavailableError, VideoDecodeError
from ursa.video import reader
from ursa.video.decode import FrameSize, read_frames_at
from ursa.video.reader import ClipReader

SIZES = [FrameSize(16, 24), FrameSize(32, 48)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = media.panning(36, step=2, height=48, width=64)
    return media.save_video(tmp_path_factory.mktemp("clips") / "clip.mp4", frames, 12.0)


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 0.2 MB that takes a decoder gigabytes."""
    path = tmp_path_factory.mktemp("bombs") / "bomb.mp4"
    return media.save_bomb(path, side=8192, num_frames=3)


_OTHERS: set[psutil.Process] = set()


@pytest.fixture(autouse=True)
def _children_of_other_tests() -> Iterator[None]:
    _OTHERS.update(children())
    yield
    _OTHERS.clear()


def children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if child not in _OTHERS and "ursa.video.reader" in " ".join(child.cmdline())
    ]


def test_frames_are_those_read_in_this_process(clip: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(clip.parent)
    with ClipReader() as one:
        for indices in ([0, 5, 35], [35, 3, 3, 0], range(36)):
            found = one.read(Path(clip.name), indices, SIZES)
            expected = read_frames_at(clip, indices, SIZES)
            assert all(map(np.array_equal, found, expected))
            assert [each.shape for each in found] == [(len(indices), *size, 3) for size in SIZES]
        (child,) = children()
        with pytest.raises(VideoDecodeError, match=r"frames 36\.\.36 asked for, it has 36"):
            one.read(clip, [36], SIZES)
        with pytest.raises(VideoDecodeError, match=r"none\.mp4: no such file"):
            one.read(tmp_path / "none.mp4", [0], SIZES)
        assert children() == [child], "a clip that cannot be read does not cost a child"
    assert not children()


def test_clip_that_kills_its_decoder_is_an_error_of_that_clip(clip: Path, bomb: Path) -> None:
    with ClipReader(memory_bytes=1 << 30) as one:
        with pytest.raises(
            VideoDecodeError, match=r"bomb\.mp4: the decoder died .* 3 attempts"
        ) as it:
            one.read(bomb, [0, 1, 2], SIZES)
        assert not it.value.transient, "it crashes the decoder each time"
        assert np.array_equal(one.read(clip, [7], SIZES)[0], read_frames_at(clip, [7], SIZES)[0])


def test_clip_that_takes_too_long_is_given_up(clip: Path, bomb: Path) -> None:
    with ClipReader(deadline_s=0.05) as one:
        begin_s = time.monotonic()
        with pytest.raises(ClipUnavailableError, match="took too long in each of 3 attempts"):
            one.read(bomb, [0, 1, 2], SIZES)
        assert time.monotonic() - begin_s < 30
    assert not children()


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_child_that_dies_once_is_replaced(clip: Path, number: signal.Signals) -> None:
    """The memory was short for a moment, say: the clip is not to blame."""
    with ClipReader() as one:
        expected = one.read(clip, [3], SIZES)
        (child,) = children()
        child.send_signal(number)
        child.wait(10)
        assert all(map(np.array_equal, one.read(clip, [3], SIZES), expected))


def test_child_that_hangs_once_is_replaced(clip: Path) -> None:
    with ClipReader(deadline_s=1.0) as one:
        expected = one.read(clip, [3], SIZES)
        (child,) = children()
        child.send_signal(signal.SIGSTOP)
        assert all(map(np.array_equal, one.read(clip, [3], SIZES), expected))
        assert child not in children()


def test_child_is_replaced_after_many_clips(clip: Path, monkeypatch) -> None:
    monkeypatch.setattr(reader, "CLIPS_PER_CHILD", 2)
    with ClipReader() as one:
        seen = []
        for _ in range(3):
            one.read(clip, [3], SIZES)
            seen += children()
        assert len(seen) == 2, "after the second clip the first child is gone"
        assert seen[0] != seen[1]


def test_child_knows_no_credentials_and_ends_with_its_reader(clip: Path, monkeypatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    one = ClipReader()
    one.read(clip, [0], SIZES)
    (child,) = children()
    assert "AWS_SECRET_ACCESS_KEY" not in child.environ()
    assert child.num_threads() <= 2
    del one
    assert not children()


def test_child_ends_with_the_process(clip: Path) -> None:
    """A worker that is killed leaves no decoder behind."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            one = ClipReader()
            one.read(clip, [0], SIZES)
            os.write(theirs, str(children()[0].pid).encode())
            signal.pause()
        finally:
            os._exit(1)
    child = psutil.Process(int(os.read(ours, 20)))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    child.wait(10)
    os.close(ours)
    os.close(theirs)


def test_threads_may_share_a_reader(clip: Path) -> None:
    expected = read_frames_at(clip, [9], SIZES)[0]
    found: list[np.ndarray] = []
    with ClipReader() as one:
        threads = [
            threading.Thread(target=lambda: found.append(one.read(clip, [9], SIZES)[0]))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    assert all(np.array_equal(each, expected) for each in found)
