"""What people have written about the videos of a source: captions, licences, attributions."""

import contextlib
import logging
from collections.abc import Mapping, Sequence

from ursa import storage
from ursa.artifacts import Clip, SourceVideo
from ursa.config import fingerprint
from ursa.sources.manifest import read_manifest
from ursa.sources.names import file_name, is_https, is_manifest, member_name, relative_name, tar_of
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
        names = {relative_name(source_uri, uri): uri for uri in self._sources}
        try:
            listed = storage.list_files(source_uri, with_etag=False)
        except FileNotFoundError:
            return
        files = {relative_name(source_uri, item.uri): item for item in listed}
        caption_file = files.get(CAPTION_FILE_NAME)
        if caption_file is not None and caption_file.num_bytes <= CAPTION_FILE_LIMIT_BYTES:
            # what is removed after it was listed is not there
            with contextlib.suppress(FileNotFoundError):
                self._read_caption_file(caption_file.uri, names)
        for name, uri in names.items():
            if self._sources[uri].offset_bytes is None:
                texts: dict[str, Notes] = {}
                for beside in names_beside(name):
                    if beside in files and 0 < files[beside].num_bytes <= SIDECAR_LIMIT_BYTES:
                        with contextlib.suppress(FileNotFoundError):
                            content = storage.read_bytes(files[beside].uri)
                            texts[beside] = parse_text_beside(beside, content)
                self._add_beside(uri, texts, name)

    def _read_caption_file(self, uri: str, names: Mapping[str, str]) -> None:
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
            if row.path in names:
                self._rows.setdefault(names[row.path], []).append(row)
            else:
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
