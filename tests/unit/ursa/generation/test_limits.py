"""Calls of absurd size are refused at once, with what may be, before memory is used (S13)."""

import contextlib
import resource
import struct
import time
import warnings
import zlib

import pandas as pd
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ursa.cli import main
from ursa.errors import ConfigError, UrsaError
from ursa.generation import UrsaPipeline
from ursa.generation.limits import MAX_PROMPT_CHARACTERS, open_picture

LIMIT_S = 2.0
LIMIT_KB = 64 << 10


@pytest.fixture(scope="module")
def pipeline(exported_model):
    return UrsaPipeline.from_pretrained(exported_model.directory_uri)


@contextlib.contextmanager
def at_once():
    """Fail unless the block is quick and the process has not grown by 64 MB."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    yield
    assert time.monotonic() - began < LIMIT_S
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LIMIT_KB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 100_000}, "height must be at most 8192"),
        ({"width": 100_000}, "width must be at most 8192"),
        ({"height": 8192, "width": 8192, "num_frames": 100_001}, "GB in all; ask for fewer"),
        ({"num_frames": 10**9 + 1}, "visual tokens need about .* GB, and cpu has"),
        ({"num_frames": 10**30 + 1}, "GB in all"),
        ({"latents_shape": (10**6, 10**6, 10**6)}, "GB in all"),
        ({"num_inference_steps": 10**9}, "num_inference_steps must be at most 10,000"),
        ({"num_videos_per_prompt": 10**9}, "GB in all"),
        ({"max_prompt_length": 10**12}, "GB in all"),
        ({"prompt": ["x"] * 10**6}, "GB in all"),
        ({"prompt": "x" * (MAX_PROMPT_CHARACTERS + 1)}, "at most 10,000 characters, got 10,001"),
        ({"prompt": ["a", "x" * 10**7]}, "prompt must have at most 10,000 characters"),
        ({"negative_prompt": "x" * 10**7}, "negative_prompt must have at most 10,000"),
        ({"image": Image.new("1", (100_000, 1))}, "at most 8192 pixels a side, got 100000 x 1"),
        ({"video": [Image.new("1", (9_000, 1))]}, "at most 8192 pixels a side"),
    ],
)
def test_a_call_of_absurd_size_is_refused_at_once(pipeline, arguments, message):
    with at_once(), pytest.raises(ConfigError, match=message):
        pipeline(**{"prompt": "a tree", **arguments})


def png(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(100_000, 100_000), (8_193, 1), (2**31 - 1, 2**31 - 1)])
def test_a_picture_is_refused_by_what_its_header_claims(tmp_path, size):
    (tmp_path / "x.png").write_bytes(png(*size))
    with at_once(), pytest.raises(ConfigError, match=r"8192 pixels a side|cannot be read|not an"):
        open_picture(tmp_path / "x.png", "--image")


def test_a_picture_whose_text_unpacks_to_much_is_refused(tmp_path):
    text = PngInfo()
    text.add_text("a", "0" * (5 << 20), zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=text)
    with pytest.raises(ConfigError, match="not an image that can be read"):
        open_picture(tmp_path / "x.png", "--image")


def test_a_picture_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(1 << 40)
    with at_once(), pytest.raises(ConfigError, match="bytes, expected at most 268,435,456"):
        open_picture(tmp_path / "x.png", "--image")


def test_formats_for_which_pillow_starts_a_program_are_not_read(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(ConfigError, match="not an image that can be read"):
        open_picture(tmp_path / "x.png", "--image")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "100000"], "error: --height must be at most 8192"),
        (["--num-frames", "1000000001"], "GB in all; ask for fewer frames"),
        (["--num-frames", "1000000001", "--window", "5"], "GB in all; ask for fewer frames"),
        (["--steps", "1000000000"], "error: --steps must be at most 10,000"),
        (["--negative", "x" * 20_000], "error: --negative must have at most 10,000 characters"),
    ],
)
def test_the_command_line_refuses_before_it_reads_weights(
    exported_model, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.setattr(UrsaPipeline, "from_pretrained", None)
    options = ["--model", exported_model.directory_uri, "--out", str(tmp_path / "x.mp4")]
    with at_once(), pytest.raises(SystemExit) as stopped:
        main(["generate", "a tree", *options, *arguments])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-frames", "1000000001"], "inference needs .* at once, and h200"),
        (["--height", "100000"], "--height must be at most 8192"),
        (["--prompt-length", "1000000000000"], "inference needs"),
        (["--preset", "tiny", "--set", "tokenization.num_frames=100000001"], "image|video|needs"),
    ],
)
def test_a_plan_says_what_no_machine_can(capsys, arguments, message):
    with at_once(), pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    with pytest.raises(UrsaError, match=message):
        raise UrsaError(error)


def test_the_model_in_mlflow_refuses_too(pipeline):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own, as it is imported
        from tasks import pyfunc_model

    model = pyfunc_model.UrsaModel()
    model._pipeline = pipeline
    for prompts, params, message in (
        (["x"] * 65, {}, "expected at most 64 prompts a call, got 65"),
        (["x", "y" * 20_000], {}, "prompt must have at most 10,000 characters"),
        (["x"], {"num_frames": 10**9 + 1}, "GB in all"),
        (["x"], {"num_inference_steps": 10**9}, "at most 10,000"),
        (["x", None], {}, "prompt 2 of 2 is null or no text"),
        ([float("nan")], {}, "prompt 1 of 1 is null or no text"),
    ):
        with at_once(), pytest.raises(ConfigError, match=message):
            model.predict(None, pd.DataFrame({"prompt": prompts}), params)


def test_the_limits_are_far_from_what_is_asked_for(pipeline):
    """A clip of the largest published size on a machine of 16 GB is not refused by them."""
    from ursa.generation.limits import check_memory
    from ursa.model.size import Clip, qwen3_config

    check_memory(
        qwen3_config("1.7b"),
        Clip((13, 40, 64), 320),
        num_videos=1,
        frame_px=(49, 320, 512),
        is_guided=True,
        bytes_per_value=2,
        device=torch.device("cpu"),
    )
