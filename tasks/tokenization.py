"""Task: clips to token shards, in parallel."""

import functools

from tasks import cluster, metric_sink, reports, tracking
from tasks.context import RunContext
from tasks.options import announce, step
from tasks.settings import RuntimeSettings
from ursa.artifacts import ClipSelection, TokenDatasets, TokenizerRef
from ursa.data.units import MODALITIES, SPLITS, TokenizedUnit


@step(run_name="tokenize clips")
def tokenize_clips(
    context: RunContext, selection: ClipSelection, visual_tokenizer: TokenizerRef
) -> TokenDatasets:
    """See `ursa.tokenization.ClipTokenizer`; one unit a shard, then one commit.

    Args:
        context: The run.
        selection: The committed selection.
        visual_tokenizer: The committed tokenizer.

    Returns:
        The four committed data sets.

    Raises:
        FailureBudgetExceeded: If more clips failed than `tokenization.max_failed_fraction`.
        ServiceError: If Ray or the tracking server cannot be reached.
        StorageError: If the store refuses or does not answer.
    """
    from ursa import tokenization  # noqa: PLC0415  (torch: seconds)

    config = context.config
    plan = tokenization.plan_tokenization(
        selection, visual_tokenizer, config, output_uri=context.data_uri
    )
    datasets = plan.committed
    if datasets is None:
        settings = RuntimeSettings.from_env()
        make_unit = functools.partial(
            tokenization.ClipTokenizer,
            visual_tokenizer,
            config,
            num_decoders=settings.decoders_per_worker,
            device="cuda" if settings.gpus_per_worker else "cpu",
        )
        before, total = len(plan.done), len(plan.done) + len(plan.todo)
        with reports.progress("tokenize-progress", "shards", total=total, before=before) as advance:
            new = list(
                cluster.map_units(
                    make_unit,
                    plan.todo,
                    TokenizedUnit,
                    settings,
                    workers=cluster.Workers(
                        "tokenize", settings.decoders_per_worker, settings.gpus_per_worker
                    ),
                    on_progress=advance,
                )
            )
        datasets = tokenization.commit_tokens(
            plan,
            (*plan.done, *new),
            visual_tokenizer,
            config,
            output_uri=context.data_uri,
        )
    reports.token_shards(datasets)
    lost = {
        "data/num_untokenized_clips": float(datasets.num_failed_clips),
        "data/num_unavailable_clips": float(datasets.num_unavailable_clips),
        "data/num_short_clips": float(datasets.num_short_clips),
    }
    if datasets.num_failed_clips:
        announce("%d clips could not be tokenized", datasets.num_failed_clips)
    with tracking.child_run(context.run, "data", reports.flow_run_tags()) as run:
        tracking.log_inputs(
            run,
            [
                tracking.DatasetInput(
                    "clips", selection.clips.manifest_uri, selection.clips.fingerprint, "source"
                )
            ],
        )
        metric_sink.log_metrics(
            run,
            {
                f"data/num_{modality}_{split}": sum(
                    part.num_samples for part in datasets.of(modality, split)
                )
                for modality in MODALITIES
                for split in SPLITS
            }
            | lost,
        )
    announce(
        "%d image and %d video samples to train on",
        sum(part.num_samples for part in datasets.of("image", "train")),
        sum(part.num_samples for part in datasets.of("video", "train")),
    )
    return datasets
