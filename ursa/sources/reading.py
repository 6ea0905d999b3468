"""The content of a file of a source, copied to where it is decoded."""

from pathlib import Path

from ursa import storage
from ursa.artifacts import FailureReason, SourceVideo
from ursa.config import IngestionConfig
from ursa.errors import StorageError
from ursa.sources import https
from ursa.sources.listing import object_member_etag
from ursa.sources.names import is_https, tar_of
from ursa.video.containers import Demuxer
from ursa.video.probe import QuarantinedError, copy_foreign_file

_DOWNLOAD_NAME = "download"


def copy_source(source: SourceVideo, folder: Path, config: IngestionConfig) -> tuple[str, Demuxer]:
    """Copy a file of a source to `folder/input` if it may be a video and is what was listed.

    Args:
        source: Result of `discover_videos`.
        folder: Private directory of the caller.
        config: Limits, and whether https addresses may be fetched from.

    Returns:
        sha256 of the content and the demuxer to use.

    Raises:
        QuarantinedError: If it cannot be used; `unavailable` if it is gone or has changed since it
            was listed.
        StorageError: If the store refuses or does not answer, or a disk is full.
    """
    if source.problem is not None:
        raise QuarantinedError(source.problem, source.detail)
    if source.num_bytes > config.max_file_bytes:
        # an object need not be fetched to know this
        raise QuarantinedError(
            FailureReason.FILE_TOO_LARGE,
            f"{source.num_bytes} bytes, expected at most {config.max_file_bytes}",
        )
    try:
        if is_https(source.uri):
            return _copy_address(source, folder, config)
        if storage.is_remote(source.uri):
            return _copy_object(source, folder, config)
        return _copy_local(source, folder, config)
    except FileNotFoundError as error:
        raise QuarantinedError(
            FailureReason.UNAVAILABLE, "it is gone since it was listed"
        ) from error


def _copy_local(source: SourceVideo, folder: Path, config: IngestionConfig) -> tuple[str, Demuxer]:
    if source.offset_bytes is None:
        sha256, demuxer = copy_foreign_file(storage.local_path(source.uri), folder, config)
    else:
        sha256, demuxer = copy_foreign_file(
            storage.local_path(tar_of(source.uri)),
            folder,
            config,
            offset_bytes=source.offset_bytes,
            num_bytes=source.num_bytes,
        )
    # what it holds now must not be kept under the hash of what it held
    _check_unchanged(source, sha256)
    return sha256, demuxer


def _copy_object(source: SourceVideo, folder: Path, config: IngestionConfig) -> tuple[str, Demuxer]:
    uri, start = source.uri, source.offset_bytes or 0
    if source.offset_bytes is not None:
        uri = tar_of(source.uri)
    download = folder / _DOWNLOAD_NAME
    # before: an object that has become shorter has no such range
    _check_unchanged(source, _object_etag(source, uri))
    storage.copy_range(uri, start, source.num_bytes, download)
    _check_unchanged(source, _object_etag(source, uri))
    if (num_bytes := download.stat().st_size) != source.num_bytes:
        # a part must not be kept under the etag of the whole
        raise StorageError(f"{source.uri}: got {num_bytes} of {source.num_bytes} bytes")
    return _take(download, folder, config)


def _object_etag(source: SourceVideo, uri: str) -> str:
    etag = storage.stat_file(uri).etag
    if source.offset_bytes is None:
        return etag
    return object_member_etag(etag, source.offset_bytes, source.num_bytes)


def _copy_address(
    source: SourceVideo, folder: Path, config: IngestionConfig
) -> tuple[str, Demuxer]:
    if not config.allow_https:
        raise QuarantinedError(FailureReason.REFUSED, "ingestion.allow_https is false")
    download = folder / _DOWNLOAD_NAME
    try:
        found = https.fetch(source.uri, download, max_bytes=config.max_file_bytes)
    except https.FetchError as error:
        if error.reason is FailureReason.FILE_TOO_LARGE:
            raise
        # it was there and allowed when it was listed, and may be again
        raise QuarantinedError(FailureReason.UNAVAILABLE, error.detail) from error
    _check_unchanged(source, found.etag)
    return _take(download, folder, config)


def _take(download: Path, folder: Path, config: IngestionConfig) -> tuple[str, Demuxer]:
    try:
        return copy_foreign_file(download, folder, config)
    finally:
        download.unlink()


def _check_unchanged(source: SourceVideo, etag: str) -> None:
    if etag != source.etag:
        raise QuarantinedError(FailureReason.UNAVAILABLE, "it has changed since it was listed")
