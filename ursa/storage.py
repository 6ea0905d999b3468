"""The only door to object storage and files: read, write, list, commit.

A URI is `s3://bucket/key`, `file:///absolute/percent-encoded/path` or a plain local path. Nothing
half-written is ever visible: local files are written beside their place and renamed, objects are
put in one request with a deadline. `put_if_absent` is the commit: of several writers one wins and
all learn what stands there. Credentials and the S3 endpoint come from the environment only
(`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`, ...).
"""

import contextlib
import errno
import hashlib
import itertools
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote_from_bytes, unquote_to_bytes, urlsplit

import tenacity
from pydantic import ValidationError
from safetensors import SafetensorError

from ursa.artifacts import SCHEMA_VERSION
from ursa.config import FrozenModel
from ursa.errors import (
    DataError,
    ManifestError,
    SchemaVersionError,
    StorageConfigurationError,
    StorageError,
)
from ursa.texts import host_of, secret_of_address, without_user

ANSWER_DEADLINE_S = 30.0
"""Of one request, beside the time that its bytes take; s3fs alone would wait for ever."""
MIN_BYTES_PER_S = 1 << 20
"""A transfer that is slower is abandoned and repeated."""
GET_DEADLINE_S = 300.0
"""Of a listing or of content whose size is not known before."""
BUSY_BUDGET_S = 60.0
"""So long after its first failure a call is repeated while the store is busy, silent or breaks
off: at least 12 answers of "slow down". With the deadlines of the first and the last try, a small
call gives up within 120 s."""
UNREACHABLE_BUDGET_S = 10.0
"""So long a call is repeated while nobody takes the connection: the address may be wrong."""
MANIFEST_LIMIT_BYTES = 64 << 20
NUM_READS = 3
"""So often a record is read before it counts as damaged: the answer of a store may be cut off."""
_RANGE_BYTES = 16 << 20
_PARALLEL_READS = 16
_PART_BYTES = 50 << 20
"""s3fs divides larger transfers into parts."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_HASH = "0" * 64
"""Stands in a record where its hash will be, while that is computed."""

Record = TypeVar("Record", bound=FrozenModel)


class StoredFile(NamedTuple):
    """A regular file in a listing; `etag` is the store's, or the sha256 of a local file."""

    uri: str
    num_bytes: int
    etag: str


def join(uri: str, *parts: str) -> str:
    """Append path segments to a URI or local path.

    Args:
        uri: Where to begin; slashes at its end are dropped.
        *parts: Segments; slashes at both of their ends are dropped.

    Returns:
        The longer URI or path.
    """
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def is_remote(uri: str) -> bool:
    """Whether the URI names an object store.

    Args:
        uri: Any URI or local path.

    Returns:
        True for `s3://` alone.
    """
    return uri.startswith("s3://")


def absolute_uri(uri: str) -> str:
    """Return the one spelling of all that name the same place.

    Of local files that is the absolute path without `.`, `..`, a slash at its end or `file://`;
    links are followed only where a `..` after them depends on it. Of objects, slashes around the
    key are dropped: listings leave them out as well. Of addresses, scheme and host are in lower
    case and the usual port is left out.

    Args:
        uri: Any URI, or a local path; `~` is expanded.

    Returns:
        An absolute URI or path.
    """
    scheme, is_uri, rest = uri.partition("://")
    if is_uri and scheme.lower() == "s3":
        bucket, _, key = rest.partition("/")
        return f"s3://{bucket}/{key.strip('/')}".rstrip("/") if bucket else uri
    if is_uri and scheme.lower() == "https":
        return _plain_address(uri)
    if not is_uri:
        return _plain_path(os.path.expanduser(uri))  # noqa: PTH111  (a Path ends at an unknown user)
    if scheme.lower() != "file":
        return uri
    path = _plain_path(str(local_path(f"file://{rest.removeprefix('localhost')}")))
    try:
        path.encode()
    except UnicodeEncodeError:  # no text, so no path in a record either
        return Path(path).as_uri()
    return path


def _plain_path(path: str) -> str:
    plain = os.path.abspath(path)  # noqa: PTH100  (`resolve` would follow all links)
    if ".." in path.split("/") and os.path.realpath(path) != os.path.realpath(plain):
        plain = os.path.realpath(path)  # a link comes before the dot-dot
    return f"/{plain.lstrip('/')}"


