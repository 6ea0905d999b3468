"""Tasks: export the trained model and evaluate it on what it was never trained on."""

import functools
from typing import TYPE_CHECKING

from tasks import metric_sink, model_registry, releases, reports, tracking
from tasks.context import RunContext, TrainedModel
from tasks.options import announce, step
from tasks.settings import RuntimeSettings
from tasks.training import LOSS_PICTURE
from ursa.artifacts import EvalReport, ExportedModel

if TYPE_CHECKING:
    from ursa.comparison import Champion

SAMPLES = "samples"
GALLERY = f"{SAMPLES}/gallery.html"
MEASUREMENTS = "measurements.json"
CURVES = "evaluation_curves"
"""Series of pictures: quality against steps, produced against asked motion."""


@step(run_name="export model")
def export_model(context: RunContext, trained: TrainedModel) -> ExportedModel:
    """See `ursa.release.export_model`.

    Args:
        context: The run.
        trained: The outcome of the training part.

    Returns:
        The committed model directory.

    Raises:
        UrsaError: What that function raises.
    """
    from ursa import release  # noqa: PLC0415  (torch: seconds)

    return release.export_model(trained.request, trained.checkpoint, output_uri=context.data_uri)


@step(run_name="evaluate")
def evaluate_model(context: RunContext, trained: TrainedModel, model: ExportedModel) -> EvalReport:
    """See `ursa.evaluation.evaluate`; metrics and samples go to the tracking server.

    Args:
        context: The run.
        trained: The outcome of the training part.
        model: The exported model.

    Returns:
        The committed report.

    Raises:
        ServiceError: If the tracking server does not answer.
        UrsaError: What that function raises.
    """
    from ursa import evaluation  # noqa: PLC0415  (torch: seconds)
    from ursa.annotation.networks import choose_device  # noqa: PLC0415
    from ursa.evaluation import models, picture  # noqa: PLC0415
    from ursa.gate import comparison_text  # noqa: PLC0415
    from ursa.inspection.gallery import samples_page  # noqa: PLC0415  (matplotlib: a second)
    from ursa.training import validation  # noqa: PLC0415

    config, datasets = context.config, trained.request.datasets
    device = choose_device(
        RuntimeSettings.from_env().evaluation_device, where="URSA_EVALUATION_DEVICE"
    )
    champion = _champion(context, model)
    tags = {"ursa.fingerprint": context.fingerprint, **reports.flow_run_tags()}
    with tracking.child_run(context.run, "evaluate", tags) as run:
        tracking.log_inputs(
            run,
            [
                tracking.DatasetInput(
                    "tokens-video-validation",
                    datasets.video_validation.manifest_uri,
                    datasets.video_validation.fingerprint,
                    "evaluation",
                )
            ],
        )
        with metric_sink.MetricSink(run) as sink:
            announce("evaluation: losses by time, reconstructions, drawn clips; a minute or more")
            report = evaluation.evaluate(
                model,
                datasets,
                trained.selection,
                config,
                output_uri=context.data_uri,
                champion=champion,
                device=device,
                on_metrics=sink,
            )
        metric_sink.log_metrics(run, report.metrics, step=trained.checkpoint.step)
        compared = "" if report.comparison is None else comparison_text(report.comparison)
        tracking.tag_run(
            run,
            {
                "ursa.gate_passed": str(report.gate_passed).lower(),
                "ursa.failed_gates": "; ".join(report.failed_gates),
                "ursa.comparison": compared,
            },
        )
        media = [name for name in report.samples if name.endswith((".mp4", ".gif", ".png"))]
        tracking.log_files(run, report.samples_uri, media, SAMPLES)
        title = f"Samples after {trained.checkpoint.step} steps of {trained.checkpoint.stage}"
        gallery = samples_page(report.samples_uri, title)
        tracking.log_text(run, gallery, GALLERY)
        pictures = [name for name in media if name.endswith(".png")]
        for name in pictures:
            tracking.log_image_step(
                run,
                f"{report.samples_uri.rstrip('/')}/{name}",
                name.rpartition("/")[2].removesuffix(".png"),
                trained.checkpoint.step,
            )
        conditions = models.conditions_of(
            trained.selection, datasets.fingerprint, trained.request.visual_tokenizer, config
        )
        measured = models.report_measurements(report, trained.version_uri, conditions)
        tracking.log_text(run, measured.model_dump_json(indent=1), MEASUREMENTS)
        curves = picture.draw_curves(
            report.measurements, num_steps=config.evaluation.sampling.num_inference_steps
        )
        if curves is not None:
            tracking.log_picture_step(run, curves, CURVES, trained.checkpoint.step)
        if report.grids:
            tracking.log_picture_step(
                run, validation.picture(report.grids), LOSS_PICTURE, trained.checkpoint.step
            )
    # on the page of the whole run, where one looks first: gallery, strip and a clip of each kind
    tracking.log_text(context.run, gallery, GALLERY)
    clips = [name for name in media if name.endswith("-0.mp4")]
    tracking.log_files(context.run, report.samples_uri, [*pictures, *clips], SAMPLES)
    strip = pictures[0].rpartition("/")[2] if pictures else ""
    reports.eval_report(report, run.page(GALLERY), tracking.artifact_url(run, f"{SAMPLES}/{strip}"))
    verdict = (
        "holds" if report.gate_passed else f"refuses the model: {'; '.join(report.failed_gates)}"
    )
    announce("the gate %s", verdict)
    return report


def _champion(context: RunContext, model: ExportedModel) -> "Champion | None":
    """Return the version that the model is compared with; it is never the model itself.

    It may be champion already, when a kill came before its registration was complete: then it is
    compared with the champion before it, as it was the first time.
    """
    from ursa.comparison import Champion  # noqa: PLC0415  (torch: seconds)

    uri, name = context.run.tracking_uri, context.config.release.model_name
    found = model_registry.champion_version(
        uri, name, root_uri=context.data_uri, decided_by=reports.decided_by()
    )
    if found is not None and (
        found.tags.get("ursa.registration_key") == model.content_key
        or releases.DAMAGED_TAG in found.tags  # its files are gone
    ):
        with tracking.service(uri) as client:
            registry = releases.Registry(client, name, context.data_uri, "")
            whole = releases.whole_versions(registry)
            former = releases.former_champions(registry, found.version)
            earlier = [number for number in former if number in whole]
        found = model_registry.registered_version(uri, name, earlier[0]) if earlier else None
    if found is None or found.tags.get("ursa.registration_key") == model.content_key:
        return None
    number = found.version
    start = () if context.start is None else model_registry.trained_on(uri, context.start.model_uri)
    champion = model_registry.trained_on(uri, f"{releases.REGISTRY_SCHEME}{name}/{number}")
    return Champion(
        version=number,
        model_key=found.tags.get("ursa.registration_key"),
        tokens_uris=tuple(dict.fromkeys((*champion, *start))),
        open=functools.partial(model_registry.model_files, uri, name, number),
    )
