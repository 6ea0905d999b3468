"""The encoder alone."""

import os
import subprocess
import sys

import pytest

ENCODE = """
import hashlib, sys
from pathlib import Path
from tests import media
from ursa.video.encode import write_video

for width in (206, 240, 256, 272, 320, 336):
    frames = media.panning(48, step=2, height=180, width=width)
    write_video(Path(sys.argv[1]), iter(frames), 24.0)
    print(width, hashlib.sha256(Path(sys.argv[1]).read_bytes()).hexdigest())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the variable is glibc's")
def test_bytes_do_not_depend_on_what_memory_held_before(tmp_path):
    """The mb-tree of x264 reads what nobody has written: half of these widths had other bytes."""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", ENCODE, str(tmp_path / "a.mp4")],
            env={
                **os.environ,
                "MALLOC_PERTURB_": str(value),
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for value in (0, 1)
    ]
    assert outputs[0].count("\n") == 6
    assert outputs[0] == outputs[1]
