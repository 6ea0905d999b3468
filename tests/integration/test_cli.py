import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests import media
from ursa.config import load_config
from ursa.video.decode import video_info

URSA = [sys.executable, "-c", "from ursa.cli import main; main()"]


def ursa(*arguments, **options):
    command = [*URSA, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def model(exported_model):
    return exported_model.directory_uri


@pytest.mark.parametrize("command", ["", "'generate', ", "'data', ", "'schedule', "])
def test_help_is_quick_and_loads_no_torch(command):
    code = (
        f"import sys; from ursa.cli import app; app([{command}'--help'], exit_on_error=False,"
        " result_action='return_value');"
        " print([name for name in ('torch', 'mlflow', 'prefect') if name in sys.modules])"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]")
    shown = {"'data', ": "what-if", "'schedule', ": "off"}.get(command, "generate")
    assert shown in done.stdout
    # half a second on an idle machine; other tests may be beside it
    assert min(seconds) < 0.8


@pytest.mark.slow
def test_a_schedule_is_fitted_and_drawn_and_a_models_is_shown(model, tmp_path):
    drawn = tmp_path / "schedule.png"
    done = ursa("path", "fit", "--levels", "5,4,3", "--out", drawn)
    assert done.returncode == 0, done.stderr
    assert "codes      60" in done.stdout
    assert "table      129 knots" in done.stdout
    assert Image.open(drawn).size[0] > 500
    done = ursa("path", "show", "--model", model)
    assert done.returncode == 0, done.stderr
    assert "alpha 1.0, c 5.0" in done.stdout
    assert "euclidean  off the straight line" in done.stdout
    for arguments, message in (
        ((), "give --levels or --tokenizer"),
        (("--levels", "8,x"), "got 8,x"),
        (("--levels", "8,1"), "at least 2 each"),
        (("--levels", "5,4", "--out", tmp_path / "a.jpg"), "must be a .png"),
        (("--tokenizer", tmp_path), "config.json"),
    ):
        done = ursa("path", "fit", *arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_plan_needs_no_torch():
    code = (
        "import sys; from ursa.cli import app;"
        " app(['plan'], exit_on_error=False, result_action='return_value');"
        " print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1,982,172,160" in done.stdout
    assert "33,280 visual (13 x 40 x 64)" in done.stdout
    assert done.stdout.strip().endswith("False")


def test_plan_of_a_size_a_preset_and_a_model(model):
    done = ursa("plan", "--size", "0.6b", "--num-frames", 1, "--guidance", 1, "--json")
    assert done.returncode == 0, done.stderr
    image = json.loads(done.stdout)
    assert (image["network"], image["num_visual_tokens"]) == ("0.6b", 40 * 64)
    assert image["num_sequences"] == 24  # the first of 25 steps moves nothing
    assert image["logits_bytes"] == 2 * 4 * 2**23
    preset = json.loads(ursa("plan", "--preset", "tiny", "--json").stdout)
    settings = load_config("tiny")
    assert preset["num_tokens"] == 3 * 7 * 12 + 1 + settings.text_tokenizer.max_prompt_length
    of_model = json.loads(ursa("plan", "--model", model, "--json", "--dtype", "float32").stdout)
    assert of_model["latent_shape"] == [2, 2, 3]
    assert of_model["num_tokens"] == 2 * 2 * 3 + 1 + 6
    weights = Path(model) / "transformer" / "diffusion_pytorch_model.safetensors"
    assert of_model["weight_bytes"] == sum(v.nbytes for v in load_file(weights).values())
    assert "ursa plan --size 1.7b --num-frames 49" in ursa("plan", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "4b", "--preset", "tiny"), "give one of --model, --size and --preset"),
        (
            ("--height", 100_000),
            "--height must be at most 8192, the longest side of an H.264 video, got 100000",
        ),
        (
            ("--workers", 2),
            "--set, --stage, --workers, --gpu, --memory, --flops, --utilisation, --strategy, "
            "--activation-checkpointing and --data are for training; name a preset with --preset",
        ),
        (("--preset", "tiny", "--memory", 0), "--memory must be positive and finite, got 0"),
        (("--num-frames", 50), "--num-frames must be 1 + 4k, got 50; the nearest are 49 and 53"),
        (("--steps", 0), "--steps must be at least 1, got 0"),
        (("--model", "nowhere"), "no transformer at nowhere: config.json is missing"),
    ],
)
def test_a_plan_that_cannot_be_made(arguments, message):
    done = ursa("plan", *arguments)
    assert done.returncode == 1
    assert done.stderr == f"error: {message}\n"


