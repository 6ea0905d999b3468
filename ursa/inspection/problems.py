"""What `verify` finds and `repair` does: problems, each with its file and what to do about it."""

import logging
from dataclasses import dataclass, field
from enum import StrEnum

from ursa.config import FrozenModel
from ursa.inspection.root import same_place

logger = logging.getLogger(__name__)

OTHER_BYTES = (
    "what is made here has other bytes: another processor, thread count or version of the libraries"
)


class ProblemKind(StrEnum):
    """What is wrong, as far as it decides what can be done."""

    SHARD = "shard"
    MEDIA = "media"
    TABLE = "table"
    MANIFEST = "manifest"
    UNIT_RECORD = "unit_record"
    RECORD = "record"
    """Of a file or an annotation: a run makes it again once it is gone."""
    VERSION = "version"
    VERSION_TABLE = "version_table"
    CONTENT = "content"


class Problem(FrozenModel):
    """A damaged file, or one that does not fit to the others."""

    kind: ProblemKind
    uri: str
    detail: str
    repair: str


class Verification(FrozenModel):
    """What was looked at, and what is wrong with it."""

    root_uri: str
    num_clip_sets: int
    num_selections: int
    num_token_sets: int
    num_versions: int
    num_records: int
    num_clips: int
    num_samples: int
    num_files: int
    num_bytes: int
    problems: tuple[Problem, ...]
    not_checked: tuple[str, ...]


@dataclass
class Tally:
    """Counts and problems while a data root is gone through."""

    root_uri: str
    num_clip_sets: int = 0
    num_selections: int = 0
    num_token_sets: int = 0
    num_versions: int = 0
    num_records: int = 0
    num_clips: int = 0
    num_samples: int = 0
    num_files: int = 0
    num_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    def add(self, kind: ProblemKind, uri: str, detail: str, repair: str) -> None:
        """Note a problem.

        Args:
            kind: What kind of file it is.
            uri: The file.
            detail: What is wrong with it.
            repair: What to do.
        """
        self.problems.append(Problem(kind=kind, uri=uri, detail=detail, repair=repair))

    def is_at(self, uri: str, recorded_uri: str, fingerprint: str) -> bool:
        """Whether a manifest lies where it says, under its own fingerprint; if not, note it.

        Args:
            uri: Where the manifest was found.
            recorded_uri: Where it says that it is.
            fingerprint: What its folder must be named after.
        """
        name = uri.split("/")[-2]
        if not self.is_in_place(uri, recorded_uri):
            return False
        if not fingerprint.startswith(name):
            detail = f"has the fingerprint {fingerprint[: len(name)]}, but is in the folder {name}"
            self.add(ProblemKind.MANIFEST, uri, detail, remake_hint(uri))
            return False
        return True

    def is_in_place(self, uri: str, recorded_uri: str) -> bool:
        """Whether a record lies where it says; if not, note it.

        Args:
            uri: Where the record was found.
            recorded_uri: Where it says that it is.
        """
        if not same_place(uri, recorded_uri):
            detail = f"says that it lies at {recorded_uri}: this data root was copied or moved"
            hint = "move it back: the files that a record names are where they were written"
            self.add(ProblemKind.CONTENT, uri, detail, hint)
            return False
        return True

    def result(self) -> Verification:
        """Return all of it as a record."""
        return Verification(**vars(self))


class Repair(FrozenModel):
    """What became of one problem; `detail` says how, or why not and what to do."""

    uri: str
    is_repaired: bool
    detail: str


def done(uri: str, detail: str) -> Repair:
    """Return and log that a problem is no more.

    Args:
        uri: The file.
        detail: How.
    """
    logger.info("%s: %s", uri, detail)
    return Repair(uri=uri, is_repaired=True, detail=detail)


def not_done(uri: str, detail: str) -> Repair:
    """Return and log that a problem is left.

    Args:
        uri: The file.
        detail: Why, and what to do.
    """
    logger.warning("%s: cannot be repaired: %s", uri, detail)
    return Repair(uri=uri, is_repaired=False, detail=detail)


def remake_hint(manifest_uri: str, uri: str | None = None) -> str:
    """Return what to do where `repair` cannot help: let the next run commit it again.

    Args:
        manifest_uri: The manifest that must go.
        uri: A file beside it that must go too.
    """
    files = " and ".join([manifest_uri, *([uri] if uri else [])])
    return f"delete {files} and run the pipeline again: units that are done are not done again"


def repair_hint(root_uri: str) -> str:
    """Return the command that makes shards and clips again.

    Args:
        root_uri: The data root.
    """
    return f"ursa data repair {root_uri}"