def _plain_address(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return url  # it is refused where it is fetched
    user, at, host = parts.netloc.rpartition("@")
    netloc = f"{user}{at}{host.lower().removesuffix(':443')}"
    return parts._replace(scheme="https", netloc=netloc, path=parts.path or "/").geturl()


def local_path(uri: str) -> Path:
    """Return the local path of a `file://` URI or plain path.

    Args:
        uri: `file://` URI, percent-encoded (its host may be `localhost`), or plain path, taken as
            it is.

    Raises:
        StorageConfigurationError: If the URI is of another kind, `s3://` among them, or has a NUL.
    """
    is_uri = uri.startswith("file://")
    path = uri
    if is_uri:
        path = uri.removeprefix("file://")
        path = path.removeprefix("localhost") if path.startswith("localhost/") else path
        path = os.fsdecode(unquote_to_bytes(path))
    if "\0" in path:
        raise StorageConfigurationError(f"{uri!r} is no name of a file")
    if not is_uri and "://" in uri:
        shown = repr(uri)
        if secret_of_address(uri):
            shown = f"{uri.partition('://')[0]}://{host_of(uri)}/..."
        raise StorageConfigurationError(
            f"unsupported URI {shown}; use s3://bucket/prefix, file:///path or a local path"
        )
    return Path(path)


def is_below(uri: str, folder_uri: str) -> bool:
    """Whether a place is below another one; links and `..` count as what they lead to.

    Args:
        uri: A file or object.
        folder_uri: Directory or prefix.
    """
    if is_remote(uri) != is_remote(folder_uri):
        return False
    if is_remote(uri):
        rest = uri.removeprefix(f"{folder_uri.rstrip('/')}/")
        return rest != uri and ".." not in rest.split("/")
    try:
        path, folder = (os.path.realpath(local_path(item)) for item in (uri, folder_uri))
    except (StorageConfigurationError, ValueError):
        return False
    return path.startswith(f"{folder.rstrip('/')}/")


def has_visible_place(uri: str, folder_uri: str) -> bool:
    """Whether a place is a folder itself or below it, under no name that begins with a dot.

    Args:
        uri: Directory or prefix.
        folder_uri: Directory or prefix.
    """
    place, folder = (item.rstrip("/") for item in (absolute_uri(uri), absolute_uri(folder_uri)))
    if not is_remote(place) and not is_remote(folder):
        place, folder = (os.path.realpath(local_path(item)) for item in (place, folder))
    rest = place.removeprefix(folder)
    return place == folder or (rest != place and rest.startswith("/") and "/." not in rest)


def path_inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a local folder whose name somebody else has chosen.

    Args:
        folder: A folder without links.
        name: Relative, with slashes.

    Raises:
        DataError: If it would be a path outside of the folder, or none.
    """
    parts = name.split("/")
    if {"", ".", ".."} & set(parts) or "\0" in name:
        raise DataError(f"{name[:200]!r} is no name of a file in a folder")
    return folder.joinpath(*parts)


def read_bytes(uri: str) -> bytes:
    """Return the whole content.

    Args:
        uri: A file or object.

    Raises:
        FileNotFoundError: If there is nothing at the URI.
        StorageError: If the store refuses or does not answer.
    """
    if not is_remote(uri):
        with _local_errors(uri):
            return local_path(uri).read_bytes()
    data: bytes = _s3_call("_cat_file", uri, deadline_s=GET_DEADLINE_S)
    return data


def write_bytes(uri: str, data: bytes) -> None:
    """Write the whole content at once, replacing what is there.

    Args:
        uri: A file or object; missing directories are made.
        data: The content.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    if is_remote(uri):
        _s3_call("_pipe_file", uri, data, **_transfer(len(data)))
        return
    with _local_errors(uri):
        _write_local(local_path(uri), data)


def put_if_absent(uri: str, data: bytes) -> bytes:
    """Write the content unless the URI is taken.

    Of several writers exactly one wins. A lost answer is read back, so the caller only has to
    compare the returned bytes with its own.

    Args:
        uri: A file or object; missing directories are made.
        data: The content.

    Returns:
        What stands at the URI afterwards.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    if is_remote(uri):
        with contextlib.suppress(FileExistsError):
            _s3_call("_pipe_file", uri, data, mode="create", **_transfer(len(data)))
            return data
        return read_bytes(uri)
    with _local_errors(uri):
        return _link_local(local_path(uri), data)


def put_named_by_hash(uri: str, data: bytes) -> None:
    """Write content under a name that holds its hash; whole content there is left alone.

    Args:
        uri: A file or object whose name could hold no other content.
        data: The content.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    if put_if_absent(uri, data) != data:
        write_bytes(uri, data)  # what stood there was damaged


def damage_of(uri: str, sha256: str) -> str | None:
    """Return what is wrong with a file or object whose hash is known; None if it is whole.

    Args:
        uri: A file or object.
        sha256: What it must have, 64 hexadecimal digits.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    try:
        found = hashlib.sha256(read_bytes(uri)).hexdigest()
    except FileNotFoundError:
        return "it is missing"
    if found != sha256:
        return f"sha256 is {found[:16]}..., expected {sha256[:16]}..."
    return None


def exists(uri: str) -> bool:
    """Whether a file or object stands at the URI.

    Args:
        uri: A file or object; a local directory is none.

    Returns:
        True if it is there.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    if not is_remote(uri):
        with _local_errors(uri):
            return local_path(uri).is_file()
    try:
        _s3_call("_info", uri, deadline_s=ANSWER_DEADLINE_S)
    except FileNotFoundError:
        return False
    return True


def size_bytes(uri: str) -> int:
    """Return the size of a file or object, bytes.

    Args:
        uri: A file or object.

    Raises:
        FileNotFoundError: If there is nothing at the URI.
        StorageError: If the store refuses or does not answer.
    """
    if not is_remote(uri):
        with _local_errors(uri):
            return local_path(uri).stat().st_size
    info: dict[str, Any] = _s3_call("_info", uri, deadline_s=ANSWER_DEADLINE_S)
    return int(info["size"])


def modified_s(uri: str) -> float:
    """Return when a file or object was written last, seconds since 1970.

    Args:
        uri: A file or object.

    Raises:
        FileNotFoundError: If there is nothing at the URI.
        StorageError: If the store refuses or does not answer.
    """
    if not is_remote(uri):
        with _local_errors(uri):
            return local_path(uri).stat().st_mtime
    info: dict[str, Any] = _s3_call("_info", uri, deadline_s=ANSWER_DEADLINE_S)
    return float(info["LastModified"].timestamp())


def list_files(uri: str, *, with_etag: bool = True) -> list[StoredFile]:
    """List all regular files below a URI, sorted by URI; links and pipes are not followed.

    Args:
        uri: Directory or prefix.
        with_etag: Local files are hashed for their etag; False leaves it empty.

    Returns:
        Regular files with absolute URIs; of a URI that is itself a file, that file.

    Raises:
        FileNotFoundError: If the directory does not exist or the prefix holds nothing.
        StorageError: If the store refuses or does not answer.
    """
    if is_remote(uri):
        found: dict[str, dict[str, Any]] = _s3_call(
            "_find", uri, detail=True, deadline_s=GET_DEADLINE_S
        )
        if not found:
            raise FileNotFoundError(errno.ENOENT, "nothing below this prefix", uri)
        return sorted(
            StoredFile(f"s3://{key}", int(info["size"]), str(info.get("ETag", "")).strip('"'))
            for key, info in found.items()
            if info["type"] == "file" and not key.endswith("/")
        )
    root = local_path(uri)
    with _local_errors(uri):
        if root.is_file():
            found_files = iter([_regular_file(str(root), root.absolute().as_uri(), with_etag)])
        elif root.is_dir():
            found_files = (
                _regular_file(path, file_uri, with_etag) for path, file_uri in _walk(root)
            )
        else:
            raise FileNotFoundError(errno.ENOENT, "no such file or directory", uri)
        return sorted(item for item in found_files if item is not None)


def _walk(root: Path) -> Iterator[tuple[str, str]]:
    """Yield path and URI of all names below a directory that are no directories.

    A `Path` for each would take most of the time of a listing.
    """
    for folder, _, names in os.walk(root.absolute(), onerror=_raise):
        folder_uri = Path(folder).as_uri().rstrip("/")
        for name in names:
            yield f"{folder}/{name}", f"{folder_uri}/{quote_from_bytes(os.fsencode(name))}"


def _regular_file(path: str, uri: str, with_etag: bool) -> StoredFile | None:  # noqa: FBT001
    """Describe a file; None if it is not regular or has gone, as temporary files of others do."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            return None
        etag = sha256_file(Path(path)) if with_etag else ""
    except FileNotFoundError:
        return None
    return StoredFile(uri, status.st_size, etag)


def stat_file(uri: str) -> StoredFile:
    """Look up one regular file or object.

    Args:
        uri: A file or object.

    Returns:
        Size and etag; the etag of a local file is empty, its content is not read.

    Raises:
        FileNotFoundError: If there is no such object, or no regular file.
        StorageError: If the store refuses or does not answer.
    """
    if not is_remote(uri):
        with _local_errors(uri):
            status = local_path(uri).lstat()
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, "no regular file", uri)
        return StoredFile(uri, status.st_size, "")
    info = _s3_call("_info", uri, deadline_s=ANSWER_DEADLINE_S)
    if info["type"] != "file":
        raise FileNotFoundError(errno.ENOENT, "no object of this name", uri)
    return StoredFile(uri, int(info["size"]), str(info.get("ETag", "")).strip('"'))


def read_range(uri: str, start: int, num_bytes: int) -> bytes:
    """Return a part of a file or object; less where it ends sooner.

    Args:
        uri: A file or object.
        start: First byte, from 0.
        num_bytes: How many.

    Raises:
        FileNotFoundError: If there is nothing at the URI.
        StorageError: If the store refuses or does not answer.
    """
    if num_bytes <= 0:
        return b""
    if not is_remote(uri):
        with _local_errors(uri), local_path(uri).open("rb") as file:
            file.seek(start)
            return file.read(num_bytes)
    data: bytes = _s3_call(
        "_cat_file", uri, start=start, end=start + num_bytes, deadline_s=GET_DEADLINE_S
    )
    return data


def copy_range(uri: str, start: int, num_bytes: int, target: Path) -> None:
    """Write a part of a file or object to a new local file, some MiB at a time.

    Args:
        uri: A file or object.
        start: First byte, from 0.
        num_bytes: How many; fewer are written where the file ends sooner.
        target: The file, which must not exist yet.

    Raises:
        FileNotFoundError: If there is nothing at the URI.
        FileExistsError: If the target exists.
        StorageError: If the store refuses or does not answer.
    """
    with target.open("xb") as file:
        for offset in range(0, num_bytes, _RANGE_BYTES):
            file.write(read_range(uri, start + offset, min(_RANGE_BYTES, num_bytes - offset)))


def list_folder(uri: str) -> list[StoredFile]:
    """List the objects right below a prefix, sorted by URI.

    Args:
        uri: An `s3://` prefix.

    Returns:
        The objects; none if there is no such prefix.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    try:
        found: list[dict[str, Any]] = _s3_call("_ls", uri, detail=True, deadline_s=GET_DEADLINE_S)
    except FileNotFoundError:
        return []
    return sorted(
        StoredFile(f"s3://{info['name']}", int(info["size"]), str(info.get("ETag", "")).strip('"'))
        for info in found
        if info["type"] == "file" and not info["name"].endswith("/")
    )


def list_irregular_files(uri: str) -> list[str]:
    """List the URIs of links, pipes, sockets and devices below a local directory, sorted.

    They are never opened or followed. An object store holds none.

    Args:
        uri: Directory or prefix.

    Returns:
        Absolute URIs.

    Raises:
        StorageError: If a directory cannot be read.
    """
    if is_remote(uri):
        return []
    root = local_path(uri)
    with _local_errors(uri):
        if not root.is_dir():
            return [root.absolute().as_uri()] if root.is_symlink() else []
        paths = (
            f"{folder}/{name}"
            for folder, folders, names in os.walk(root, onerror=_raise)
            for name in (*names, *(n for n in folders if (Path(folder) / n).is_symlink()))
        )
        return sorted(
            Path(path).absolute().as_uri()
            for path in paths
            if not stat.S_ISREG(os.lstat(path).st_mode)
        )


def _raise(error: OSError) -> None:
    """Let `os.walk` fail: a directory that cannot be read must not look empty; one may go."""
    if not isinstance(error, FileNotFoundError):
        raise error


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """Yield a local path with the content: the file itself, or a download that is removed.

    Args:
        uri: A file or object.

    Yields:
        The path; it must not be written to.

    Raises:
        FileNotFoundError: If there is no such object; of a local file the reader learns it.
        StorageError: If the store refuses or does not answer.
    """
    if not is_remote(uri):
        yield local_path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="ursa-") as folder:
        target = Path(folder) / "content"
        _download(uri, target, size_bytes(uri))
        yield target


