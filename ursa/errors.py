"""Exceptions raised by ursa.

UrsaError
├── ConfigError               an unknown key or a value out of range (also a ValueError)
├── DataError                 the data cannot be used as they are
│   ├── VideoDecodeError      one file cannot be read
│   │   └── ClipUnavailableError  not now: missing, damaged, no memory or time; transient
│   ├── ShardFormatError      a shard is damaged or of another schema
│   ├── ManifestError         missing, incomplete or damaged
│   │   └── SchemaVersionError whole, but of another schema version
│   └── FailureBudgetExceeded too many inputs failed
├── StorageError              the store did not answer; transient
│   └── StorageConfigurationError  no such bucket, no permission, disk full; not transient
├── ServiceError              Prefect, MLflow or Ray cannot be reached; transient
├── TrainingError
│   ├── NonFiniteLossError    the loss or a gradient became NaN or infinite
│   ├── DataExhaustedError    a stage has no samples
│   └── CheckpointError       a checkpoint is missing or damaged
└── RegistrationError         a model version could not be registered whole

Every class takes one positional message, so that it survives pickling between processes.
"""

import difflib
from collections.abc import Sequence
from typing import ClassVar


class UrsaError(Exception):
    """Base class; `transient` says whether the same call may succeed if repeated."""

    transient: ClassVar[bool] = False


class ConfigError(UrsaError, ValueError):
    """A configuration has an unknown key or a value that is not allowed."""


class DataError(UrsaError):
    """The data cannot be used as they are."""


class VideoDecodeError(DataError):
    """One video or image file cannot be read."""


class ClipUnavailableError(VideoDecodeError):
    """A clip cannot be read for now: missing or damaged in the store, or no time or memory."""

    transient: ClassVar[bool] = True


class ShardFormatError(DataError):
    """A shard is damaged, incomplete or written in another schema."""


class ManifestError(DataError):
    """A manifest is missing, incomplete, damaged or of another schema version."""


class SchemaVersionError(ManifestError):
    """A manifest is whole, but another version of the program wrote it."""


class FailureBudgetExceeded(DataError):  # noqa: N818  (reads as a sentence)
    """More inputs failed than the configuration allows."""


class StorageError(UrsaError):
    """The store refused or did not answer."""

    transient: ClassVar[bool] = True


class StorageConfigurationError(StorageError):
    """The store will never accept the call: no such bucket, no permission, disk full."""

    transient: ClassVar[bool] = False


class ServiceError(UrsaError):
    """A service that the run needs (tracking server, cluster) cannot be reached."""

    transient: ClassVar[bool] = True


class TrainingError(UrsaError):
    """Training cannot go on."""


class NonFiniteLossError(TrainingError):
    """The loss or a gradient became NaN or infinite before the optimizer update."""


class DataExhaustedError(TrainingError):
    """A stage has fewer samples than it needs to form one batch."""


class CheckpointError(TrainingError):
    """A checkpoint is missing, damaged or belongs to another configuration."""


class RegistrationError(UrsaError):
    """A model version could not be registered as a whole."""


def name_hint(name: str, known: Sequence[str]) -> str:
    """Return what to write instead of an unknown name: the nearest known one, else all of them.

    Args:
        name: The unknown name.
        known: What may stand in its place.
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"


def size_hint(size: int, stride: int, first: int, what: str = "") -> str:
    """Return what to take instead of a size: the nearest that are first + stride k with k >= 0.

    Args:
        size: The size asked for.
        stride: Step between sizes that fit.
        first: The least that fits.
        what: What is counted, in the plural; nothing leaves it out.

    Returns:
        Such as "the nearest are 5 and 9"; an empty text if the size fits.
    """
    low = first + (size - first) // stride * stride
    if low == size >= first:
        return ""
    near = [str(fits) for fits in (low, low + stride) if fits >= first] or [str(first)]
    verb = "are" if len(near) > 1 or what else "is"
    return " ".join(["the nearest", *what.split(), verb, " and ".join(near)])
