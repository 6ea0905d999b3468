"""How files of a source are named: URIs, names as a person writes them, what may be a video."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

from ursa import storage
from ursa.artifacts import SourceVideo
from ursa.errors import DataError
from ursa.texts import host_of, secret_of_address

MANIFEST_SUFFIXES = (".csv", ".jsonl", ".parquet", ".txt")
TAR_SUFFIX = ".tar"
_OTHER_SUFFIXES = frozenset(
    {".txt", ".json", ".jsonl", ".md", ".vtt", ".srt", ".csv", ".tsv", ".yaml", ".yml", ".parquet"}
)


def is_https(uri: str) -> bool:
    """Whether a URI is an https address.

    Args:
        uri: Any URI or path.
    """
    return uri[:8].lower() == "https://"


def is_manifest(source_uri: str) -> bool:
    """Whether a source is a file that names the videos: .csv, .jsonl, .parquet or .txt.

    Args:
        source_uri: The source; a local directory is none, whatever its name.
    """
    if not source_uri.lower().endswith(MANIFEST_SUFFIXES) or is_https(source_uri):
        return False
    return storage.is_remote(source_uri) or storage.local_path(source_uri).is_file()


def is_tar(uri: str) -> bool:
    """Whether a file is taken for a tar file: by its name.

    Args:
        uri: A file or object.
    """
    return uri.lower().endswith(TAR_SUFFIX)


def is_candidate(name: str) -> bool:
    """Whether a file may be a video: it is not hidden and has not the name of a text.

    Args:
        name: Path of the file relative to the source.
    """
    # no Path: a listing asks for each file
    is_hidden = any(part.startswith(".") and part != "." for part in name.split("/"))
    return not is_hidden and os.path.splitext(name)[1].lower() not in _OTHER_SUFFIXES  # noqa: PTH122


def relative_namer(source_uri: str) -> Callable[[str], str]:
    """Return what gives the path of a file below the source, as a person would write it.

    Args:
        source_uri: The source.

    Returns:
        A function of the absolute URI of a file of it; of a member of a tar file the `#` and its
        name stay. Bytes that are no UTF-8 become surrogates, so that each file has another name.
    """
    is_remote = storage.is_remote(source_uri)
    root = source_uri if is_remote else storage.local_path(source_uri).absolute().as_uri()
    root = root.rstrip("/")

    def relative_name(uri: str) -> str:
        name = uri.removeprefix(root).lstrip("/") or last_segment(uri)
        return name if is_remote else unquote(name, errors="surrogateescape")

    return relative_name


def file_name(source: SourceVideo) -> str:
    """Return the file name of a video as a person would write it.

    Args:
        source: The video.
    """
    if source.offset_bytes is not None:
        return PurePosixPath(member_name(source.uri)).name
    if is_https(source.uri):
        return unquote(PurePosixPath(urlsplit(source.uri).path).name, errors="replace")
    name = last_segment(source.uri)
    return name if storage.is_remote(source.uri) else unquote(name, errors="replace")


def last_segment(uri: str) -> str:
    """Return what follows the last slash.

    Args:
        uri: Any URI.
    """
    return uri.rsplit("/", 1)[-1]


def member_uri(tar_uri: str, name: str) -> str:
    """Return the URI of a member of a tar file.

    Args:
        tar_uri: The tar file.
        name: The member; bytes that are no UTF-8 are surrogates, as `tarfile` gives them.
    """
    return f"{tar_uri}#{quote(name.encode('utf-8', 'surrogateescape'))}"


def member_name(uri: str) -> str:
    """Return the name of a member of a tar file.

    Args:
        uri: Result of `member_uri`.

    Returns:
        The name; bytes that are no UTF-8 are surrogates, as `tarfile` gives them.
    """
    return unquote_to_bytes(uri.rpartition("#")[2]).decode("utf-8", "surrogateescape")


def tar_of(uri: str) -> str:
    """Return the tar file of a member.

    Args:
        uri: Result of `member_uri`.
    """
    return uri.rpartition("#")[0]


def stand_in_etag(*parts: object) -> str:
    """Return an etag for what has none; it does not look like the sha256 of content.

    Args:
        *parts: All that tells it from others.
    """
    digest = hashlib.sha256(":".join(map(str, parts)).encode("utf-8", "replace")).hexdigest()
    return f"stand-in-{digest}"


def refuse_secret(uri: str) -> None:
    """Refuse an address that holds a secret: addresses are kept in tables and shown.

    Args:
        uri: Any URI or path.

    Raises:
        DataError: If it holds a user, a password, a signature or a token; does not show it.
    """
    scheme, is_uri, _ = uri.partition("://")
    found = secret_of_address(uri) if is_uri else None
    if found is not None:
        raise DataError(
            f"an address on {scheme}://{host_of(uri)} holds {found}; addresses are kept and "
            "shown, so give one without a secret, or the downloaded file"
        )


def resolve_name(manifest_uri: str, name: str) -> str:
    """Return the URI of a file that a manifest names.

    Args:
        manifest_uri: The manifest.
        name: Relative to the folder of the manifest, an absolute path, or an `s3://`, `file://`
            or `https://` URI.

    Raises:
        DataError: If the name is not allowed: another scheme, a secret in an address, a relative
            name that leads out of the folder, or a file of this machine in a manifest of an object
            store.
    """
    if not name or "\0" in name:
        raise DataError(f"{name!r} is no name of a file")
    refuse_secret(name)
    scheme, is_uri, rest = name.partition("://")
    if is_uri:
        return _checked_uri(manifest_uri, name, scheme.lower(), rest)
    if storage.is_remote(manifest_uri):
        if name.startswith("/"):
            raise DataError(_NO_LOCAL_FILES.format(name))
        parts = [part for part in name.split("/") if part != "."]
        if ".." in parts or not parts or not parts[-1]:
            raise DataError(_LEADS_OUT.format(name))
        # not `storage.join`: to a store a key with two slashes is another key
        return "/".join([manifest_uri.rpartition("/")[0], *parts])
    folder = os.path.abspath(storage.local_path(manifest_uri).parent)  # noqa: PTH100
    path = os.path.normpath(os.path.join(folder, name))  # noqa: PTH118  (a dot-dot goes first)
    is_inside = path.startswith(folder.rstrip("/") + "/") and _stays_inside(path, folder)
    if not os.path.isabs(name) and not is_inside:  # noqa: PTH117
        raise DataError(_LEADS_OUT.format(name))
    return Path(path).as_uri()


_LEADS_OUT = (
    "{!r} leads out of the folder of the manifest; write the absolute path or URI if it is meant"
)
_NO_LOCAL_FILES = "{!r} is a file of this machine, which a manifest on s3:// must not name"


def _checked_uri(manifest_uri: str, name: str, scheme: str, rest: str) -> str:
    if scheme == "https":
        return name
    if scheme == "s3" and all(rest.partition("/")):
        return f"s3://{rest}"
    if scheme == "file" and rest.removeprefix("localhost").startswith("/"):
        if storage.is_remote(manifest_uri):
            raise DataError(_NO_LOCAL_FILES.format(name))
        if "%00" in rest:
            raise DataError(f"{name!r} is no name of a file")
        return Path(os.path.normpath(storage.local_path(f"file://{rest}"))).as_uri()
    raise DataError(
        f"{name!r} is no address of a file; expected a path, s3://bucket/key, file:///path or "
        "https://host/path"
    )


def _stays_inside(path: str, folder: str) -> bool:
    """Whether a path has no link on its way that leads out of the folder."""
    parent = os.path.realpath(os.path.dirname(path))  # noqa: PTH120
    root = os.path.realpath(folder)
    return parent == root or parent.startswith(root.rstrip("/") + "/")