@contextlib.contextmanager
def scratch_directory(purpose: str) -> Iterator[Path]:
    """Yield a private local directory that is removed at the end.

    Args:
        purpose: Part of its name.

    Raises:
        StorageConfigurationError: If the disk under it runs full.
    """
    with tempfile.TemporaryDirectory(prefix=f"ursa-{purpose}-", ignore_cleanup_errors=True) as name:
        try:
            yield Path(name)
        except (OSError, SafetensorError) as error:
            # safetensors writes the number of the error into its message
            number = error.errno if isinstance(error, OSError) else None
            if number not in _DISK_FULL and not any(
                f"os error {full})" in str(error) for full in _DISK_FULL
            ):
                raise
            raise StorageConfigurationError(
                f"disk full while writing to {name} ({purpose}); free some space there or set "
                "TMPDIR to another directory, then run again: finished work is kept"
            ) from error


def upload_file(path: Path, uri: str) -> None:
    """Copy a local file to a URI, visible only when whole.

    Args:
        path: The local file.
        uri: Where it goes; what stands there is replaced.

    Raises:
        FileNotFoundError: If there is no such local file.
        StorageError: If the store refuses or does not answer.
    """
    if is_remote(uri):
        transfer = _transfer(path.stat().st_size)
        _s3_call("_put_file", uri, str(path), source_first=True, **transfer)
        return
    with _local_errors(uri):
        _copy_local(path, local_path(uri))


