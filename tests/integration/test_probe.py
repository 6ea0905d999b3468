"""The child process that decodes a foreign file, seen from its parent."""

import contextlib
import functools
import os
import resource
import signal
import threading
import time

import psutil
import pytest

from tests import media
from ursa.artifacts import FailureReason
from ursa.errors import ServiceError, StorageConfigurationError
from ursa.video import fork_server, probe
from ursa.video.probe import QuarantinedError, copy_foreign_file, normalise_video


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_clips_of_a_child_process(tmp_path, work):
    path = media.save_video(tmp_path / "a.mp4", media.panning(48, step=1), 24.0)
    config = media.ingestion_config()
    sha256, demuxer = copy_foreign_file(path, work, config)
    video = normalise_video(work, demuxer, config)
    assert len(sha256) == 64
    assert demuxer == "mp4"
    (clip,) = video.clips
    assert (work / clip.file_name).is_file()
    assert clip.info.num_frames == 24
    assert clip.scores.motion_px_per_s == pytest.approx(24, rel=0.15)


def normalised(path, work, **changes):
    for left in work.iterdir():
        left.unlink()
    config = media.ingestion_config(**changes)
    _, demuxer = copy_foreign_file(path, work, config)
    return normalise_video(work, demuxer, config)


def run_child(path, work, **changes):
    with pytest.raises(QuarantinedError) as caught:
        normalised(path, work, **changes)
    return caught.value.reason


def test_reason_crosses_the_process_border(tmp_path, work):
    path = media.save_sound(tmp_path / "a.mp4")
    assert run_child(path, work) is FailureReason.NO_VIDEO_STREAM


def test_child_that_takes_too_long_is_killed(tmp_path, work, monkeypatch):
    monkeypatch.setattr(fork_server, "_POLL_S", 0.01)
    path = media.save_video(tmp_path / "a.mp4", media.still(24))
    normalised(path, work)
    before = set(fork_servers())
    start_s = time.monotonic()
    assert run_child(path, work, child_timeout_s=0.01) is FailureReason.TIMEOUT
    assert time.monotonic() - start_s < 5
    assert not any(server.is_running() for server in before)
    assert not fork_servers()


def test_finished_video_earns_time(tmp_path, work, monkeypatch):
    monkeypatch.setattr(probe, "EARNED_S", 1000.0)
    path = media.save_video(tmp_path / "a.mp4", media.panning(48, step=2), 24.0)
    config = media.ingestion_config(child_timeout_s=0.1)
    _, demuxer = copy_foreign_file(path, work, config)
    # as if the child had come that far before the time was up
    (work / probe.PROGRESS_NAME).write_text("0.500")
    assert normalise_video(work, demuxer, config).clips
    assert float((work / probe.PROGRESS_NAME).read_text()) > 0.5


def test_killed_child_is_a_reason(tmp_path, work):
    path = media.save_video(tmp_path / "a.mp4", media.panning(48, step=2))
    killer = threading.Thread(target=lambda: [child.kill() for child in decoders()])
    killer.start()
    reason = run_child(path, work)
    killer.join()
    assert reason is FailureReason.OUT_OF_MEMORY


def decoders():
    """Wait for processes that decode, and return them."""
    while True:
        with contextlib.suppress(psutil.Error):
            found = [child for server in fork_servers() for child in server.children()]
            if found:
                return found


def fork_servers():
    name = "ursa.video.normalise"
    return [each for each in psutil.Process().children() if each.cmdline()[-1:] == [name]]


def test_files_are_decoded_by_children_of_one_process(tmp_path, work):
    path = media.save_video(tmp_path / "a.mp4", media.panning(48, step=2))
    seen = []
    for _ in range(2):
        watcher = threading.Thread(target=lambda: seen.append(decoders()[0]))
        watcher.start()
        assert normalised(path, work).clips
        watcher.join()
    assert len({child.pid for child in seen}) == 2
    assert not any(child.is_running() for child in seen)
    assert len(fork_servers()) == 1
    assert fork_servers()[0].num_threads() == 1  # a fork leaves other threads, and their locks


def test_where_nothing_forks_a_process_answers_once(tmp_path, work, monkeypatch):
    path = media.save_video(tmp_path / "a.mp4", media.panning(48, step=2))
    expected = normalised(path, work)
    monkeypatch.setattr(probe, "_own", threading.local())
    monkeypatch.setattr(probe, "ForkServer", functools.partial(fork_server.ForkServer, forks=False))
    for _ in range(2):
        assert normalised(path, work) == expected
        assert not probe._own.server.is_open
    assert run_child(media.save_sound(tmp_path / "b.mp4"), work) is FailureReason.NO_VIDEO_STREAM
    monkeypatch.setattr(fork_server, "_POLL_S", 0.001)
    assert run_child(path, work, child_timeout_s=0.001) is FailureReason.TIMEOUT


