"""The child process that decodes a foreign file, seen from its parent."""

import threading
import time

import psutil
import pytest

from tests import media
from ursa.artifacts import FailureReason
from ursa.video import probe
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


def run_child(path, work, **changes):
    config = media.ingestion_config(**changes)
    _, demuxer = copy_foreign_file(path, work, config)
    with pytest.raises(QuarantinedError) as caught:
        normalise_video(work, demuxer, config)
    return caught.value.reason


def test_reason_crosses_the_process_border(tmp_path, work):
    path = media.save_sound(tmp_path / "a.mp4")
    assert run_child(path, work) is FailureReason.NO_VIDEO_STREAM


def test_child_that_takes_too_long_is_killed(tmp_path, work):
    path = media.save_video(tmp_path / "a.mp4", media.still(24))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    start_s = time.monotonic()
    assert run_child(path, work, child_timeout_s=0.1) is FailureReason.TIMEOUT
    assert time.monotonic() - start_s < 5
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


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
    path = media.save_video(tmp_path / "a.mp4", media.still(24))

    def kill():
        parent = psutil.Process()
        while True:
            for child in parent.children():
                if child.cmdline()[-1:] == ["ursa.video.normalise"]:
                    child.kill()
                    return

    killer = threading.Thread(target=kill)
    killer.start()
    reason = run_child(path, work)
    killer.join()
    assert reason is FailureReason.OUT_OF_MEMORY


def test_child_that_cannot_start_is_a_reason(tmp_path, work, monkeypatch):
    path = media.save_video(tmp_path / "a.mp4", media.still(24))
    (tmp_path / "av").mkdir()
    (tmp_path / "av" / "__init__.py").write_text("raise SystemExit('broken installation')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert run_child(path, work) is FailureReason.CRASHED


def test_child_sees_no_credentials(tmp_path, work, monkeypatch):
    path = media.save_video(tmp_path / "a.mp4", media.still(24))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    seen = []

    def watch():
        parent = psutil.Process()
        while not seen:
            for child in parent.children():
                try:
                    if child.cmdline()[-1:] == ["ursa.video.normalise"]:
                        seen.append(child.environ())
                except psutil.Error:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    config = media.ingestion_config()
    _, demuxer = copy_foreign_file(path, work, config)
    normalise_video(work, demuxer, config)
    watcher.join()
    assert "PYTHONPATH" in seen[0]
    assert not [name for name in seen[0] if name.startswith(("AWS", "MLFLOW", "PREFECT"))]