def unique_place(uri: str, *parts: str) -> str:
    """Return a place below a URI that no other writer has, however often it is asked for.

    What is uploaded there cannot be overwritten by another run; the record that names it decides
    which of several copies counts.

    Args:
        uri: Where to begin.
        *parts: Segments below the place.
    """
    return join(uri, secrets.token_hex(4), *parts)


def upload_directory(folder: Path, uri: str) -> dict[str, str]:
    """Copy all files of a directory.

    Args:
        folder: Local directory.
        uri: Where its files go; what stands there is replaced.

    Returns:
        sha256 of every file, 64 hexadecimal digits, by its path relative to the directory.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    hashes: dict[str, str] = {}
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        relative = path.relative_to(folder).as_posix()
        upload_file(path, join(uri, relative))
        hashes[relative] = sha256_file(path)
    return hashes


@contextlib.contextmanager
def local_directory(uri: str) -> Iterator[Path]:
    """Yield a local directory with all files below the URI; remote ones are downloaded.

    Args:
        uri: Directory or prefix.

    Yields:
        The directory; it must not be written to.

    Raises:
        DataError: If a key of an object leads out of the prefix.
        FileNotFoundError: If a prefix holds nothing; of a local directory the reader learns it.
        StorageError: If the store refuses or does not answer.
    """
    if not is_remote(uri):
        yield local_path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="ursa-") as folder:
        for item in list_files(uri):
            target = path_inside(Path(folder), item.uri.removeprefix(uri.rstrip("/") + "/"))
            target.parent.mkdir(parents=True, exist_ok=True)
            _download(item.uri, target, item.num_bytes)
        yield Path(folder)


def remove_directory(uri: str) -> None:
    """Delete everything below a URI; nothing there is fine.

    Args:
        uri: Directory or prefix.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    if is_remote(uri):
        with contextlib.suppress(FileNotFoundError):
            _s3_call("_rm", uri, recursive=True, deadline_s=GET_DEADLINE_S)
        return
    with _local_errors(uri), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(local_path(uri))


