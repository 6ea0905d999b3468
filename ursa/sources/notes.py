"""What people have written about the videos of a source: captions, licences, attributions."""

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence

from ursa import storage
from ursa.artifacts import Clip, SourceVideo
from ursa.config import fingerprint
from ursa.errors import DataError, StorageError
from ursa.sources.manifest import read_manifest
from ursa.sources.names import (
    file_name,
    is_https,
    is_manifest,
    member_name,
    relative_namer,
    resolve_name,
    tar_of,
)
from ursa.sources.tars import read_index
from ursa.video.captions import (
    CaptionRow,
    Notes,
    caption_of,
    join_notes,
    names_beside,
    parse_caption_rows,
    parse_text_beside,
)

logger = logging.getLogger(__name__)

CAPTION_FILE_NAME = "captions.jsonl"
SIDECAR_LIMIT_BYTES = 64 << 10
CAPTION_FILE_LIMIT_BYTES = 256 << 20
_NOTHING = Notes()


class SourceNotes:
    """What is written about the videos of a source."""

    def __init__(self, sources: Sequence[SourceVideo]) -> None:
        self._sources = {source.uri: source for source in sources}
        self._rows: dict[str, list[CaptionRow]] = {}
        self._beside: dict[str, Notes] = {}
        self._tars: dict[str, Notes] = {}
        self._unused_names: list[str] = []

    @classmethod
    def read(cls, source_uri: str, sources: Sequence[SourceVideo]) -> "SourceNotes":
        """Read the manifest, or the caption file and the texts beside the videos.

        Args:
            source_uri: Where the sources are.
            sources: Result of `discover_videos`.

        Returns:
            All that is written about them.

        Raises:
            DataError: If the source is a manifest that cannot be used.
            StorageError: If the store refuses or does not answer.
        """
        notes = cls(sources)
        if is_manifest(source_uri):
            for row in read_manifest(source_uri, allow_https=True, is_quiet=True):
                notes._rows.setdefault(row.uri, []).append(row.said)
        elif not is_https(source_uri):
            notes._read_tree(source_uri)
        notes._read_tars()
        return notes

    def _read_tree(self, source_uri: str) -> None:
        try:
            listed = storage.list_files(source_uri, with_etag=False)
        except FileNotFoundError:
            return
        file_uri, folder_uri = _file_and_folder(source_uri)
        is_single = [item.uri for item in listed] == [file_uri]
        if not is_single:
            folder_uri = source_uri
        relative_name = relative_namer(folder_uri)
        names = {relative_name(uri): uri for uri in self._sources}
        if is_single:
            videos = [name for name, uri in names.items() if uri == file_uri]
            listed = _look_up_beside(folder_uri, videos)
        files = {relative_name(item.uri): item for item in listed}
        caption_file = files.get(CAPTION_FILE_NAME)
        if caption_file is not None and caption_file.num_bytes > CAPTION_FILE_LIMIT_BYTES:
            logger.warning(
                "%s is left out: %d bytes, expected at most %d; use a manifest, or folders that "
                "are a source each",
                caption_file.uri,
                caption_file.num_bytes,
                CAPTION_FILE_LIMIT_BYTES,
            )
        elif caption_file is not None:
            # what is removed after it was listed is not there
            with contextlib.suppress(FileNotFoundError):
                self._read_caption_file(caption_file.uri, names, is_quiet=is_single)
        for name, uri in names.items():
            if self._sources[uri].offset_bytes is None:
                texts: dict[str, Notes] = {}
                for beside in names_beside(name):
                    if beside in files and 0 < files[beside].num_bytes <= SIDECAR_LIMIT_BYTES:
                        with contextlib.suppress(FileNotFoundError):
                            content = storage.read_bytes(files[beside].uri)
                            texts[beside] = parse_text_beside(beside, content)
                self._add_beside(uri, texts, name)

    def _read_caption_file(self, uri: str, names: Mapping[str, str], *, is_quiet: bool) -> None:
        parsed, bad_lines = parse_caption_rows(storage.read_bytes(uri))
        if bad_lines:
            logger.warning(
                "%s: %d lines are left out, the first is line %d; expected objects with "
                "path and caption",
                uri,
                len(bad_lines),
                bad_lines[0],
            )
        for row in parsed:
            # a member of a tar file in the tree has a name here that a manifest cannot write
            named = names.get(row.path) or _resolved(uri, row.path)
            if named is not None and named in self._sources:
                self._rows.setdefault(named, []).append(row)
            elif not is_quiet:  # beside a single video the rows of others are to be expected
                self._unused_names.append(row.path)

    def _read_tars(self) -> None:
        members: dict[str, list[str]] = {}
        for source in self._sources.values():
            if source.offset_bytes is not None:
                members.setdefault(tar_of(source.uri), []).append(source.uri)
        for tar_uri, uris in members.items():
            try:
                texts = read_index(storage.stat_file(tar_uri)).texts
            except FileNotFoundError:
                continue
            for uri in uris:
                self._add_beside(uri, texts, member_name(uri))
            if tar_uri in self._rows:
                self._tars[tar_uri] = join_notes(*(row.notes for row in self._rows[tar_uri]))

    def _add_beside(self, uri: str, texts: Mapping[str, Notes], name: str) -> None:
        in_tar = self._sources[uri].offset_bytes is not None
        found = [texts[beside] for beside in names_beside(name, in_tar=in_tar) if beside in texts]
        if found:
            self._beside[uri] = join_notes(*found)

    def digest(self) -> str:
        """Return a hash of everything that is said."""
        return fingerprint(
            {
                uri: [[str(row.start_s), str(row.end_s), *row.notes] for row in rows]
                for uri, rows in self._rows.items()
            },
            {uri: list(notes) for uri, notes in self._beside.items()},
        )

    def applied_to(self, clip: Clip) -> Clip:
        """Return the clip with its captions, licence and attribution.

        Args:
            clip: A clip of one of the sources.
        """
        source = self._sources[clip.source_uri]
        rows = self._rows.get(source.uri, [])
        beside = self._beside.get(source.uri, _NOTHING)
        caption = caption_of(
            file_name(source),
            clip.start_s,
            clip.end_s,
            rows=rows,
            beside=beside,
            beside_source="sidecar" if source.offset_bytes is None else "tar",
        )
        # what is said about a whole tar file counts for each member
        whole = self._tars.get(tar_of(source.uri), _NOTHING)
        said = join_notes(*(row.notes for row in rows), beside, whole)
        return clip.model_copy(
            update={
                "caption": caption.text,
                "caption_long": caption.text_long,
                "caption_source": caption.source,
                "license": said.license,
                "attribution": said.attribution,
            }
        )

    def warn_about_unused_rows(self) -> None:
        """Say which rows of the caption file name no video."""
        if self._unused_names:
            logger.warning(
                "%s has %d rows for files that are no videos of this source, such as %r",
                CAPTION_FILE_NAME,
                len(self._unused_names),
                self._unused_names[0],
            )


