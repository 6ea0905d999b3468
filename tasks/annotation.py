"""Task: optional captions and scores of clips, in parallel."""

from collections.abc import Sequence

import platformdirs

from tasks import cluster, reports
from tasks.context import RunContext
from tasks.options import announce, step
from tasks.settings import RuntimeSettings
from ursa.annotation.records import AnnotatedUnit, AnnotationUnit, ResolvedScorer
from ursa.annotation.scorers import resolve_scorers
from ursa.annotation.step import MakeUnit
from ursa.annotation.step import annotate_clips as annotate
from ursa.annotation.units import read_report
from ursa.artifacts import ClipSet

_MAX_NAMED = 5


@step(run_name="annotate clips")
def annotate_clips(context: RunContext, clips: ClipSet) -> ClipSet:
    """See `ursa.annotation.step.annotate_clips`; a unit a few clips, in parallel, then one commit.

    Args:
        context: The run.
        clips: The committed clips.

    Returns:
        The committed clips with captions and scores; `clips` itself if nothing is configured.

    Raises:
        ConfigError: If a package, model or key is missing or refused.
        FailureBudgetExceeded: If more clips failed than `annotation.max_failed_fraction`.
        ServiceError: If Ray or a server of captions cannot be reached.
        StorageError: If the store refuses or does not answer.
    """
    config = context.config.annotation
    scorers = resolve_scorers(
        config, hash_cache=platformdirs.user_cache_path("ursa") / "hashes.sqlite"
    )
    annotated = annotate(clips, scorers, config, output_uri=context.data_uri, run_units=_run_units)
    report = read_report(annotated) if scorers else None
    if report is not None:
        for name, count in report.num_results.items():
            announce("%s: %d of %d clips", name, count, clips.num_clips)
        for item in report.failed[:_MAX_NAMED]:
            announce("%s failed on %s: %s", item.scorer, item.source_uri, item.detail)
    return annotated


def _run_units(
    scorer: ResolvedScorer, make: MakeUnit, units: Sequence[AnnotationUnit]
) -> list[AnnotatedUnit]:
    settings = RuntimeSettings.from_env()
    if scorer.is_remote:  # it bounds the requests of all actors together
        settings = settings.model_copy(update={"num_workers": 1})
    key = f"annotate-{scorer.name.replace('_', '-')}"
    with reports.progress(key, "units of clips", total=len(units)) as advance:
        return list(cluster.map_units(make, units, AnnotatedUnit, settings, on_progress=advance))