def load_record(uri: str, kind: type[Record]) -> Record | None:
    """Read a committed record.

    Args:
        uri: The manifest.
        kind: Class of the record.

    Returns:
        The record; None when it was never committed.

    Raises:
        ManifestError: If it is damaged, too large, of another class or another schema version.
        StorageError: If the store refuses or does not answer.
    """
    try:
        data = read_bytes(uri)
    except FileNotFoundError:
        return None
    return parse_record(uri, data, kind)


def load_lasting(uri: str, kind: type[Record]) -> Record | None:
    """Read a committed record; one that looks damaged is read `NUM_READS` times.

    For those who go on without a damaged record, or remove it: an answer that was cut off, or a
    bit that flipped on the way, must not be taken for damage.

    Args:
        uri: The manifest.
        kind: Class of the record.

    Returns:
        The record; None when it was never committed.

    Raises:
        ManifestError: If it is damaged each time, of another class or another schema version.
        StorageError: If the store refuses or does not answer.
    """
    for _ in range(NUM_READS - 1):
        with contextlib.suppress(ManifestError):
            return load_record(uri, kind)
    return load_record(uri, kind)


def load_records(uris: Sequence[str], kind: type[Record]) -> list[Record | None]:
    """Read many committed records at once: an object store answers many requests as soon as one.

    Args:
        uris: The manifests.
        kind: Class of the records.

    Returns:
        For each the record; None when it was never committed.

    Raises:
        ManifestError: If one is damaged, too large, of another class or another schema version.
        StorageError: If the store refuses or does not answer.
    """
    if not any(is_remote(uri) for uri in uris):
        return [load_record(uri, kind) for uri in uris]
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        return list(pool.map(load_record, uris, itertools.repeat(kind)))