def _file_and_folder(source_uri: str) -> tuple[str, str]:
    """Return the URIs of a source, if it is a file, and of its folder."""
    if storage.is_remote(source_uri):
        return source_uri.rstrip("/"), source_uri.rstrip("/").rpartition("/")[0]
    path = storage.local_path(source_uri).absolute()
    return path.as_uri(), path.parent.as_uri()


def _look_up_beside(folder_uri: str, videos: Iterable[str]) -> list[storage.StoredFile]:
    """Return the texts beside a single file; the folder may hold anything, so it is not listed."""
    wanted = [CAPTION_FILE_NAME, *(text for name in videos for text in names_beside(name))]
    is_remote = storage.is_remote(folder_uri)
    found: list[storage.StoredFile] = []
    for name in dict.fromkeys(wanted):
        if is_remote:
            uri = storage.join(folder_uri, name)
        else:
            uri = (storage.local_path(folder_uri) / name).as_uri()
        # of a name that is too long there can be no file
        with contextlib.suppress(FileNotFoundError, *(() if is_remote else (StorageError,))):
            found.append(storage.stat_file(uri))
    return found


def _resolved(caption_file_uri: str, name: str) -> str | None:
    """Return the URI that a manifest in its place would mean; None if it must not name it."""
    try:
        return resolve_name(caption_file_uri, name)
    except (DataError, UnicodeEncodeError):
        return None
