"""The schedule of a run, from its codebook to the exported model and back."""

import json

import pytest
import torch

from tests import factories
from ursa import storage
from ursa.diffusion.grid import GridCodebook
from ursa.diffusion.product import ProductCodebook
from ursa.diffusion.schedule import PowerSchedule, TabulatedSchedule
from ursa.errors import ConfigError
from ursa.generation import SchedulerConfig, UrsaPipeline
from ursa.release import export_model
from ursa.training.schedule import (
    PICTURE,
    FittedSchedule,
    build_path,
    fit_path,
    scheduler_config,
)
from ursa.training.stage import train_stage

TIMES = torch.linspace(0, 0.99, 50, dtype=torch.float64)


def fitted(request):
    return fit_path(
        request.config.path,
        request.visual_tokenizer,
        request.datasets,
        output_uri=request.output_uri,
    )


def test_a_fit_is_committed_once_with_its_picture(make_request):
    request = make_request(config={"path": {"schedule": "fitted"}})
    first = fitted(request)
    files = storage.list_files(storage.join(request.output_uri, "schedules"))
    assert fitted(request) == first
    assert storage.list_files(storage.join(request.output_uri, "schedules")) == files
    picture = storage.read_bytes(storage.join(first.folder_uri, PICTURE))
    assert picture.startswith(b"\x89PNG")
    fit = first.fitted
    assert fit.table_deviation < 1e-4 < fit.power_deviation
    assert fit.num_codes == fit.num_rows == factories.CODEBOOK_SIZE
    assert fit.collisions == GridCodebook((5, 4, 3)).collisions()
    assert fit.power_pearson < -0.99


def test_the_table_is_taken_where_no_power_is_straight_enough(make_request):
    loose = make_request(config={"path": {"schedule": "fitted", "max_deviation": 1.0}})
    strict = make_request(config={"path": {"schedule": "fitted", "max_deviation": 0.0}})
    assert isinstance(build_path(loose).schedule, PowerSchedule)
    assert isinstance(build_path(strict).schedule, TabulatedSchedule)
    assert fitted(loose).folder_uri != fitted(strict).folder_uri
    scheduler = scheduler_config(loose, shift=2.0)
    # the official layout is kept where it suffices
    assert scheduler.model_dump(exclude=scheduler.unused_fields()).keys() == {
        "alpha",
        "c",
        "shift",
        "eps",
    }
    always = loose.config.path.model_copy(update={"schedule": "tabulated"})
    assert FittedSchedule.of(GridCodebook((5, 4, 3)), always).kind == "table"


def test_what_falls_and_what_counts_make_other_schedules(make_request):
    betas = []
    for changes in ({}, {"distance": "euclidean"}, {"weights": "frequency"}, {"metric": "product"}):
        request = make_request(config={"path": {"schedule": "tabulated", **changes}})
        path = build_path(request)
        kind = ProductCodebook if changes.get("metric") == "product" else GridCodebook
        assert isinstance(path.codebook, kind)
        betas.append(path.beta(TIMES))
    for index, one in enumerate(betas):
        for other in betas[index + 1 :]:
            assert (one / other)[1:].log().abs().max() > 1e-3


def test_the_product_path_has_no_euclidean_distance(make_request):
    path = {"schedule": "fitted", "metric": "product", "distance": "euclidean"}
    with pytest.raises(ConfigError, match="squared distances alone"):
        build_path(make_request(config={"path": path}))


@pytest.mark.parametrize("metric", ["normalized", "product"])
def test_a_model_brings_its_schedule(make_request, tmp_path, metric):
    request = make_request(
        config={"path": {"schedule": "tabulated", "metric": metric}}, max_steps=2
    )
    path = build_path(request)
    model = export_model(request, train_stage(request), output_uri=request.output_uri)
    again = UrsaPipeline.from_pretrained(model.directory_uri)
    assert torch.equal(again.path.beta(TIMES), path.beta(TIMES))
    assert type(again.path.codebook) is type(path.codebook)
    ids = torch.arange(factories.CODEBOOK_SIZE)
    assert torch.equal(again.path.probs(ids, 0.4), path.probs(ids, 0.4))
    again.save_pretrained(tmp_path / "copy")
    stored = json.loads((tmp_path / "copy/scheduler/scheduler_config.json").read_text("utf-8"))
    # the power closest to the table is what the official code reads
    assert stored["alpha"] > 0
    assert len(stored["log_beta"]) == 129
    assert ("metric" in stored) == (metric == "product")
    third = UrsaPipeline.from_pretrained(tmp_path / "copy")
    assert torch.equal(third.path.beta(TIMES), path.beta(TIMES))


def test_a_held_out_loss_curve_goes_with_the_model(make_request):
    request = make_request(max_steps=2)
    checkpoint = train_stage(request)
    times, losses = zip(*checkpoint.loss_curve, strict=True)
    assert times[0] == 0
    assert times[-1] == 0.999
    assert min(losses) > 0
    model = export_model(request, checkpoint, output_uri=request.output_uri)
    assert UrsaPipeline.from_pretrained(model.directory_uri).defaults.loss_curve == tuple(
        checkpoint.loss_curve
    )


@pytest.mark.parametrize(
    ("values", "codes", "message"),
    [
        ({"metric": "product", "alpha": 1.0, "c": 1.0}, torch.randn(60, 3), "an FSQ grid"),
        ({}, None, "the mixture path has no schedule"),
    ],
)
def test_schedulers_that_do_not_fit_are_named(values, codes, message):
    scheduler = SchedulerConfig(**values)
    with pytest.raises(ConfigError, match=message):
        scheduler.schedule() if codes is None else scheduler.path(codes, (5, 4, 3))