def commit_record(uri: str, record: Record) -> Record:
    """Commit a record if there is none yet.

    Args:
        uri: The manifest.
        record: What to commit.

    Returns:
        The record that stands there, whoever committed it.

    Raises:
        ManifestError: If what stands there is damaged, of another class or another schema version;
            or if the record is too large to be read again: then nothing is written.
        StorageError: If the store refuses or does not answer.
    """
    envelope = _Envelope(
        schema_version=SCHEMA_VERSION,
        kind=type(record).__name__,
        sha256=_NO_HASH,
        record=record.model_dump(mode="json"),
    )
    data = envelope.model_dump_json(indent=1).encode()
    if len(data) > MANIFEST_LIMIT_BYTES:
        raise ManifestError(
            f"{uri}: the {envelope.kind} to be written has {len(data)} bytes, a record may have at "
            f"most {MANIFEST_LIMIT_BYTES}; divide the source, or the file that it is about"
        )
    data = data.replace(_NO_HASH.encode(), _hash_of(data, _NO_HASH).encode(), 1)
    return parse_record(uri, put_if_absent(uri, data), type(record))


def check_store(uri: str, *, min_free_bytes: int = 256 << 20) -> None:
    """Refuse a place that cannot be written, has no room, or has no conditional writes.

    Args:
        uri: Directory, made if missing, or prefix.
        min_free_bytes: Room that a local disk must have.

    Raises:
        StorageConfigurationError: With what is wrong and what to do.
        StorageError: If the store does not answer.
    """
    if not is_remote(uri):
        with _local_errors(uri):
            local_path(uri).mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(local_path(uri)).free
        if free < min_free_bytes:
            raise StorageConfigurationError(
                f"disk full: {free >> 20} MB free at {uri}, expected at least "
                f"{min_free_bytes >> 20} MB; free some space or choose another directory"
            )
    probe = join(uri, f".probe-{secrets.token_hex(8)}")
    put_if_absent(probe, b"first")
    try:
        if put_if_absent(probe, b"second") != b"first":
            raise StorageConfigurationError(
                f"{uri}: the store overwrites existing objects (no conditional writes); use a "
                "store that honours If-None-Match, such as Amazon S3 or MinIO"
            )
    finally:
        with contextlib.suppress(FileNotFoundError, StorageError):
            remove_file(probe)


def remove_file(uri: str) -> None:
    """Delete one file or object.

    Args:
        uri: A file or object.

    Raises:
        FileNotFoundError: If there is no such local file.
        StorageError: If the store refuses or does not answer.
    """
    if is_remote(uri):
        _s3_call("_rm_file", uri, deadline_s=ANSWER_DEADLINE_S)
        return
    with _local_errors(uri):
        local_path(uri).unlink()


def sha256_file(path: Path) -> str:
    """Return the sha256 of a local file, 64 hexadecimal digits.

    Args:
        path: The file.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Envelope(FrozenModel):
    schema_version: int
    kind: str
    sha256: str | None = None
    """Of the whole file with zeros in this place; None in files of older versions."""
    record: dict[str, Any]


class _Sealed(FrozenModel, Generic[Record]):
    """An envelope whose record is of a known class."""

    schema_version: int
    kind: str
    sha256: str | None = None
    record: Record


def parse_record(uri: str, data: bytes, kind: type[Record]) -> Record:
    """Read a record from the bytes of its file.

    Args:
        uri: Where they are from, for errors.
        data: The bytes.
        kind: Class of the record.

    Raises:
        SchemaVersionError: If it is whole, but of another schema version.
        ManifestError: If it is damaged, too large or of another class.
    """
    with contextlib.suppress(ValidationError):
        # in one go it takes half of the time; what is wrong, if anything is, is found below
        sealed = _Sealed[kind].model_validate_json(data)  # type: ignore[valid-type]
        if (
            len(data) <= MANIFEST_LIMIT_BYTES
            and (sealed.schema_version, sealed.kind) == (SCHEMA_VERSION, kind.__name__)
            and (sealed.sha256 is None or _hash_of(data, sealed.sha256) == sealed.sha256)
        ):
            return sealed.record
    envelope = _open(uri, data)
    if envelope.schema_version != SCHEMA_VERSION or envelope.kind != kind.__name__:
        found = (
            f"{uri}: holds {envelope.kind} of schema version {envelope.schema_version}, "
            f"expected {kind.__name__} of version {SCHEMA_VERSION}"
        )
        if envelope.schema_version == SCHEMA_VERSION:
            raise ManifestError(found)
        raise SchemaVersionError(
            f"{found}; records of another version are read by the release that wrote them: go back "
            "to it, or begin in an empty root"
        )
    try:
        return kind.model_validate(envelope.record)
    except ValidationError as error:
        raise ManifestError(f"{uri}: {kind.__name__} is damaged: {error}") from error


def holds_hash(uri: str, data: bytes) -> bool:
    """Whether a record holds the hash of its own file, so that every changed bit is noticed.

    Args:
        uri: Where it is from, for errors.
        data: The bytes of the file.

    Raises:
        ManifestError: If it is damaged or too large.
    """
    return _open(uri, data).sha256 is not None


def _open(uri: str, data: bytes) -> _Envelope:
    if len(data) > MANIFEST_LIMIT_BYTES:
        raise ManifestError(
            f"{uri}: {len(data)} bytes, expected at most {MANIFEST_LIMIT_BYTES}; {_WHAT_TO_DO}"
        )
    try:
        envelope = _Envelope.model_validate_json(data)
    except ValidationError as error:
        raise ManifestError(
            f"{uri}: not a manifest ({error.error_count()} errors); {_WHAT_TO_DO}"
        ) from error
    if envelope.sha256 is not None and _hash_of(data, envelope.sha256) != envelope.sha256:
        raise ManifestError(f"{uri} is damaged: it does not have the sha256 in it; {_WHAT_TO_DO}")
    return envelope


_WHAT_TO_DO = "`ursa data repair` mends it or says what to do"


def _hash_of(data: bytes, stated: str) -> str:
    """Return the sha256 of a record's file without the one that is stated in it."""
    return hashlib.sha256(data.replace(stated.encode(), _NO_HASH.encode(), 1)).hexdigest()


