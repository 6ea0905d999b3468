"""Which captioner or scorer a configuration means: checked before work begins, loaded to do it.

Importing this module imports no network; a scorer's own module is imported when it is loaded.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from ursa import storage
from ursa.annotation.chat import ChatCaptioner, check_key
from ursa.annotation.models import (
    Sha256,
    label_places,
    model_digest,
    model_name,
    package_version,
    read_config,
    require_packages,
)
from ursa.annotation.records import Measure, ResolvedScorer
from ursa.artifacts import SCHEMA_VERSION
from ursa.config import (
    AestheticConfig,
    AnnotationConfig,
    CaptionerConfig,
    ClassifierConfig,
    ModelCaptionerConfig,
    ModelFilesConfig,
    ScorerConfig,
    SimilarityConfig,
    TextAreaConfig,
    UrlCaptionerConfig,
    fingerprint,
)
from ursa.errors import ConfigError
from ursa.sources.hashes import open_hashes
from ursa.video.captions import clean_caption

VERSIONS = {"url": 1, "model": 1, "similarity": 1, "aesthetic": 1, "classifier": 1, "text_area": 1}
"""By kind; raised when the same settings and files would give other results."""
SCORES: Mapping[str, tuple[str, ...]] = {
    "similarity": ("similarity",),
    "aesthetic": ("rating", "least_rating"),
    "classifier": ("probability", "mean_probability"),
    "text_area": ("area_fraction",),
}
"""What the scorers of a kind measure."""
_NOT_IN_RESULTS = {
    # where models lie and are asked, and which clips get a caption, not what is said of a clip
    *("model", "revision", "head", "replace", "base_url", "timeout_s", "max_retries"),
    *("concurrency", "allow_plain_http"),
}
Config = CaptionerConfig | ScorerConfig


def check_scorers(config: AnnotationConfig) -> None:
    """Refuse to begin where a package or model is missing; nothing is hashed or loaded.

    Args:
        config: Captioner and scorers.

    Raises:
        ConfigError: Names what is missing, and the extra to install or the key to correct.
        StorageError: If the store refuses or does not answer.
    """
    for name, part in _parts(config):
        _check(_where(name), part)


def score_keys(config: AnnotationConfig) -> set[str]:
    """Return the keys of `Clip.extra_scores` that the scorers will fill.

    Args:
        config: Captioner and scorers.
    """
    return {
        f"{name}/{score}" for name, part in config.scorers.items() for score in SCORES[part.kind]
    }


def resolve_scorers(
    config: AnnotationConfig, *, hash_cache: Path | None = None
) -> tuple[ResolvedScorer, ...]:
    """Check captioner and scorers and find out what decides their results.

    Args:
        config: Captioner and scorers.
        hash_cache: File that remembers the hashes of large model files; None reads them.

    Returns:
        The captioner first, since scorers may look at captions; then scorers by name.

    Raises:
        ConfigError: Names what is missing, and the extra to install or the key to correct.
        StorageError: If the store refuses or does not answer.
    """
    with open_hashes(hash_cache) as hashes:
        return tuple(_resolved(name, part, hashes.sha256) for name, part in _parts(config))


def load_scorer(scorer: ResolvedScorer, config: AnnotationConfig) -> Measure:
    """Load a captioner or scorer, in the process that uses it.

    Args:
        scorer: One of `resolve_scorers`.
        config: Holds the device.

    Raises:
        ConfigError: If a package or model is missing here, or does not fit.
        StorageError: If the store refuses or does not answer.
    """
    where, part, device = _where(scorer.name), scorer.config, config.device
    _check(where, part)
    match part:
        case UrlCaptionerConfig():
            return ChatCaptioner(part)
        case ModelCaptionerConfig():
            from ursa.annotation.image_text import ModelCaptioner  # noqa: PLC0415  (seconds)

            return ModelCaptioner(where, part, device)
        case SimilarityConfig():
            from ursa.annotation.embeddings import SimilarityScorer  # noqa: PLC0415

            return SimilarityScorer(where, part, device)
        case AestheticConfig():
            from ursa.annotation.embeddings import AestheticScorer  # noqa: PLC0415

            with storage.local_copy(part.head) as path:
                return AestheticScorer(where, part, path, device)
        case ClassifierConfig():
            from ursa.annotation.classifier import ClassifierScorer  # noqa: PLC0415

            return ClassifierScorer(where, part, device)
        case TextAreaConfig():
            from ursa.annotation.text_area import TextAreaScorer  # noqa: PLC0415  (an extra)

            return TextAreaScorer()


def _parts(config: AnnotationConfig) -> Iterator[tuple[str, Config]]:
    if config.captioner is not None:
        yield "captioner", config.captioner
    yield from sorted(config.scorers.items())


def _where(name: str) -> str:
    return "annotation.captioner" if name == "captioner" else f"annotation.scorers.{name}"


def _check(where: str, part: Config) -> None:
    match part:
        case UrlCaptionerConfig():
            check_key()
        case TextAreaConfig():
            require_packages("ocr", where, {"rapidocr": (3, 10), "onnxruntime": (1, 20)})
        case ModelFilesConfig():
            require_packages("scorers", where, {"transformers": (5, 23)})
            found = read_config(where, part)
            match part:
                case AestheticConfig() if not storage.exists(part.head):
                    raise ConfigError(f"{where}.head: no file at {part.head!r}")
                case ClassifierConfig():
                    label_places(where, found.get("id2label") or {}, part.labels)


def _resolved(name: str, part: Config, sha256: Sha256) -> ResolvedScorer:
    where = _where(name)
    _check(where, part)
    model: tuple[str, ...]
    match part:
        case UrlCaptionerConfig():
            model = (part.model, part.revision)
            label = f"{part.model}@{part.revision}" if part.revision else part.model
        case TextAreaConfig():
            model = (package_version("rapidocr"), package_version("onnxruntime"))
            label = f"rapidocr@{model[0]}"
        case ModelFilesConfig():
            digest = model_digest(where, part, sha256)
            model, label = (digest,), model_name(part, digest)
            if isinstance(part, AestheticConfig):
                with storage.local_copy(part.head) as path:
                    model = (digest, sha256(path))
    return ResolvedScorer(
        name=name,
        config=part,
        model_name=clean_caption(label),
        fingerprint=fingerprint(
            "annotation",
            SCHEMA_VERSION,
            VERSIONS[part.kind],
            part.model_dump(mode="json", exclude=_NOT_IN_RESULTS),
            model,
        ),
    )
