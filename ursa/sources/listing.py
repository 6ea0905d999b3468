"""The files of a source that may be videos: of a tree, a prefix, a manifest or tar files."""

import errno
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from ursa import storage
from ursa.artifacts import FailureReason, SourceVideo
from ursa.errors import DataError, StorageError
from ursa.sources import https
from ursa.sources.hashes import ContentHashes, open_hashes
from ursa.sources.manifest import check_https, read_manifest
from ursa.sources.names import (
    is_candidate,
    is_https,
    is_manifest,
    is_tar,
    member_uri,
    refuse_secret,
    relative_namer,
    stand_in_etag,
    tar_of,
)
from ursa.sources.tars import TarMember, read_index
from ursa.storage import StoredFile

_MAX_SINGLE_LOOKUPS = 100
"""Of more objects than this in one folder, the folder is listed instead."""
_NUM_THREADS = 8
_MAX_NAMED = 5
_TOO_LONG = (
    "no file can have this name: a part of it is longer than the file system allows (most: 255 "
    "bytes), or all of it is; correct it in the manifest"
)

Item = TypeVar("Item")


def discover_videos(
    source_uri: str, *, allow_https: bool = False, hash_cache: Path | None = None
) -> tuple[SourceVideo, ...]:
    """List the files of a source that may be videos, sorted by URI.

    Hidden files and plain texts are left out; everything else is looked at, whatever its name.
    Pipes and devices are listed too, so that they are reported; links are not followed. Files
    that a manifest names and that are not there are listed with their `problem`, as is what cannot
    be read of a tar file.

    Args:
        source_uri: A directory, a single file, an `s3://` prefix, a manifest (.csv, .jsonl,
            .parquet, or .txt with one name a line), a tar file, or an https address.
        allow_https: Whether https addresses may be fetched from.
        hash_cache: File that remembers the hashes of large local files; None reads all of them.

    Returns:
        The files; `etag` is the sha256 of a local file or of a member of a local tar file, or what
        the store or server says of an object.

    Raises:
        DataError: If it does not exist, holds no candidate file, or is a manifest that cannot be
            used.
        StorageError: If the store refuses or does not answer.
    """
    refuse_secret(source_uri)
    with open_hashes(hash_cache) as hashes:
        if is_https(source_uri):
            if not allow_https:
                check_https([source_uri], source_uri)
            found = _of_addresses([source_uri])
        elif is_manifest(source_uri):
            rows = read_manifest(source_uri, allow_https=allow_https)
            found = _of_names(list(dict.fromkeys(row.uri for row in rows)), hashes)
            _refuse_if_all_missing(source_uri, found)
        else:
            found = _of_tree(source_uri, hashes)
    sources = tuple(sorted(found, key=lambda source: source.uri))
    _refuse_doubles(source_uri, sources)
    if not sources:
        raise DataError(
            f"source {source_uri!r} holds no video; give a directory, an s3:// prefix, a manifest "
            "or a tar file with mp4, mkv, webm, mov, avi, mpg or gif files"
        )
    return sources


def look_up_video(uri: str, *, allow_https: bool = False) -> tuple[SourceVideo, ...]:
    """Return what a URI of a listing names now, whatever it is called and however it was listed.

    Args:
        uri: `uri` of a video that `discover_videos` has listed.
        allow_https: Whether https addresses may be fetched from.

    Returns:
        The file, or with its `problem` why there is none. Two where a `#` has two meanings: an
        object of that name, and a member of a tar file.

    Raises:
        DataError: If it is an https address that may not be fetched from.
        StorageError: If the store refuses or does not answer.
    """
    if is_https(uri) and not allow_https:
        check_https([uri], uri)
    with open_hashes(None) as hashes:
        found = [item for item in _of_names([uri], hashes) if item.uri == uri]
        if "#" in uri and not is_https(uri) and is_tar(tar_of(uri)):
            members = _of_names([tar_of(uri)], hashes)
            found += [item for item in members if item.uri == uri]
    there = [item for item in found if item.problem != FailureReason.MISSING]
    return tuple(there or found)


