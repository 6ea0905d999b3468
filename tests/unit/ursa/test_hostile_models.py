"""Files of a model that somebody else has made: what would run code is refused and never runs."""

import ast
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import factories
from tests.running_services import ROOT
from ursa import storage
from ursa.artifacts import ShardInfo
from ursa.data.shards import read_shard, shard_bytes
from ursa.errors import CheckpointError, ConfigError, ShardFormatError, UrsaError
from ursa.generation import UrsaPipeline
from ursa.sources.listing import discover_videos
from ursa.training.checkpoint import MARKER_FILE, STATE_FILE, CheckpointMarker, load_checkpoint

CODES = factories.CODEBOOK_SIZE


class Canary:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def canary(tmp_path):
    """The bytes of a pickle that leaves a trace when it is read; there must be none at the end."""
    trace = tmp_path / "trace"
    yield pickle.dumps(Canary(trace), protocol=2)  # as torch writes
    assert not trace.exists(), "a pickle was run"


@pytest.fixture
def model(exported_model, tmp_path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(exported_model.directory_uri, folder)
    return folder


def test_the_canary_sings(tmp_path):
    """Else the tests below say nothing."""
    pickle.loads(pickle.dumps(Canary(tmp_path / "trace")))
    assert (tmp_path / "trace").is_dir()


@pytest.mark.parametrize(
    "name",
    [
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_model.pth",
        "tokenizer/tokenizer.json",
        "transformer/config.json",
        "model_index.json",
    ],
)
def test_a_pickle_in_the_place_of_a_file_of_a_model(model, canary, name):
    path = model / name
    path.write_bytes(canary)
    with pytest.raises(UrsaError):
        UrsaPipeline.from_pretrained(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.bin"])
def test_weights_that_are_a_pickle_are_not_read(model, canary, name):
    (model / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (model / "transformer" / name).write_bytes(canary)
    with pytest.raises(ConfigError, match="safetensors"):
        UrsaPipeline.from_pretrained(model)


def test_a_checkpoint_that_is_a_pickle_with_the_right_hash(tmp_path, canary):
    (tmp_path / STATE_FILE).write_bytes(canary)
    marker = CheckpointMarker(
        step=1,
        num_samples_seen=1,
        state_sha256=hashlib.sha256(canary).hexdigest(),
        fingerprint="f",
        metrics={},
    )
    storage.commit_record(str(tmp_path / MARKER_FILE), marker)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(str(tmp_path))


@pytest.mark.parametrize("claimed", [2**62, 10**9, 0])
def test_weights_with_an_absurd_header(model, claimed):
    header = struct.pack("<Q", claimed) + b'{"a": {"dtype": "F32", "shape": [1'
    (model / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(header)
    began = time.monotonic()
    with pytest.raises(ConfigError):
        UrsaPipeline.from_pretrained(model)
    assert time.monotonic() - began < 1


EXTENSIONS = ("arrow.py_extension_type", "ray.data.arrow_tensor", "ray.data.arrow_tensor_v2")


def with_extension(table: pa.Table, column: str, name: str, payload: bytes) -> bytes:
    """Parquet whose column says that it is of a type that a pickle describes."""
    metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": payload}
    place = table.schema.get_field_index(column)
    field = table.schema.field(place).with_metadata(metadata)
    buffer = io.BytesIO()
    pq.write_table(table.cast(table.schema.set(place, field)), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", EXTENSIONS)
def test_a_shard_with_a_pickled_type(tmp_path, canary, name):
    rows = factories.token_rows("video", 2)
    table = pq.read_table(pa.BufferReader(shard_bytes(rows, codebook_size=CODES)))
    data = with_extension(table, "caption", name, canary)
    path = tmp_path / "shard.parquet"
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    shard = ShardInfo(uri=str(path), num_samples=2, num_bytes=len(data), sha256=digest)
    with pytest.raises(ShardFormatError, match="caption"):
        read_shard(shard, codebook_size=CODES)


@pytest.mark.parametrize("name", EXTENSIONS)
def test_a_manifest_with_a_pickled_type(tmp_path, canary, name):
    folder = tmp_path / "source"
    folder.mkdir()
    table = pa.table({"path": ["a.mp4"], "caption": ["a pond"]})
    (folder / "list.parquet").write_bytes(with_extension(table, "caption", name, canary))
    (folder / "a.mp4").write_bytes(b"no video")
    try:
        found = discover_videos(str(folder / "list.parquet"))
    except UrsaError:
        return
    assert [Path(each.uri).name for each in found] == ["a.mp4"]


FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
FORBIDDEN_CALLS |= {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"}
KEYWORDS = {"shell": False, "trust_remote_code": False, "allow_pickle": False, "weights_only": True}
"""What an argument of this name must be."""


def findings(path: Path) -> list[str]:
    """Return what a file calls or imports that could run what somebody else wrote."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # the class of its errors runs nothing
            wanted = {alias.name for alias in node.names} - {"UnpicklingError"}
            names = [node.module or ""] if wanted else []
        found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: word.value for word in node.keywords}
        if name in FORBIDDEN_CALLS:
            found.append(f"{name}()")
        if name == "torch.load" and "weights_only" not in given:
            found.append("torch.load() without weights_only")
        for word, wanted in KEYWORDS.items():
            value = given.get(word)
            if value is not None and not (
                isinstance(value, ast.Constant) and value.value is wanted
            ):
                found.append(f"{name}({word}={ast.unparse(value)})")
    return [f"{path.name}:{each}" for each in found]


def test_nothing_in_the_code_runs_what_a_file_says(tmp_path):
    folders = ("ursa", "tasks", "flows", "infra")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 150
    assert [each for path in files for each in findings(path)] == []
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import pickle\nimport torch, yaml\neval('1')\ntorch.load('x')\nyaml.load('x')\n"
        "run('x', shell=True)\ntorch.load('x', weights_only=flag)\n"
    )
    assert len(findings(bad)) == 6
    assert json.dumps(findings(bad))
