import os
import subprocess
import sys


def test_no_cuda_is_needed_or_started():
    code = (
        "import ursa.generation, torch;"
        "print(torch.cuda.is_available(), torch.cuda.is_initialized())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.stdout.split() == ["False", "False"], done.stderr
