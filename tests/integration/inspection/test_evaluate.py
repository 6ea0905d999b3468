import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import factories
from ursa import storage
from ursa.artifacts import CheckpointRef, ExportedModel, StageRequest
from ursa.cli import main
from ursa.data.versions import commit_version
from ursa.evaluation.models import ModelMeasurements
from ursa.inspection.root import read_recipe
from ursa.release import export_model
from ursa.training.stage import train_stage


class Trained(NamedTuple):
    root: str
    model: ExportedModel
    checkpoint: CheckpointRef
    changes: list[str]


@pytest.fixture
def trained(root, tmp_path) -> Trained:
    """A model of two steps on a data root with a version."""
    text = factories.write_text_tokenizer(str(tmp_path / "text"))
    visual = read_recipe(root.datasets).visual_tokenizer
    stages = {"max_steps": 2, "checkpoint_every": 1, "validate_every": 2, "global_batch_size": 2}
    config = root.config.model_copy(
        update={"stages": factories.tiny_config({"stages": {"video_pretrain": stages}}).stages}
    )
    request = StageRequest(
        stage="video_pretrain",
        config=config,
        datasets=root.datasets,
        visual_tokenizer=visual,
        text_tokenizer=text,
        init_from=None,
        output_uri=root.uri,
    )
    checkpoint = train_stage(request)
    commit_version(
        root.uri, config, root.selection, (visual, text), root.datasets, code={"ursa": "0"}
    )
    clips = {"num_prompts": 2, "num_windows": 4, "max_train_windows": 8, "fewer_steps": []}
    small = {
        "evaluation.timesteps": [0.0, 0.5],
        "evaluation.max_samples": 8,
        # a directory says itself how it is sampled, of a checkpoint the configuration does
        **{
            f"evaluation.sampling.{name}": value
            for name, value in config.evaluation.sampling.model_dump().items()
        },
        **{f"evaluation.clips.{name}": value for name, value in clips.items()},
        **{f"model.{name}": value for name, value in config.model.model_dump().items()},
        **{f"path.{name}": value for name, value in config.path.model_dump().items()},
    }
    changes = [f"--set={name}={json.dumps(value)}" for name, value in small.items()]
    model = export_model(request, checkpoint, output_uri=root.uri)
    return Trained(root.uri, model, checkpoint, changes)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *arguments])
    return ended.value.code


def test_a_directory_and_its_checkpoint_measure_the_same(trained, tmp_path, capsys, monkeypatch):
    files = [tmp_path / "model.json", tmp_path / "checkpoint.json"]
    first = [trained.model.directory_uri, trained.root, "--out", str(files[0])]
    assert run(*first, *trained.changes) == 0
    printed, said = capsys.readouterr()
    assert "drawing 4 clips from first frames" in said
    assert "motion_adherence" in printed
    assert "nats, lower is better" in printed
    place = storage.local_path(trained.checkpoint.uri)
    monkeypatch.chdir(place.parent)
    second = [place.name, trained.root, "--out", str(files[1])]
    assert run(*second, "--against", str(files[0]), "--quiet", *trained.changes) == 0
    printed, said = capsys.readouterr()
    assert "drawing" not in said
    compared = printed.partition("case by case")[2]
    assert "i2v_later_psnr" in compared
    assert {line.split()[1] for line in compared.splitlines()[1:-1]} == {"+0"}
    one, two = (ModelMeasurements.model_validate_json(path.read_bytes()) for path in files)
    assert one.metrics == two.metrics
    assert one.measurements == two.measurements
    assert (one.model, one.not_measured) == (trained.model.directory_uri, ())
    assert one.metrics["eval/loss"] > 0

    # other noise is another experiment; that is said before anything is measured
    assert run(*second, "--against", str(files[0]), "--set=seed=7", *trained.changes) == 1
    said = capsys.readouterr().err
    assert "drawing" not in said
    assert f"seed is 7 here and {one.conditions['seed']} there; measure both" in said
    unknown = tmp_path / "older.json"
    unknown.write_text(one.model_copy(update={"conditions": {}}).model_dump_json())
    assert run(*second, "--against", str(unknown), *trained.changes) == 1
    assert "visual tokenizer of the data is" in capsys.readouterr().err


def test_losses_over_other_codes_are_left_out(trained, tmp_path, capsys):
    other = tmp_path / "other"
    factories.write_visual_tokenizer(str(tmp_path), seed=5)
    with storage.local_directory(trained.model.directory_uri) as folder:
        shutil.copytree(folder, other)
    for path in (tmp_path / "visual").iterdir():
        shutil.copy(path, other / "vae" / path.name)
    assert run(str(other), trained.root, "--json", *trained.changes) == 0
    output = capsys.readouterr()
    found = ModelMeasurements.model_validate_json(output.out)
    assert found.not_measured[0].startswith("losses and use of codes")
    assert "eval/loss" not in found.metrics
    assert "eval/i2v_later_psnr" in found.metrics


def test_what_cannot_be_read_is_named(trained, tmp_path, capsys):
    def message(*arguments: str) -> str:
        assert run(*arguments) == 1
        return capsys.readouterr().err

    directory = trained.model.directory_uri
    assert "no model at runs/typo/model" in message("runs/typo/model", trained.root)
    assert "--device cuda:99 cannot be used" in message(
        directory, trained.root, "--device", "cuda:99"
    )
    assert "no version 7; --data-version is one of 1" in message(
        directory, trained.root, "--data-version", "7"
    )
    assert "is a directory; give the name of a .json file" in message(
        directory, trained.root, "--out", str(tmp_path)
    )
    assert "holds no measurements" in message(
        directory, trained.root, "--against", str(Path(__file__))
    )
    assert "there is no directory" in message(
        directory, trained.root, "--out", str(tmp_path / "no" / "a.json")
    )
    stray = tmp_path / "step-00000002.abcd"
    stray.mkdir()
    for path in storage.local_path(trained.checkpoint.uri).iterdir():
        (stray / path.name).write_bytes(path.read_bytes())
    assert "does not say of which stage" in message(str(stray), trained.root, *trained.changes)
