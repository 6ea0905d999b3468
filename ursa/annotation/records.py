"""Records and errors of the annotation step."""

import functools
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from pydantic import Field

from ursa.artifacts import CLIPS, Clip, ClipSet
from ursa.config import (
    CaptionerConfig,
    FrozenModel,
    ModelCaptionerConfig,
    ScorerConfig,
    SimilarityConfig,
    UrlCaptionerConfig,
    fingerprint,
)
from ursa.errors import DataError


class AnnotationFailure(StrEnum):
    """Why a clip has no result of a scorer."""

    UNREADABLE = "unreadable"
    NO_ANSWER = "no_answer"
    BAD_ANSWER = "bad_answer"
    NOT_FINITE = "not_finite"
    CRASHED = "crashed"


class AnnotationError(DataError):
    """A scorer has no result for one clip."""

    reason = AnnotationFailure.BAD_ANSWER


class NoAnswerError(AnnotationError):
    """A server gave no answer for one clip, as often as it was asked."""

    reason = AnnotationFailure.NO_ANSWER


class UnreadableError(AnnotationError):
    """The file of a clip is missing, is not the one that was committed or cannot be read."""

    reason = AnnotationFailure.UNREADABLE


class NotFiniteError(AnnotationError):
    """A score is NaN or infinite."""

    reason = AnnotationFailure.NOT_FINITE


class CrashedError(AnnotationError):
    """The library of a model raised an error of its own."""

    reason = AnnotationFailure.CRASHED


class Measurement(FrozenModel):
    """What a scorer or captioner says about one clip."""

    scores: dict[str, float] = Field(default_factory=dict, description="by the scorer's own name")
    caption: str | None = None
    caption_long: str | None = None


class SeenClip(NamedTuple):
    """What a scorer sees of a clip.

    Attributes:
        frames: RGB, shape (T, H, W, 3), uint8.
        caption: What is said of it.
    """

    frames: np.ndarray
    caption: str | None


Measure = Callable[[SeenClip], Measurement]


class ResolvedScorer(FrozenModel):
    """A captioner or scorer that is known to be there."""

    name: str = Field(description="`captioner`, or the name in `annotation.scorers`")
    config: CaptionerConfig | ScorerConfig
    model_name: str = Field(description="what is written into `caption_model`")
    fingerprint: str = Field(description="of all that decides a result: version, settings, model")

    @property
    def concurrency(self) -> int:
        """How many clips it looks at at the same time."""
        return self.config.concurrency if isinstance(self.config, UrlCaptionerConfig) else 1

    @property
    def is_remote(self) -> bool:
        """Whether a server does the work, so that one process is enough to ask it."""
        return isinstance(self.config, UrlCaptionerConfig)

    def wants(self, clip: Clip) -> bool:
        """Whether a clip is to be looked at.

        Args:
            clip: A clip; captioners pass over those whose captions stay.
        """
        match self.config:
            case UrlCaptionerConfig() | ModelCaptionerConfig():
                is_of_people = clip.caption_source not in {None, "template", "captioner"}
                return self.config.replace == "all" or not is_of_people
            case SimilarityConfig():
                return bool(clip.caption)
        return True

    def key(self, clip: Clip) -> str:
        """Return the hash of all that this scorer looks at in a clip, 32 hexadecimal digits.

        Args:
            clip: A clip.
        """
        if isinstance(self.config, SimilarityConfig):
            return fingerprint(clip.media_sha256, clip.caption)[:32]
        return clip.media_sha256[:32]


class Annotation(FrozenModel):
    """The committed result of a scorer on a clip."""

    scorer_fingerprint: str
    media_sha256: str
    measurement: Measurement


class AnnotationUnit(FrozenModel):
    """A few clips that a scorer is to look at.

    All units of a plan are held at once: as JSON their clips take a fifth of the memory.
    """

    clips_json: str

    @functools.cached_property
    def clips(self) -> tuple[Clip, ...]:
        """The clips in their order; from the first look on they are held too."""
        return CLIPS.validate_json(self.clips_json)


class FailedAnnotation(FrozenModel):
    """A clip on which a scorer failed, and why."""

    scorer: str
    key: str
    clip_id: str
    source_uri: str
    reason: AnnotationFailure
    detail: str


class AnnotatedUnit(FrozenModel):
    """What became of a unit: results by key, and failures."""

    results: dict[str, Measurement]
    failed: tuple[FailedAnnotation, ...]


class AnnotationReport(FrozenModel):
    """What was done to a set of clips; committed beside the new set."""

    parent: ClipSet
    scorers: tuple[ResolvedScorer, ...]
    num_results: dict[str, int] = Field(description="clips with a result by scorer")
    failed: tuple[FailedAnnotation, ...]
