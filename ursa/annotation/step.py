"""The whole annotation step, whoever does the units: captioner and scorers one after another."""

import functools
from collections.abc import Callable, Sequence

from ursa.annotation.records import (
    AnnotatedUnit,
    AnnotationReport,
    AnnotationUnit,
    FailedAnnotation,
    ResolvedScorer,
)
from ursa.annotation.scorers import load_scorer
from ursa.annotation.units import (
    ClipAnnotator,
    apply_annotations,
    commit_annotations,
    plan_annotation,
    plan_scorer,
)
from ursa.artifacts import ClipSet
from ursa.config import AnnotationConfig
from ursa.data.clips import each_clip, read_clip_table

MakeUnit = Callable[[], Callable[[AnnotationUnit], AnnotatedUnit]]
RunUnits = Callable[[ResolvedScorer, MakeUnit, Sequence[AnnotationUnit]], Sequence[AnnotatedUnit]]
"""Does all units of a scorer; the second argument makes the unit function, once a process."""


def annotate_clips(
    clips: ClipSet,
    scorers: Sequence[ResolvedScorer],
    config: AnnotationConfig,
    *,
    output_uri: str,
    run_units: RunUnits,
) -> ClipSet:
    """Put captions and scores on committed clips and commit them as a set of their own.

    Args:
        clips: The committed clips.
        scorers: Result of `resolve_scorers`; with none there is nothing to do.
        config: Size of the units, device and failure budget.
        output_uri: Root of all data of the run.
        run_units: Does the units, in parallel or not.

    Returns:
        The committed set; `clips` itself without scorers.

    Raises:
        FailureBudgetExceeded: If one of them failed on too large a share of its clips; what the
            others measured stays committed.
        ShardFormatError: If the table of the clips is missing or damaged.
        StorageError: If the store refuses or does not answer.
        UrsaError: What `run_units` raises.
    """
    if not scorers:
        return clips
    plan = plan_annotation(clips, scorers, output_uri=output_uri)
    if plan.committed is not None:
        return plan.committed
    rows = read_clip_table(clips)
    failed: list[FailedAnnotation] = []
    num_results: dict[str, int] = {}
    for scorer in scorers:
        part = plan_scorer(rows, scorer, config, output_uri=output_uri)
        make = functools.partial(load_annotator, scorer, config, output_uri=output_uri)
        units = run_units(scorer, make, part.todo) if part.todo else ()
        results = dict(part.done)
        for unit in units:
            results |= unit.results
        own = sorted((item for unit in units for item in unit.failed), key=lambda item: item.key)
        num_results[scorer.name] = sum(
            scorer.wants(clip) and scorer.key(clip) in results for clip in each_clip(rows)
        )
        rows = apply_annotations(rows, scorer, results, own, config)
        failed += own
    report = AnnotationReport(
        parent=clips, scorers=tuple(scorers), num_results=num_results, failed=tuple(failed)
    )
    return commit_annotations(clips, rows, plan, report, output_uri=output_uri)


def load_annotator(
    scorer: ResolvedScorer, config: AnnotationConfig, *, output_uri: str
) -> ClipAnnotator:
    """Return the unit function of a scorer, with its model loaded in this process.

    Args:
        scorer: One of `resolve_scorers`.
        config: Holds the device.
        output_uri: Root of all data of the run.

    Raises:
        ConfigError: If a package or model is missing here, or does not fit.
        StorageError: If the store refuses or does not answer.
    """
    return ClipAnnotator(scorer, load_scorer(scorer, config), output_uri=output_uri)