def _refuse_doubles(source_uri: str, sources: tuple[SourceVideo, ...]) -> None:
    """Refuse names that stand for two files: what is said of one would be said of both."""
    double = next((one for one, other in pairwise(sources) if one.uri == other.uri), None)
    if double is not None:
        raise DataError(
            f"source {source_uri!r} holds two files of the URI {double.uri}: a member of a tar "
            "file, and a file with a # in its name; rename one"
        )


def _refuse_if_all_missing(manifest_uri: str, sources: list[SourceVideo]) -> None:
    if sources and all(source.problem == FailureReason.MISSING for source in sources):
        what = "the file" if len(sources) == 1 else f"none of the {len(sources)} files"
        verb = "does not exist" if len(sources) == 1 else "exists"
        raise DataError(
            f"{what} that {manifest_uri} names {verb}; relative names count from the folder of the "
            f"manifest. Missing: {', '.join(source.uri for source in sources[:_MAX_NAMED])}"
        )


def _of_tree(source_uri: str, hashes: ContentHashes) -> list[SourceVideo]:
    try:
        files = storage.list_files(source_uri, with_etag=storage.is_remote(source_uri))
        irregular = storage.list_irregular_files(source_uri)
    except FileNotFoundError as error:
        raise DataError(
            f"source {source_uri!r} does not exist or is empty; give a directory, a file, an "
            "s3:// prefix, a manifest or a tar file"
        ) from error
    relative_name = relative_namer(source_uri)
    sources = [
        source
        for item in files
        if is_candidate(relative_name(item.uri))
        for source in _of_file(item, hashes)
    ]
    sources += [
        SourceVideo(uri=uri, num_bytes=0, etag=stand_in_etag("irregular", uri))
        for uri in irregular
        if is_candidate(relative_name(uri))
    ]
    if not sources:
        holds = f"{len(files)} files, but none that may be a video" if files else "no files"
        raise DataError(
            f"source {source_uri!r} holds {holds}; give a directory, s3:// prefix, manifest or "
            "tar file with mp4, mkv, webm, mov, avi, mpg or gif files"
        )
    return sources


def _of_names(uris: list[str], hashes: ContentHashes) -> list[SourceVideo]:
    """Look up the files that a manifest names."""
    addresses = [uri for uri in uris if is_https(uri)]
    objects = [uri for uri in uris if storage.is_remote(uri)]
    others = [uri for uri in uris if not is_https(uri) and not storage.is_remote(uri)]
    sources = _of_addresses(addresses)
    for uri, item in (*_stat_objects(objects), *((uri, _stat_local(uri)) for uri in others)):
        if item is None:
            sources.append(_missing(uri))
        elif isinstance(item, SourceVideo):
            sources.append(item)
        else:
            sources += _of_file(item, hashes)
    return sources


def _of_file(item: StoredFile, hashes: ContentHashes) -> Iterator[SourceVideo]:
    is_regular = storage.is_remote(item.uri) or not item.etag
    if is_tar(item.uri) and is_regular:
        yield from _of_tar(item, hashes)
    else:
        etag = item.etag or _local_etag(item.uri, hashes)
        yield SourceVideo(uri=item.uri, num_bytes=item.num_bytes, etag=etag)


def _of_tar(tar: StoredFile, hashes: ContentHashes) -> Iterator[SourceVideo]:
    try:
        index = read_index(tar)
        etags = list(_member_etags(tar, index.members, hashes))
    except FileNotFoundError:
        yield _missing(tar.uri)
        return
    except (OSError, StorageError) as error:
        if storage.is_remote(tar.uri):
            raise
        yield _with_problem(tar.uri, FailureReason.UNAVAILABLE, f"cannot be read: {error}")
        return
    for member, etag in zip(index.members, etags, strict=True):
        yield SourceVideo(
            uri=member_uri(tar.uri, member.name),
            num_bytes=member.num_bytes,
            etag=etag,
            offset_bytes=member.offset_bytes,
            problem=member.problem,
            detail=member.detail,
        )
    if index.damage:
        yield _with_problem(tar.uri, FailureReason.UNREADABLE, index.damage, tar.num_bytes)


