"""Real models on the same held-out samples and noise."""

import contextlib
from pathlib import Path

import pytest
import torch

from tests import factories
from tests.damage import noisy_model
from ursa import storage
from ursa.comparison import Champion, ScoresPlace, compare_with, measure
from ursa.gate import failed_gates
from ursa.generation import UrsaPipeline
from ursa.release import export_model
from ursa.training.stage import train_stage
from ursa.training.validation import settings_of

CHANGES = {"evaluation": {"max_samples": 12}}
CONFIG = factories.tiny_config(CHANGES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return factories.write_tiny_data(str(tmp_path_factory.mktemp("data")), num_validation=12)


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    output_uri = str(tmp_path_factory.mktemp("model"))
    request = factories.stage_request(
        data, "video_pretrain", output_uri, max_steps=40, config=CHANGES
    )
    return export_model(request, train_stage(request), output_uri=output_uri)


@pytest.fixture
def opened():
    """Directories that were asked for."""
    return []


def champion_of(model, opened, *, tokens_uris=(None,)):
    @contextlib.contextmanager
    def open_directory():
        opened.append(model.directory_uri)
        yield Path(model.directory_uri)

    return Champion("3", model.content_key, tokens_uris, open_directory)


def scored(place):
    pipeline = UrsaPipeline.from_pretrained(place.model.directory_uri)
    held_out = place.held_out()
    grids = tuple(
        measure(pipeline, held_out, CONFIG, setting=setting) for setting in settings_of(held_out)
    )
    return pipeline, place.commit(place.model.content_key, grids)


def test_a_damaged_model_is_refused_and_the_champion_measured_once(model, data, opened, tmp_path):
    damaged = noisy_model(model, tmp_path / "damaged", scale=0.3)
    place = ScoresPlace(damaged, data.datasets, CONFIG, str(tmp_path))
    pipeline, scores = scored(place)
    champion = champion_of(model, opened)
    comparison = compare_with(champion, pipeline, scores, place)
    assert (comparison.problem, comparison.unit, comparison.num_samples) == (None, "span", 12)
    loss = next(change for change in comparison.changes if change.metric == "loss")
    assert loss.low > CONFIG.release.budgets["loss"]
    metrics = {f"eval/loss_t{t:g}": 0.0 for t in CONFIG.evaluation.timesteps}
    metrics |= {f"eval/untrained_loss_t{t:g}": 1.0 for t in CONFIG.evaluation.timesteps}
    reasons = failed_gates(
        metrics | {"eval/loss": 0.0, "eval/unigram_loss": 1.0}, comparison, CONFIG
    )
    assert any(reason.startswith("loss is worse than that of champion") for reason in reasons)
    assert compare_with(champion, pipeline, scores, place) == comparison
    assert opened == [model.directory_uri]  # what it does there is on record
    stored = storage.local_path(place.uri(champion.model_key))
    stored.write_bytes(stored.read_bytes()[:-20])
    assert compare_with(champion, pipeline, scores, place) == comparison
    assert len(opened) == 2  # a damaged record is none


def test_a_copy_differs_by_exactly_nothing(model, data, opened, tmp_path):
    copy = noisy_model(model, tmp_path / "copy", scale=0.0)
    place = ScoresPlace(copy, data.datasets, CONFIG, str(tmp_path))
    pipeline, scores = scored(place)
    # another key, as if its files differed in what changes nothing
    comparison = compare_with(
        champion_of(model, opened)._replace(model_key="other"), pipeline, scores, place
    )
    assert opened
    assert len(comparison.changes) == 6
    assert {(change.difference, change.low, change.high) for change in comparison.changes} == {
        (0.0, 0.0, 0.0)
    }


def test_other_codes_are_not_compared(model, data, opened, tmp_path):
    other = noisy_model(model, tmp_path / "other", scale=0.01, part="vae")
    place = ScoresPlace(model, data.datasets, CONFIG, str(tmp_path))
    pipeline, scores = scored(place)
    comparison = compare_with(champion_of(other, opened), pipeline, scores, place)
    assert "visual tokenizer is another" in (comparison.problem or "")
    assert comparison.changes == ()


def test_a_champion_that_knows_the_samples_is_not_compared(model, data, opened, tmp_path):
    """In these data the held-out sources are those of training."""
    uri = str(tmp_path / "tokens.json")
    storage.commit_record(uri, data.datasets)
    place = ScoresPlace(model, data.datasets, CONFIG, str(tmp_path))
    pipeline, scores = scored(place)
    champion = champion_of(model, opened, tokens_uris=(uri,))
    comparison = compare_with(champion, pipeline, scores, place)
    assert "trained on all 4 sources" in (comparison.problem or "")
    assert comparison.refuses
    gone = champion._replace(tokens_uris=(str(tmp_path / "gone.json"), uri))
    assert compare_with(gone, pipeline, scores, place).num_known_sources is None


def test_a_champion_of_others_is_not_compared(model, data, opened, tmp_path):
    place = ScoresPlace(model, data.datasets, CONFIG, str(tmp_path))
    pipeline, scores = scored(place)
    foreign = champion_of(model, opened)._replace(model_key=None)
    comparison = compare_with(foreign, pipeline, scores, place)
    assert comparison.problem == "it was not registered by this pipeline"
    assert not comparison.refuses  # `release.require_comparison` decides
    assert opened == []


def test_a_champion_that_cannot_be_read_is_named(model, data, opened, tmp_path):
    broken = noisy_model(model, tmp_path / "broken", scale=0.1)
    (Path(broken.directory_uri) / "transformer" / "config.json").write_text("{}")
    place = ScoresPlace(model, data.datasets, CONFIG, str(tmp_path))
    pipeline, scores = scored(place)
    comparison = compare_with(champion_of(broken, opened), pipeline, scores, place)
    assert "it cannot be read" in (comparison.problem or "")
    assert not comparison.refuses


def test_losses_that_are_not_finite_are_not_stored(model, data, opened, tmp_path):
    damaged = noisy_model(model, tmp_path / "nan", scale=float("nan"))
    place = ScoresPlace(damaged, data.datasets, CONFIG, str(tmp_path))
    pipeline, scores = scored(place)
    assert scores is None
    assert torch.isnan(pipeline.transformer.lm_head.weight).any()
    comparison = compare_with(champion_of(model, opened), pipeline, scores, place)
    assert comparison.problem == "there is no finite held-out loss"