# another run may remove the directory at any moment, as one does that has finished the same work
_unless_removed = tenacity.retry(
    retry=tenacity.retry_if_exception_type(FileNotFoundError),
    stop=tenacity.stop_after_attempt(3),
    reraise=True,
)


@_unless_removed
def _write_local(path: Path, data: bytes) -> None:
    with _temporary_beside(path, data) as temporary:
        temporary.replace(path)


@_unless_removed
def _link_local(path: Path, data: bytes) -> bytes:
    with _temporary_beside(path, data) as temporary:
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
            _sync_directory(path.parent)
            return data
        return path.read_bytes()


@_unless_removed
def _copy_local(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        shutil.copyfile(source, temporary)
        _sync_file(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _temporary_beside(path: Path, data: bytes) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _local_errors(uri: str) -> Iterator[None]:
    """Turn operating system errors into errors that say what to do."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise StorageConfigurationError(
                f"{uri}: a file stands where a directory is needed; choose another directory"
            ) from error
        if error.errno in _DISK_FULL:
            raise StorageConfigurationError(
                f"disk full while writing {uri}; free some space, then run again: finished work "
                "is kept"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageConfigurationError(
                f"no permission at {uri} ({error.strerror}); choose another directory"
            ) from error
        raise StorageError(f"{uri}: {error.strerror or error}") from error


def _filesystem(attempts: int) -> Any:
    import s3fs  # noqa: PLC0415  (0.5 s, not needed for local runs)

    filesystem = s3fs.S3FileSystem(
        use_listings_cache=False,
        config_kwargs={
            "retries": {"mode": "standard", "max_attempts": attempts},
            "connect_timeout": 5,
            "read_timeout": ANSWER_DEADLINE_S,
        },
    )
    # one loop of repetition is enough: with others inside, a wrong address takes minutes
    filesystem.retries = 1
    return filesystem


def _download(uri: str, target: Path, num_bytes: int) -> None:
    """Copy an object to a local file; a part of it is never taken for the whole."""
    _s3_call("_get_file", uri, str(target), **_transfer(num_bytes))
    found = target.stat().st_size
    if found != num_bytes:
        raise StorageError(
            f"{uri}: {found} of {num_bytes} bytes arrived; check the store, then run again"
        )


def _transfer(num_bytes: int) -> dict[str, Any]:
    """Return how to move so many bytes: only the parts of a divided transfer are repeated alone."""
    return {
        "deadline_s": ANSWER_DEADLINE_S + num_bytes / MIN_BYTES_PER_S,
        "attempts": 5 if num_bytes > _PART_BYTES else 1,
    }


class _TransientError(Exception):
    """The call may succeed if repeated for `budget_s` seconds after its first failure."""

    def __init__(self, message: str, budget_s: float) -> None:
        super().__init__(message)
        self.budget_s = budget_s


def _refuse_missing_bucket(uri: str, error: OSError) -> None:
    if _answer_of(error)[1] == "NoSuchBucket":
        raise StorageConfigurationError(
            f"{uri}: there is no such bucket; make it or correct the URI"
        ) from error


def _answer_of(error: BaseException) -> tuple[int, str]:
    """Return status and code of the answer that an error of s3fs stands for; 0 if none came."""
    answer: dict[str, Any] = getattr(error.__cause__, "response", None) or {}
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(answer.get("Error", {}).get("Code", ""))


def _refuse_permanent(uri: str, error: Exception) -> None:
    """Raise what another try cannot change."""
    import botocore.exceptions as boto  # noqa: PLC0415

    code = _answer_of(error)[1]
    if code in ("PreconditionFailed", "412"):
        # stores that do not say which condition failed: we make only one
        raise FileExistsError(errno.EEXIST, "there is such an object", uri) from error
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        raise StorageConfigurationError(
            f"{uri}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    if code == "RequestTimeTooSkewed":
        raise StorageConfigurationError(
            f"{uri}: the clock of this machine differs from the store's ({error}); set the clock"
        ) from error
    if isinstance(error, PermissionError):
        raise StorageConfigurationError(
            f"{uri}: access denied ({without_user(str(error))}); check the S3 credentials and "
            "bucket policy"
        ) from error
    if getattr(error, "errno", None) in _DISK_FULL:
        raise StorageConfigurationError(
            f"disk full while downloading {uri}; free some space in TMPDIR, then run again"
        ) from error


def _transient(error: Exception, deadline_s: float) -> _TransientError:
    """Say how long it is worth to repeat a call that failed so."""
    import botocore.exceptions as boto  # noqa: PLC0415
    from fsspec.exceptions import FSTimeoutError  # noqa: PLC0415

    text = str(error) or type(error).__name__
    if isinstance(error, FSTimeoutError):
        return _TransientError(f"no answer within {deadline_s:.3g} s", BUSY_BUDGET_S)
    inner = getattr(error, "kwargs", {}).get("error")  # aiobotocore gives both one class
    was_reset = getattr(inner, "errno", None) in (errno.ECONNRESET, errno.EPIPE)
    if isinstance(error, boto.ConnectionError) and not was_reset:
        hint = f"{text}; check AWS_ENDPOINT_URL and the network"
        return _TransientError(hint, UNREACHABLE_BUDGET_S)
    status, code = _answer_of(error)
    broke_off = status == 0 and not isinstance(error, boto.BotoCoreError)
    broke_off |= isinstance(error, boto.HTTPClientError | boto.IncompleteReadError)
    is_busy = status >= 500 or status in (408, 409, 429) or code in _BUSY_CODES
    if was_reset or broke_off or is_busy:
        return _TransientError(text, BUSY_BUDGET_S)
    return _TransientError(text, 0.0)


_BUSY_CODES = ("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch")


def _s3_call(
    method: str,
    uri: str,
    *arguments: Any,
    deadline_s: float,
    attempts: int = 1,
    source_first: bool = False,
    **options: Any,
) -> Any:
    """Run one coroutine of s3fs with a deadline; repeat what may succeed, name what cannot."""
    if found := secret_of_address(uri):  # botocore would repeat it as the name of a bucket
        raise StorageConfigurationError(
            f"the address of an object holds {found}; give it without, and the credentials in "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    import botocore.exceptions  # noqa: PLC0415
    from fsspec.asyn import sync  # noqa: PLC0415
    from s3fs.core import S3_RETRYABLE_ERRORS  # noqa: PLC0415

    def once() -> Any:
        filesystem = _filesystem(attempts)
        where = uri.removeprefix("s3://")
        call = (*arguments, where) if source_first else (where, *arguments)
        try:
            return sync(
                filesystem.loop, getattr(filesystem, method), *call, timeout=deadline_s, **options
            )
        except (FileNotFoundError, FileExistsError) as error:
            _refuse_missing_bucket(uri, error)
            raise
        except (*S3_RETRYABLE_ERRORS, botocore.exceptions.BotoCoreError, OSError) as error:
            _refuse_permanent(uri, error)
            raise _transient(error, deadline_s) from error

    failures_s: list[float] = []

    def has_lasted(state: tenacity.RetryCallState) -> bool:
        failures_s.append(time.monotonic())
        error = state.outcome.exception() if state.outcome else None
        budget_s = error.budget_s if isinstance(error, _TransientError) else 0.0
        return failures_s[-1] + state.upcoming_sleep - failures_s[0] > budget_s

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_TransientError),
        stop=has_lasted,
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=5),
        reraise=True,
    )
    try:
        return retrying(once)
    except _TransientError as error:
        tries = f"{len(failures_s)} tries" if len(failures_s) > 1 else "1 try"
        raise StorageError(
            f"{uri}: the object store cannot be reached ({tries}): {without_user(str(error))}"
        ) from error