def test_plan_of_a_training():
    options = ("--preset", "small", "--set", "model.num_layers=8", "--stage", "video_pretrain")
    done = ursa("plan", *options, "--gpu", "h100", "--workers", 2, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (stage,) = found["stages"]
    assert (stage["stage"], stage["samples_per_step"], stage["micro_batch"]) == (
        "video_pretrain",
        8,
        4,
    )
    assert stage["num_parameters"] == found["num_parameters"]
    assert stage["step_s"] > 0
    assert "67 TFLOP/s in float32 x 0.4 assumed" in stage["rate"]
    table = ursa("plan", *options)
    assert "video_pretrain" in table.stdout
    assert "step time: not known" in table.stdout


def test_a_training_that_does_not_fit_is_an_error():
    done = ursa("plan", "--preset", "small", "--memory", 0.7, "--json")
    assert done.returncode == 1
    problems = json.loads(done.stdout)["problems"]
    assert done.stderr == f"error: {'; '.join(problems)}\n"
    assert "image_pretrain: a worker needs" in problems[0]
    assert "gradient_accumulation_steps=" in problems[0]


def test_a_plan_measures_this_machine():
    done = ursa("plan", "--preset", "tiny", "--gpu", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all("measured here" in stage["rate"] for stage in found["stages"])
    assert all(0 < stage["step_s"] < 60 for stage in found["stages"])


def test_version_is_printed():
    from ursa import __version__

    assert ursa("--version").stdout.strip() == __version__


def test_clips_are_written_and_repeatable(model, tmp_path):
    for name in ("a.mp4", "b.mp4", "c.gif", "d.png"):
        done = ursa("generate", "a tree", "--model", model, "--seed", 3, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert "seed 3" in done.stdout
    info = video_info(tmp_path / "a.mp4")
    assert (info.num_frames, info.width_px, info.height_px, info.fps) == (5, 24, 16, 8.0)
    assert info.codec == "h264"
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with Image.open(tmp_path / "c.gif") as picture:
        assert (picture.n_frames, picture.size) == (5, (24, 16))
    with Image.open(tmp_path / "d.png") as picture:
        assert (getattr(picture, "n_frames", 1), picture.size) == (1, (24, 16))


def test_a_given_first_frame_and_quiet(model, tmp_path):
    Image.fromarray(media.texture(32, 48)).save(tmp_path / "first.png")
    out = tmp_path / "x.png"
    done = ursa(
        *("generate", "a tree", "--model", model, "--image", tmp_path / "first.png"),
        *("--out", out, "--num-frames", 5, "--steps", 2, "--guidance", 1, "-q"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    assert np.asarray(Image.open(out)).shape == (16, 24, 3)


@pytest.mark.slow
def test_frames_that_are_given(model, tmp_path):
    for number in (1, 2):
        picture = media.texture(32, 48, seed=number, grain=4.0)
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    given = media.panning(30, step=2, height=72)
    media.save_video(tmp_path / "given.mp4", given, 24.0)
    first, last, video = (tmp_path / name for name in ("1.png", "2.png", "given.mp4"))
    for name, options, num_frames in (
        ("between", ("--image", first, "--last-image", last), 5),
        ("long", ("--image", first, "--num-frames", 13, "--window", 9), 13),
        ("on", ("--video", video, "--num-frames", 9, "--given-frames", 5), 9),
        ("noised", ("--video", video, "--num-frames", 9, "--noise", 0.2), 9),
        ("whole", ("--video", video, "--num-frames", 9, "--given-frames", 9, "--noise", 0.5), 9),
    ):
        out = tmp_path / f"{name}.mp4"
        done = ursa("generate", "a tree", "--model", model, "--seed", 1, "--out", out, *options)
        assert done.returncode == 0, done.stderr
        assert video_info(out).num_frames == num_frames
    mistake = ursa("generate", "a", "--model", model, "--video", first, cwd=tmp_path)
    assert mistake.returncode == 1
    assert "does not give" in mistake.stderr
    none = ["--video", video, "--num-frames", 9, "--given-frames", 9]
    left = ursa("generate", "a", "--model", model, *none, cwd=tmp_path)
    assert left.returncode == 1
    assert "--given-frames 9 leaves none of 9 frames to make" in left.stderr
    both = ursa("generate", "a", "--model", model, "--video", video, "--image", first, cwd=tmp_path)
    assert both.returncode == 1
    assert "leave one out" in both.stderr


def test_a_mistake_is_one_line_and_exit_status_1(model, tmp_path):
    environment = {"PYTHONPATH": str(Path.cwd()), "PATH": "/usr/bin"}
    options = ["--model", model, "--steps", 0]
    done = ursa("generate", "a tree", *options, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (1, "error: --steps must be at least 1; got 0\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_URI", "URSA_MLFLOW_PORT"])
def test_a_registry_that_is_down_is_named_at_once(tmp_path, variable):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # held, but nobody listens
        port = str(listener.getsockname()[1])
        value = port if variable == "URSA_MLFLOW_PORT" else f"http://127.0.0.1:{port}"
        environment = {"PYTHONPATH": str(Path.cwd()), "PATH": "/usr/bin", variable: value}
        started = time.perf_counter()
        done = ursa(
            "generate", "a", "--model", "models:/ursa@champion", cwd=tmp_path, env=environment
        )
    assert time.perf_counter() - started < 60
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: no MLflow server answers at http://127.0.0.1:{port} (")
    assert "`make up`" in line
    assert list(tmp_path.iterdir()) == []


def test_mistyped_option_is_refused(model):
    done = ursa("generate", "a tree", "--model", model, "--guidence", 2)
    assert done.returncode != 0
    assert "--guidence" in done.stdout + done.stderr


def test_configuration_is_printed_as_it_is_read():
    done = ursa("config", "tiny")
    assert yaml.safe_load(done.stdout) == load_config("tiny").model_dump(mode="json")
    assert "one of tiny, small" in ursa("config", "huge").stderr
