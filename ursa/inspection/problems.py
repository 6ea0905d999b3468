"""What `verify` finds: problems, each with its file and what to do about it."""

from dataclasses import dataclass, field
from enum import StrEnum

from ursa.config import FrozenModel
from ursa.inspection.root import same_place


class ProblemKind(StrEnum):
    """What is wrong, as far as it decides what can be done."""

    SHARD = "shard"
    MEDIA = "media"
    TABLE = "table"
    MANIFEST = "manifest"
    UNIT_RECORD = "unit_record"
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
        if not same_place(uri, recorded_uri):
            detail = f"says that it lies at {recorded_uri}: this data root was copied or moved"
            hint = "move it back: the files that a manifest names are where they were written"
            self.add(ProblemKind.CONTENT, uri, detail, hint)
            return False
        if not fingerprint.startswith(name):
            detail = f"has the fingerprint {fingerprint[: len(name)]}, but is in the folder {name}"
            self.add(ProblemKind.MANIFEST, uri, detail, remake_hint(uri))
            return False
        return True

    def result(self) -> Verification:
        """Return all of it as a record."""
        return Verification(**vars(self))


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