def _member_etags(
    tar: StoredFile, members: Iterable[TarMember], hashes: ContentHashes
) -> Iterator[str]:
    """Yield an etag for each member: its sha256 in a local tar file, its place in an object."""
    for member in members:
        if storage.is_remote(tar.uri):
            yield object_member_etag(tar.etag, member.offset_bytes, member.num_bytes)
        elif member.problem is None:
            path = storage.local_path(tar.uri)
            yield hashes.sha256(path, member.offset_bytes, member.num_bytes)
        else:
            yield stand_in_etag(tar.uri, *member)


def object_member_etag(tar_etag: str, offset_bytes: int, num_bytes: int) -> str:
    """Return the etag of a member of a tar file in an object store: the same bytes, the same etag.

    Args:
        tar_etag: What the store says of the tar file.
        offset_bytes: Where the member begins.
        num_bytes: How long it is.
    """
    return stand_in_etag("member", tar_etag, offset_bytes, num_bytes)


def _of_addresses(urls: list[str]) -> list[SourceVideo]:
    """Ask the servers for size and etag; what cannot be asked is listed with its problem."""

    def look_up(url: str) -> SourceVideo:
        try:
            found = https.look_up(url)
        except https.FetchError as error:
            return _with_problem(url, error.reason, error.detail)
        return SourceVideo(uri=url, num_bytes=found.num_bytes or 0, etag=found.etag)

    return list(_in_threads(look_up, urls))


def _stat_objects(uris: list[str]) -> Iterator[tuple[str, StoredFile | None]]:
    """Look up objects one by one, or by listing their folder where that takes fewer requests."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    for uri in uris:
        by_folder[uri.rpartition("/")[0]].append(uri)
    single: list[str] = []
    for folder, members in by_folder.items():
        if len(members) <= _MAX_SINGLE_LOOKUPS:
            single += members
            continue
        listed = {item.uri: item for item in storage.list_folder(folder)}
        yield from ((uri, listed.get(uri)) for uri in members)

    def look_up(uri: str) -> StoredFile | None:
        try:
            return storage.stat_file(uri)
        except FileNotFoundError:
            return None

    yield from zip(single, _in_threads(look_up, single), strict=True)


def _stat_local(uri: str) -> StoredFile | SourceVideo | None:
    """Return a file with its size; what is no regular file is refused when it is ingested.

    Of a name that no file can have the result is a source with this problem.
    """
    try:
        status = storage.local_path(uri).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return _with_problem(uri, FailureReason.MISSING, _TOO_LONG)
        return StoredFile(uri, 0, stand_in_etag("unreadable", uri))
    if not stat.S_ISREG(status.st_mode):
        return StoredFile(uri, 0, stand_in_etag("irregular", uri))
    return StoredFile(uri, status.st_size, "")


def _missing(uri: str) -> SourceVideo:
    return _with_problem(uri, FailureReason.MISSING, "there is no such file")


def _with_problem(uri: str, reason: FailureReason, detail: str, num_bytes: int = 0) -> SourceVideo:
    return SourceVideo(
        uri=uri,
        num_bytes=num_bytes,
        etag=stand_in_etag(reason, detail, uri),
        problem=reason,
        detail=detail,
    )


def _local_etag(uri: str, hashes: ContentHashes) -> str:
    try:
        return hashes.sha256(storage.local_path(uri))
    except OSError:
        # it will fail again when it is ingested, and be reported then
        return stand_in_etag("unreadable", uri)


def _in_threads(function: Callable[[str], Item], uris: list[str]) -> Iterator[Item]:
    """Wait for many answers at once."""
    if not uris:
        return
    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="ursa-look-up") as pool:
        yield from pool.map(function, uris)
