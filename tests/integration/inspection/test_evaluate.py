import json
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import factories
from ursa import storage
from ursa.artifacts import CheckpointRef, ExportedModel, StageRequest
from ursa.cli import main
from ursa.data.clips import FAILURE_SCHEMA, put_table, read_clips
from ursa.data.versions import commit_version
from ursa.evaluation.models import SETTINGS, ModelMeasurements
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
    assert f"seed is 7 here and {one.conditions['seed']} there; measure" in said


OTHERWISE = {
    "seed": 7,
    "evaluation.timesteps": [0.5],
    "evaluation.max_samples": 4,
    "evaluation.clips.num_prompts": 1,
    "evaluation.clips.seeds_per_prompt": 3,
    "evaluation.clips.num_windows": 2,
    "evaluation.clips.max_train_windows": 4,
    "evaluation.clips.asked_motion": [1.0, 64.0],
}


def test_what_was_measured_otherwise_is_refused_with_what_to_do(trained, tmp_path, capsys):
    """Of the whole file: with other settings parts of it vanished, or meant other things."""
    file = tmp_path / "champion.json"
    own = [trained.model.directory_uri, trained.root, "--quiet", *trained.changes]
    assert run(*own, "--out", str(file)) == 0
    printed, said = capsys.readouterr()
    assert set(SETTINGS) == set(OTHERWISE)
    for name, value in OTHERWISE.items():
        assert run(*own, "--against", str(file), f"--set={name}={json.dumps(value)}") == 1
        printed, said = capsys.readouterr()
        assert not printed  # nothing was measured
        there = ModelMeasurements.model_validate_json(file.read_bytes()).conditions[name]
        assert (
            f"{name} is {json.dumps(value, separators=(',', ':'))} here and {there} there" in said
        )
    options = shlex.split(said.rpartition("or give ")[2].rpartition(" here")[0])
    assert options == ["--set", f"evaluation.clips.asked_motion={there}"]
    assert run(*own, "--against", str(file), *options) == 0
    said = capsys.readouterr().err
    uncompared = "train_code_usage, train_code_perplexity, t2v_frechet_statistics"
    assert said == f"not compared: {uncompared} (no means over cases)\n"

    # files of older releases do not say what they are of
    known = ModelMeasurements.model_validate_json(file.read_bytes())
    file.write_text(known.model_copy(update={"conditions": {}}).model_dump_json())
    assert run(*own, "--against", str(file)) == 1
    said = capsys.readouterr().err
    assert "data is version 1 (" in said
    assert "evaluation.clips.num_windows is 4 here and unknown there" in said
    assert "measure that model on version 1 with the settings of this call" in said
    assert "or give" not in said


def test_versions_of_the_data_are_not_compared_with_each_other(trained, root, tmp_path, capsys):
    """The same model, with one more training clip: t2v_energy_distance seemed 5 lower."""
    recipe = read_recipe(root.datasets)
    tokenizers = (recipe.visual_tokenizer, factories.write_text_tokenizer(str(tmp_path / "other")))
    clips = sorted(read_clips(root.selection.clips), key=lambda clip: clip.clip_id)
    clips = [clip.model_copy(update={"caption": "a square moves"}) for clip in clips]
    for some in (clips[1:], clips):
        folder = str(tmp_path / str(len(some)))
        put_table(folder, "failures", FAILURE_SCHEMA, [])
        made = factories.commit_selection(folder, some, num_validation=1)
        named = made.clips.model_copy(update={"source_uri": "s3://bucket/videos"})
        selection = made.model_copy(update={"clips": named})
        commit_version(root.uri, root.config, selection, tokenizers, root.datasets, code={})
    file = tmp_path / "champion.json"
    place = [trained.model.directory_uri, trained.root, "--source", "s3://bucket/videos"]
    own = [*place, "--quiet", *trained.changes]
    assert run(*own, "--data-version", "1", "--out", str(file)) == 0
    capsys.readouterr()
    assert run(*own, "--against", str(file)) == 1
    printed, said = capsys.readouterr()
    assert not printed
    assert "data is version 2 (" in said
    assert "measure that model on version 2 with the settings of this call" in said
    assert said.rstrip().endswith("or give --data-version 1 here")
    assert run(*own, "--against", str(file), "--data-version", "1") == 0
    assert "case by case" in capsys.readouterr().out
    assert run(*own, "--against", str(file), "--data-version", "1", "--json") == 0
    compared = json.loads(capsys.readouterr().out)["against"]
    assert compared["model"] == trained.model.directory_uri
    assert {row["value"] for row in compared["differences"]} == {0.0}
    assert compared["not_compared"]


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
    assert found.not_measured[0].startswith("losses, token accuracies and use of codes")
    assert "eval/loss" not in found.metrics
    assert "eval/i2v_later_token_accuracy" not in found.metrics
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
