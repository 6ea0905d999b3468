"""Tasks of the data part: ingest, select, fit the tokenizers."""

import contextlib
import functools
import itertools
from collections.abc import Iterable
from typing import TypeVar

from tasks import cluster, metric_sink, reports, tracking
from tasks.context import RunContext
from tasks.options import announce, step
from tasks.settings import RuntimeSettings
from ursa import ingestion
from ursa.artifacts import ClipSelection, ClipSet, IngestedVideo, TokenizerRef
from ursa.data import versions
from ursa.data.clips import iter_selection, read_failures
from ursa.errors import DataError, ManifestError
from ursa.sources.committed import load_listing

Unit = TypeVar("Unit")

MAX_NAMED = 5
"""Quarantined files that the terminal names; the artifact `data-funnel` has them all."""


@step(run_name="ingest videos")
def ingest_videos(context: RunContext) -> ClipSet:
    """See `ursa.ingestion.ingest_video`; one unit a file, in parallel, then one commit.

    Args:
        context: The run.

    Returns:
        The committed clips.

    Raises:
        ManifestError: If the record of the source's files is gone or damaged.
        ShardFormatError: If the table of them is.
        DataError: If captions or licences were edited since the run began.
        FailureBudgetExceeded: If too large a share of the files failed.
        DataError: If there is no clip at all.
        ServiceError: If Ray cannot be started or reached.
        StorageError: If the store refuses or does not answer.
    """
    listing = load_listing(context.sources_uri)
    if listing is None:
        raise ManifestError(f"{context.sources_uri} is gone; run again")
    config = context.config.ingestion
    plan = ingestion.plan_ingestion(context.source_uri, listing.sources, context.data_uri, config)
    if plan.notes.digest() != listing.notes_digest:
        raise DataError(
            f"captions or licences at {context.source_uri} were edited while the run began; run it "
            "again"
        )
    if plan.committed is not None:
        return plan.committed
    with contextlib.ExitStack() as stack:
        new: Iterable[IngestedVideo] = ()
        if plan.todo:
            unit = functools.partial(
                ingestion.ingest_video, output_uri=context.data_uri, config=config
            )
            before, total = len(plan.done), len(plan.done) + len(plan.todo)
            new = cluster.map_units(
                functools.partial(_same, unit),
                plan.todo,
                IngestedVideo,
                RuntimeSettings.from_env(),
                workers=cluster.Workers("ingest"),
                on_progress=stack.enter_context(
                    reports.progress("ingest-progress", "files", total=total, before=before)
                ),
            )
        clips = ingestion.commit_clips(
            # units that are damaged are found before the work begins
            context.source_uri,
            itertools.chain(plan.done, new),
            context.data_uri,
            plan,
            config,
        )
    announce(
        "%d clips from %d files, %d quarantined",
        clips.num_clips,
        clips.num_videos,
        clips.num_failed,
    )
    failed = read_failures(clips)
    for video in failed[:MAX_NAMED]:
        announce("quarantined: %s: %s", video.source.uri, video.failure)
    if len(failed) > MAX_NAMED:
        announce("and %d more; `ursa data stats` counts them by reason", len(failed) - MAX_NAMED)
    return clips


def _same(unit: Unit) -> Unit:
    return unit


@step(run_name="select clips")
def select_clips(context: RunContext, clips: ClipSet) -> ClipSelection:
    """See `ursa.ingestion.select_clips`.

    Args:
        context: The run.
        clips: The committed clips.

    Returns:
        The committed selection.

    Raises:
        DataError: If no clip is kept.
        ServiceError: If the tracking server does not answer.
        StorageError: If the store refuses or does not answer.
    """
    selection = ingestion.select_clips(clips, context.config.selection, output_uri=context.data_uri)
    reports.data_funnel(clips, selection, read_failures(clips))
    reports.clip_examples(iter_selection(selection))
    announce("kept %d of %d clips", selection.num_kept, clips.num_clips)
    with tracking.child_run(
        context.run, "data", {"ursa.fingerprint": selection.fingerprint, **reports.flow_run_tags()}
    ) as run:
        metric_sink.log_metrics(
            run,
            {
                "data/num_files": clips.num_videos,
                "data/num_failed_files": clips.num_failed,
                "data/num_clips": clips.num_clips,
                "data/num_kept": selection.num_kept,
                "data/num_train": selection.num_train,
                "data/num_validation": selection.num_validation,
            },
        )
    return selection


@step(run_name="fit visual tokenizer")
def fit_visual_tokenizer(context: RunContext, selection: ClipSelection) -> TokenizerRef:
    """See `ursa.training.visual_tokenizer.fit_visual_tokenizer`; a good earlier one is kept.

    Args:
        context: The run.
        selection: The committed selection.

    Returns:
        The committed tokenizer.

    Raises:
        ServiceError: If the tracking server does not answer.
        UrsaError: What that function raises.
    """
    kept = versions.find_kept_tokenizer(
        context.data_uri, selection, context.config, "visual_tokenizer"
    )
    if kept is not None:
        announce("kept the visual tokenizer of an earlier data set version")
        return kept
    from ursa.training import visual_tokenizer  # noqa: PLC0415  (torch: seconds)

    with (
        reports.step_progress(
            "visual-tokenizer-progress", context.config.visual_tokenizer.max_steps
        ) as show,
        tracking.child_run(context.run, "data", reports.flow_run_tags()) as run,
        metric_sink.MetricSink(run, on_step=show) as sink,
    ):
        fitted = visual_tokenizer.fit_visual_tokenizer(
            selection, context.config, output_uri=context.data_uri, on_metrics=sink
        )
        metric_sink.log_metrics(
            run, {f"visual_tokenizer/{_bare(k)}": v for k, v in fitted.metrics.items()}
        )
    announce("%s", describe_tokenizer(fitted))
    return fitted


def describe_tokenizer(tokenizer: TokenizerRef) -> str:
    """Return a sentence about a visual tokenizer: how well it reconstructs, how many codes it uses.

    Args:
        tokenizer: The committed tokenizer.
    """
    metrics = {_bare(key): value for key, value in tokenizer.metrics.items()}
    if "psnr_train" not in metrics:
        return f"visual tokenizer of {tokenizer.vocab_size} codes, taken as it is"
    quality = f"PSNR {metrics['psnr_train']:.1f} dB on training clips"
    if "psnr_validation" in metrics:
        quality += f", {metrics['psnr_validation']:.1f} dB on held-out clips"
    kind = "kept from its PCA start" if metrics.get("kept_pca") else "fitted"
    used = f"{metrics['codes_used']:.0f} of {tokenizer.vocab_size} codes used"
    return f"visual tokenizer {kind}: {quality}; {used}"


@step(run_name="train text tokenizer")
def fit_text_tokenizer(context: RunContext, selection: ClipSelection) -> TokenizerRef:
    """See `ursa.training.text_tokenizer.fit_text_tokenizer`; a good earlier one is kept.

    Args:
        context: The run.
        selection: The committed selection.

    Returns:
        The committed tokenizer.

    Raises:
        UrsaError: What that function raises.
    """
    kept = versions.find_kept_tokenizer(
        context.data_uri, selection, context.config, "text_tokenizer"
    )
    if kept is not None:
        return kept
    from ursa.training import text_tokenizer  # noqa: PLC0415

    return text_tokenizer.fit_text_tokenizer(selection, context.config, output_uri=context.data_uri)


def _bare(key: str) -> str:
    return key.rpartition("/")[2]
