"""What stands for what a page names and a test does not have: a bucket, a cluster, eight GPUs.

A block marked `run: stand-ins` is run as it is written, but for the words that its page has here.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from tests import media
from tests.chat_server import running_chat_server
from tests.running_services import free_port
from tests.s3_server import running_s3_server

Prepare = Callable[[Path], contextlib.AbstractContextManager[Mapping[str, str]]]
VIDEOS = ("tree_hand.mp4", "city_night.mp4", "cardboard_box.mp4", "captions.jsonl")
BUCKET, OTHER_BUCKET, TOKEN = "documented", "documented-too", "0" * 64
_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}


def _model(folder: Path) -> str:
    """Return the directory of the newest model of the checkout."""
    models = (folder / ".ursa" / "data" / "models").glob("*/*/model")
    return str(max(models, key=lambda path: path.stat().st_mtime))


def _some_videos(folder: Path, name: str, *, with_captions: bool = True) -> Path:
    videos = folder / name
    videos.mkdir()
    for video in VIDEOS if with_captions else VIDEOS[:-1]:
        shutil.copy2(folder / "tests" / "data" / "videos" / video, videos)
    return videos


@contextlib.contextmanager
def _readme(folder: Path) -> Iterator[dict[str, str]]:
    videos = _some_videos(folder, "videos-of-a-reader")
    yield {
        "/path/to/videos": str(videos),
        "/path/to/URSA-1.7B-FSQ320": _model(folder),
        '"cuda"': '"cpu"',
        "height=320": "height=56",
        "width=512": "width=96",
        "num_frames=49": "num_frames=9",
        "num_inference_steps=50": "num_inference_steps=4",
    }


@contextlib.contextmanager
def _evaluation(folder: Path) -> Iterator[dict[str, str]]:
    stage = folder / ".ursa" / "data" / "checkpoints" / "video_pretrain"
    checkpoint = sorted(stage.glob("*/step-*/COMMITTED.json"))[-1].parent
    prompts = folder / "dpg_bench" / "prompts"
    images = folder / "data" / "crop" / "16-9"
    for made in (prompts, images, folder / "results"):
        made.mkdir(parents=True)
    (folder / "all_dimension.txt").write_text("a bird on a branch\n")
    asked = [{"prompt_en": "a boat, camera pans left", "image_name": "a boat.jpg"}]
    (folder / "vbench2_i2v_full_info.json").write_text(json.dumps(asked))
    Image.fromarray(media.still(1, height=54, width=96)[0]).save(images / "a boat.jpg")
    line = {"tag": "single_object", "prompt": "a photo of a bird"}
    (folder / "evaluation_metadata.jsonl").write_text(f"{json.dumps(line)}\n")
    (prompts / "12.txt").write_text("A long and dense prompt.\n")
    # what the benchmarks would have written
    scores = np.linspace(0.5, 0.9, 20)
    videos = [
        {"video_path": f"vbench/samples/bird {n // 5}-{n % 5}.mp4", "video_results": score}
        for n, score in enumerate(scores)
    ]
    smooth = {"motion_smoothness": [float(scores.mean()), videos]}
    (folder / "results" / "ursa_eval_results.json").write_text(json.dumps(smooth))
    rows = [
        {
            "filename": f"geneval/samples/00000/samples/{number:04d}.png",
            "tag": line["tag"],
            "correct": number < 2,
            "metadata": json.dumps(line),
        }
        for number in range(4)
    ]
    (folder / "results.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "dpg.txt").write_text("dpg/samples/12.png, 0.5, 1.0, 0.75\nDPG-Bench score: 75.0\n")
    yield {
        ".ursa/data/checkpoints/video_pretrain/<fingerprint>/step-00000200.<nonce>": str(
            checkpoint.relative_to(folder)
        ),
        "--device cuda": "--device cpu",
        "--height 512 --width 512": "--height 64 --width 64",
        "results/<name>_eval_results.json": "results/ursa_eval_results.json",
    }


@contextlib.contextmanager
def _lora(folder: Path) -> Iterator[dict[str, str]]:
    model = _model(folder)
    videos = _some_videos(folder, "videos-for-lora")
    yield {
        "source_uri=my/videos": f"source_uri={videos}",
        "preset=small": "preset=tiny",  # the network of the registered model
        # the champion at this place of the tests is of another network
        "models:/ursa@champion": model,
        "MODEL/": f"{model}/",
        # of the model that was just trained, on the one before it
        "merge adapter": "merge $(dirname $(ls -t .ursa/data/models/*/*/model/adapter/*.json"
        " | head -n 1))",
    }


@contextlib.contextmanager
def _s3(folder: Path) -> Iterator[dict[str, str]]:
    with running_s3_server(BUCKET) as address:
        _upload(folder, address, BUCKET)
        keys = " ".join(f"{name}={value}" for name, value in _KEYS.items())
        yield {
            "AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=...": keys,
            "http://127.0.0.1:9000": address,
            "my-bucket": BUCKET,
            # the block after it is for the same terminal
            "ursa data verify": f"{keys} AWS_ENDPOINT_URL={address} .venv/bin/ursa data verify",
        }


def _upload(folder: Path, address: str, bucket: str) -> None:
    from s3fs import S3FileSystem

    store = S3FileSystem(key="test", secret="test", endpoint_url=address, skip_instance_cache=True)
    for name in VIDEOS:
        store.put_file(str(folder / "tests" / "data" / "videos" / name), f"{bucket}/videos/{name}")


@contextlib.contextmanager
def _ray_cluster(folder: Path) -> Iterator[dict[str, str]]:
    port = free_port()
    (folder / "ray-token").write_text(TOKEN)
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with running_s3_server(OTHER_BUCKET) as address:
        _upload(folder, address, OTHER_BUCKET)
        keys = {**_KEYS, "AWS_ENDPOINT_URL": address}
        begin = (f"--port={port}", "--num-cpus=3", "--include-dashboard=false", "--block")
        head = subprocess.Popen(
            [*ray, "start", "--head", "--disable-usage-stats", *begin],
            env=_inherited() | environment | keys | {"PYTHONPATH": str(folder)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield {
                "ray-head:6379": f"127.0.0.1:{port}",
                "my-bucket": OTHER_BUCKET,
                "URSA_NUM_WORKERS=16": "URSA_NUM_WORKERS=2",
                "make run": f"{' '.join(f'{k}={v}' for k, v in keys.items())} make run",
            }
        finally:
            head.terminate()
            head.wait(60)


def _inherited() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}


@contextlib.contextmanager
def _eight_gpus(_folder: Path) -> Iterator[dict[str, str]]:
    yield {
        "URSA_NUM_TRAIN_WORKERS=8 URSA_GPUS_PER_TRAIN_WORKER=1": "URSA_NUM_TRAIN_WORKERS=2 "
        "URSA_CPUS_PER_TRAIN_WORKER=1",
        "URSA_COMPILE_LAYERS=1": "URSA_COMPILE_LAYERS=0",
        "URSA_NUM_WORKERS=8 URSA_GPUS_PER_WORKER=1 URSA_DECODERS_PER_WORKER=8": "URSA_NUM_WORKERS=2"
        " URSA_DECODERS_PER_WORKER=1",
    }


@contextlib.contextmanager
def _annotation(folder: Path) -> Iterator[dict[str, str]]:
    with running_chat_server() as chat:
        key = "URSA_CAPTIONER_API_KEY="
        videos = _some_videos(folder, "videos-without-captions", with_captions=False)
        yield {
            f"{key}...": key,
            "preset=tiny": f"preset=tiny --param source_uri={videos}",
            "http://127.0.0.1:8000/v1": chat.url,
        }
        assert chat.requests, "the captioner was not asked"


@contextlib.contextmanager
def _visual_tokenizer(folder: Path) -> Iterator[dict[str, str]]:
    yield {"/models/my-tokenizer": f"{_model(folder)}/vae"}


@contextlib.contextmanager
def _secure(_folder: Path) -> Iterator[dict[str, str]]:
    # whether something is wrong is a matter of the machine
    yield {"ursa doctor --security": "ursa doctor --security || test $? = 1"}


STAND_INS: Mapping[str, Prepare] = {
    "README.md": _readme,
    "docs/annotation.md": _annotation,
    "docs/evaluation.md": _evaluation,
    "docs/how-to/add-a-visual-tokenizer.md": _visual_tokenizer,
    "docs/how-to/eight-gpus.md": _eight_gpus,
    "docs/how-to/ray-cluster.md": _ray_cluster,
    "docs/how-to/s3.md": _s3,
    "docs/how-to/secure-a-deployment.md": _secure,
    "docs/lora.md": _lora,
}