def test_what_forks_is_started_again_when_it_is_lost(tmp_path, work):
    path = media.save_video(tmp_path / "a.mp4", media.panning(48, step=2))
    killer = threading.Thread(target=lambda: [decoders(), fork_servers()[0].kill()])
    killer.start()
    with pytest.raises(ServiceError, match="ended with -9"):
        normalised(path, work)
    killer.join()
    assert normalised(path, work).clips


def test_a_child_ends_with_the_call_that_asked_for_it(tmp_path, work, monkeypatch):
    """Whatever ends the call: here what a signal handler would raise."""

    class Interrupted(BaseException):
        pass

    def interrupt(self):
        seen.extend(decoders())
        raise Interrupted

    seen = []
    monkeypatch.setattr(probe._Deadline, "check", interrupt)
    monkeypatch.setattr(fork_server, "_POLL_S", 0.01)
    with pytest.raises(Interrupted):
        normalised(media.save_video(tmp_path / "a.mp4", media.panning(48, step=2)), work)
    gone, alive = psutil.wait_procs(seen, timeout=5)
    assert gone
    assert not alive


def test_what_forks_cannot_start(tmp_path, work, monkeypatch):
    """That is no fault of the file."""
    path = media.save_video(tmp_path / "a.mp4", media.still(24))
    monkeypatch.setattr(probe, "_own", threading.local())
    (tmp_path / "av").mkdir()
    (tmp_path / "av" / "__init__.py").write_text("raise SystemExit('broken installation')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(ServiceError, match="broken installation"):
        normalised(path, work)


def test_child_sees_no_credentials(tmp_path, work, monkeypatch):
    path = media.save_video(tmp_path / "a.mp4", media.still(24))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setattr(probe, "_own", threading.local())
    seen = []
    watcher = threading.Thread(target=lambda: seen.append(decoders()[0].environ()))
    watcher.start()
    config = media.ingestion_config()
    _, demuxer = copy_foreign_file(path, work, config)
    normalise_video(work, demuxer, config)
    watcher.join()
    assert "PYTHONPATH" in seen[0]
    assert not [name for name in seen[0] if name.startswith(("AWS", "MLFLOW", "PREFECT"))]


def test_a_disk_that_is_full_when_the_answer_is_written_is_no_fault_of_the_file(tmp_path, work):
    path = media.save_video(tmp_path / "a.mp4", media.still(24))
    config = media.ingestion_config()
    _, demuxer = copy_foreign_file(path, work, config)
    # every write to this device says that there is no room
    (work / probe.RESULT_NAME).symlink_to("/dev/full")
    with pytest.raises(StorageConfigurationError, match="set TMPDIR"):
        normalise_video(work, demuxer, config)


def test_a_child_that_cannot_begin_is_no_fault_of_the_file(tmp_path, work):
    path = media.save_video(tmp_path / "a.mp4", media.still(24))
    config = media.ingestion_config()
    _, demuxer = copy_foreign_file(path, work, config)
    with pytest.raises(ServiceError, match=r"could not begin to work in .*/gone; check"):
        normalise_video(tmp_path / "gone", demuxer, config)
    (work / "stderr.txt").mkdir()
    with pytest.raises(ServiceError, match="could not begin"):
        normalise_video(work, demuxer, config)


def test_children_are_read_where_their_signal_is_ignored(tmp_path, work, monkeypatch):
    path = media.save_video(tmp_path / "a.mp4", media.panning(48, step=2))
    monkeypatch.setattr(probe, "_own", threading.local())
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert normalised(path, work).clips
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_what_forks_does_not_answer(tmp_path, work, monkeypatch):
    path = media.save_video(tmp_path / "a.mp4", media.panning(48, step=2))
    assert normalised(path, work).clips
    monkeypatch.setattr(fork_server, "_START_S", 0.5)
    fork_servers()[0].suspend()
    with pytest.raises(ServiceError, match=r"did not answer within 0\.5 s"):
        normalised(path, work)
    assert not fork_servers()


def test_what_forks_cannot_be_started(tmp_path, work, monkeypatch):
    path = media.save_video(tmp_path / "a.mp4", media.still(24))
    monkeypatch.setattr(probe, "_own", threading.local())
    config = media.ingestion_config()
    _, demuxer = copy_foreign_file(path, work, config)
    used = [os.open(os.devnull, os.O_RDONLY)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(used) + 1, limits[1]))
    try:
        with pytest.raises(ServiceError, match=r"cannot be started .*open files allowed"):
            normalise_video(work, demuxer, config)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(used[0])
