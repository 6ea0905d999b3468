import os
import pickle
import socket

import pytest

from tests import media
from ursa.artifacts import FailureReason
from ursa.video.probe import QuarantinedError, copy_foreign_file


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def copied(path, folder, **changes):
    with pytest.raises(QuarantinedError) as caught:
        copy_foreign_file(path, folder, media.ingestion_config(**changes))
    return caught.value.reason


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", FailureReason.EMPTY_FILE),
        (b"#EXTM3U\n/etc/passwd\n", FailureReason.NOT_A_VIDEO),
        (b"ffconcat version 1.0\nfile '/etc/passwd'\n", FailureReason.NOT_A_VIDEO),
        (b"<html>404</html>", FailureReason.NOT_A_VIDEO),
        (bytes(5000), FailureReason.NOT_A_VIDEO),
    ],
)
def test_files_that_are_never_opened_by_a_decoder(tmp_path, work, content, reason):
    path = tmp_path / "upload.mp4"
    path.write_bytes(content)
    assert copied(path, work) is reason
    assert not list(work.iterdir())


def test_too_large_file_is_not_copied(tmp_path, work):
    path = media.save_video(tmp_path / "a.mp4", media.still(3))
    assert copied(path, work, max_file_bytes=1000) is FailureReason.FILE_TOO_LARGE
    assert not list(work.iterdir())


def test_what_is_no_regular_file_does_not_block(tmp_path, work):
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "dir.mp4").mkdir()
    (tmp_path / "link.mp4").symlink_to("/etc/passwd")
    for name in ("fifo.mp4", "dir.mp4", "link.mp4"):
        assert copied(tmp_path / name, work) is FailureReason.NOT_REGULAR_FILE
    assert copied(tmp_path / "missing.mp4", work) is FailureReason.UNAVAILABLE
    with socket.socket(socket.AF_UNIX) as server:
        server.bind((tmp_path / "s.mp4").as_posix())
        assert copied(tmp_path / "s.mp4", work) is FailureReason.NOT_REGULAR_FILE


def test_reason_survives_pickling():
    error = QuarantinedError(FailureReason.TIMEOUT, "not done after 20 s")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.reason, copy.detail) == (FailureReason.TIMEOUT, "not done after 20 s")
    assert str(copy) == "timeout: not done after 20 s"
