"""The local store in processes that are killed, have no room or no permission."""

import os
import resource
import subprocess
import sys
import textwrap

import pytest

from ursa import storage


def test_killed_writer_leaves_nothing_visible(tmp_path):
    code = f"""
    import os
    from ursa import storage
    os.fsync = lambda _: os._exit(9)
    storage.put_if_absent({str(tmp_path / "commit")!r}, b"x" * 100)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)])
    assert done.returncode == 9
    assert not storage.exists(str(tmp_path / "commit"))
    assert storage.put_if_absent(str(tmp_path / "commit"), b"y") == b"y"


def test_a_full_scratch_disk_is_named():
    code = """
import resource
import numpy as np
from safetensors.numpy import save_file
from ursa import storage
from ursa.errors import StorageConfigurationError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
for write in (
    lambda folder: save_file({"a": np.zeros(1 << 16)}, folder / "a"),
    lambda folder: (folder / "b").write_bytes(bytes(1 << 20)),
):
    try:
        with storage.scratch_directory("checkpoint") as folder:
            write(folder)
    except StorageConfigurationError as error:
        print(error)
try:
    with storage.scratch_directory("checkpoint"):
        raise OSError(5, "other")
except OSError as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    full, also_full, other = done.stdout.splitlines()
    assert full == also_full.replace(also_full.split()[5], full.split()[5])
    assert "disk full while writing to" in full
    assert "TMPDIR" in full
    assert other == "OSError"


def in_child(code: str, **options) -> subprocess.CompletedProcess:
    head = "from ursa import storage\nfrom ursa.errors import *\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_a_file_that_outgrows_its_limit_is_one_clear_error(tmp_path):
    # the limit stands in for a full disk: the kernel refuses to write on
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    done = in_child(
        f"""
        import signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        storage.write_bytes({str(tmp_path / "small")!r}, b"x" * 900)
        for call in (storage.write_bytes, storage.put_if_absent):
            try:
                call({str(tmp_path / "big")!r}, b"x" * 5000)
            except StorageError as error:
                print(type(error).__name__, error)
        """,
        preexec_fn=limit,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("StorageConfigurationError") == 2, done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_full_disk_is_a_configuration_error():
    # /dev/full answers every write with "no space left"
    done = in_child(
        """
        from pathlib import Path
        try:
            with storage._local_errors("/data/x"), Path("/dev/full").open("wb", 0) as file:
                file.write(b"x")
        except StorageConfigurationError as error:
            print(error)
        """
    )
    assert "disk full while writing /data/x" in done.stdout, done.stderr
    assert "finished work is kept" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become nobody")
def test_no_permission_is_a_configuration_error(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        message = "nothing raised"
        try:
            os.setuid(65534)
            storage.write_bytes(str(closed / "x"), b"x")
        except BaseException as error:  # noqa: BLE001
            message = f"{type(error).__name__} {error}"
        os.write(writer, message.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    assert text.startswith("StorageConfigurationError"), text
    assert "no permission" in text
