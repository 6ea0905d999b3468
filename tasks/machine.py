"""What `ursa doctor` checks of a machine: installation, room, store, services, open ports."""

import importlib
import ipaddress
import os
import platform
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import httpx
import psutil
from packaging.requirements import Requirement

from ursa import storage
from ursa.errors import UrsaError
from ursa.training.checkpoint import unfinished_checkpoints

State = Literal["ok", "note", "wrong", "mended"]

PACKAGE = "ursa-pipeline"
MIN_FREE_BYTES = 2 << 30
"""A run of the small preset keeps less; below it a full disk ends one soon."""
SAVE_AGE_S = 86_400.0
"""No save takes a day."""
MIN_FFMPEG = (8, 1)
"""Earlier ones have known holes, and PyAV reads foreign files with it (CVE-2026-40962)."""
ANSWER_LIMIT_S = 5.0
_DEFAULT_SECRETS = {
    "PREFECT_SERVER_API_AUTH_STRING": ("admin:pass", "admin:admin", "admin:password"),
    "PREFECT_API_AUTH_STRING": ("admin:pass", "admin:admin", "admin:password"),
    "AWS_SECRET_ACCESS_KEY": ("minioadmin", "password", "secret", "test"),
    "MLFLOW_TRACKING_PASSWORD": ("password", "password1234", "admin"),
}
"""What examples and documentation have; a secret that everybody knows is none."""
_MLFLOW_DEFAULT = ("admin", "password1234")
_SERVICE_WORDS = ("prefect", "mlflow", "ray", "raylet", "gcs_server", "ursa", "gunicorn", "uvicorn")


class Finding(NamedTuple):
    """One line of the doctor's table.

    Attributes:
        area: What it belongs to, such as "installation".
        state: "wrong" makes the exit status 1, "note" is only told.
        text: What was found.
        advice: What to do; nothing if there is nothing to do.
    """

    area: str
    state: State
    text: str
    advice: str = ""


def check_installation() -> Iterator[Finding]:
    """Compare installed versions with what the package needs, and load what reads videos.

    Yields:
        What is wrong, or one line that all is well.
    """
    problems = list(_package_problems())
    yield from problems
    if not problems:
        count = len(_requirements())
        yield Finding("installation", "ok", f"{count} packages, Python {platform.python_version()}")
    yield _decoder("av")
    if any(requirement.name == "decord" for requirement in _requirements()):
        yield _decoder("decord")


def check_room(data_uri: str) -> Iterator[Finding]:
    """Check that disks have room and that the store refuses to overwrite.

    Args:
        data_uri: The data root.

    Yields:
        One line a place.
    """
    places = {"temporary files": tempfile.gettempdir()}
    if not storage.is_remote(data_uri):
        places["data"] = str(storage.local_path(data_uri))
    for name, place in places.items():
        there = next(path for path in (Path(place), *Path(place).parents) if path.exists())
        free = shutil.disk_usage(there).free
        text = f"{free / 2**30:.1f} GiB free for {name} at {place}"
        if free < MIN_FREE_BYTES:
            advice = f"free some; a run needs {MIN_FREE_BYTES >> 30} GiB"
            yield Finding("disk", "wrong", text, advice)
        else:
            yield Finding("disk", "ok", text)
    if not storage.is_remote(data_uri) and not storage.local_path(data_uri).exists():
        advice = "the first run makes it; URSA_DATA_URI names another place"
        yield Finding("store", "note", f"there is no data root {data_uri} yet", advice)
        return
    try:
        storage.check_store(data_uri)
    except UrsaError as error:
        yield Finding("store", "wrong", str(error), "mend that, or set URSA_DATA_URI")
    else:
        yield Finding("store", "ok", f"{data_uri} can be written, and keeps what is there")


def check_checkpoints(data_uri: str, *, fix: bool) -> Iterator[Finding]:
    """Look for checkpoints that were never finished; nothing reads them, they take room.

    Args:
        data_uri: The data root.
        fix: Whether they are removed.

    Yields:
        One line, if there are any.
    """
    try:
        found = unfinished_checkpoints(data_uri, min_age_s=SAVE_AGE_S)
        for uri in found if fix else ():
            storage.remove_directory(uri)
    except UrsaError as error:
        yield Finding("store", "wrong", str(error), "mend that, or set URSA_DATA_URI")
        return
    if found:
        text = f"{len(found)} checkpoints, {sum(found.values()) / 2**30:.2f} GiB, were never "
        text += f"finished, the first of them {min(found)}"
        yield (
            Finding("store", "mended", f"{text}: removed")
            if fix
            else Finding("store", "note", text, "ursa doctor --fix removes them")
        )


def check_service(name: str, url: str, health: str) -> Finding:
    """Ask a server whether it is up; say who has its port if it is not.

    Args:
        name: Shown name.
        url: Its address.
        health: Path that answers 200 when it is up.

    Returns:
        One line; "wrong" if it does not answer.
    """
    if not url.startswith(("http://", "https://")):
        return Finding("services", "note", f"{name} at {url} is no server: nothing to ask")
    try:
        answer = httpx.get(f"{url.rstrip('/')}{health}", timeout=ANSWER_LIMIT_S, trust_env=False)
        if answer.status_code in {200, 401, 403}:
            return Finding("services", "ok", f"{name} answers at {url}")
        said = f"answered {answer.status_code}"
    except httpx.HTTPError as error:
        said = str(error) or type(error).__name__
    port = urlsplit(url).port
    owner = next((item for item in listeners() if item.port == port), None)
    if owner is None:
        advice = "`make up`, or set the address of yours"
        return Finding("services", "wrong", f"{name} does not answer at {url}: {said}", advice)
    return Finding(
        "services",
        "wrong",
        f"{name} does not answer at {url}: {said}; the port is used by {owner.process}",
        f"stop that, or take another port: URSA_{name.upper()}_PORT",
    )


class Listener(NamedTuple):
    """A socket that waits for connections.

    Attributes:
        host: Address that it is bound to.
        port: Its port.
        process: Name and pid of its process, as far as they may be seen.
        command: Its command line.
        has_token: Whether the process of a Ray cluster demands a token.
        is_embedded: Whether the process is one of `make up`.
    """

    host: str
    port: int
    process: str
    command: str
    has_token: bool
    is_embedded: bool

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        address = ipaddress.ip_address(self.host.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        return bool((mapped or address).is_loopback)


def listeners() -> list[Listener]:
    """Return all TCP sockets that wait for connections, by port."""
    found = []
    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:  # not allowed on some systems
        return []
    for connection in connections:
        if connection.status != psutil.CONN_LISTEN or not connection.laddr:
            continue
        name, command, has_token, is_embedded = "another process", "", False, False
        try:
            if connection.pid:
                process = psutil.Process(connection.pid)
                name = f"{process.name()} (pid {process.pid})"
                command = " ".join(process.cmdline())
                values = process.environ()
                has_token = values.get("RAY_AUTH_MODE", "").lower() == "token"
                is_embedded = "URSA_SERVICES" in values  # infra/local/services.py
        except psutil.Error:  # gone, or another user's
            pass
        host, port = connection.laddr.ip, connection.laddr.port
        found.append(Listener(host, port, name, command, has_token, is_embedded))
    return sorted(set(found), key=lambda item: (item.port, item.host))


def check_security(tracking_uri: str, prefect_url: str) -> Iterator[Finding]:
    """Look for ports that others reach, servers without a password, and passwords everybody knows.

    Args:
        tracking_uri: Address of the tracking server.
        prefect_url: Address of the Prefect server.

    Yields:
        What is wrong or worth knowing, or one line that nothing is.
    """
    found = [*_open_ports(), *_open_servers(tracking_uri, prefect_url), *_known_secrets()]
    yield from found
    if not any(item.state == "wrong" for item in found):
        yield Finding("security", "ok", "no service is open to others, no password is a known one")


def _requirements() -> list[Requirement]:
    """Return what the package needs on this machine, without extras."""
    try:
        lines = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    return [item for item in found if item.marker is None or item.marker.evaluate({"extra": ""})]


def _package_problems() -> Iterator[Finding]:
    requirements = _requirements()
    if not requirements:
        yield Finding("installation", "wrong", f"{PACKAGE} is not installed", "make setup")
    for requirement in requirements:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding("installation", "wrong", f"{requirement.name} is missing", "make setup")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            text = f"{requirement.name} {version} is installed, {requirement.specifier} is needed"
            yield Finding("installation", "wrong", text, "make setup")


def _decoder(name: str) -> Finding:
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:  # a library that it needs is missing
        return Finding("installation", "wrong", f"{name} cannot be loaded: {error}", "make setup")
    text = f"{name} {metadata.version(name)} loads"
    ffmpeg = str(getattr(module, "ffmpeg_version_info", ""))
    if not ffmpeg:
        return Finding("installation", "ok", text)
    numbers = re.match(r"n?(\d+)\.(\d+)", ffmpeg)
    text = f"{text}, with FFmpeg {ffmpeg}"
    if numbers and tuple(map(int, numbers.groups())) < MIN_FFMPEG:
        advice = f"it reads foreign files: at least FFmpeg {'.'.join(map(str, MIN_FFMPEG))}"
        return Finding("installation", "wrong", text, advice)
    return Finding("installation", "ok", text)


def _open_ports() -> Iterator[Finding]:
    for item in listeners():
        if item.is_loopback:
            continue
        text = f"port {item.port} is open to other machines on {item.host}: {item.process}"
        words = set(re.split(r"[\s/:_.=-]+", f"{item.process} {item.command}".lower()))
        if not words & set(_SERVICE_WORDS):
            yield Finding("security", "note", text)
        elif words & {"ray", "raylet", "gcs"} and item.has_token:
            yield Finding("security", "note", f"{text}; it demands a token")
        else:
            advice = "let it listen on 127.0.0.1, or put it behind a password and a firewall"
            yield Finding("security", "wrong", text, advice)


def _open_servers(tracking_uri: str, prefect_url: str) -> Iterator[Finding]:
    """Ask servers without a password, then with MLflow's old default one."""
    for name, url, path in (
        ("MLflow", tracking_uri, "/api/2.0/mlflow/experiments/search?max_results=1"),
        ("Prefect", prefect_url, "/api/admin/version"),
    ):
        if not url.startswith(("http://", "https://")):
            continue
        address = f"{url.rstrip('/')}{path}"
        try:
            status = httpx.get(address, timeout=ANSWER_LIMIT_S, trust_env=False).status_code
            known = httpx.get(
                address, timeout=ANSWER_LIMIT_S, trust_env=False, auth=_MLFLOW_DEFAULT
            ).status_code
        except httpx.HTTPError:
            continue  # it is not up, as another line says
        if status == 200 and is_remote_host(url):
            text = f"{name} at {url} answers everybody without a password"
            yield Finding("security", "wrong", text, "give it a password, or a loopback address")
        elif status != 200 and known == 200:
            text = f"{name} at {url} takes the password of its documentation"
            yield Finding("security", "wrong", text, "change it now: everybody knows it")


def is_remote_host(url: str) -> bool:
    """Whether an address is not one of this machine alone.

    Args:
        url: Address of a server.
    """
    host = urlsplit(url).hostname or ""
    try:
        found = {str(item[4][0]) for item in socket.getaddrinfo(host, None)}
    except OSError:
        return True
    return not all(ipaddress.ip_address(item.partition("%")[0]).is_loopback for item in found)


def is_embedded(url: str) -> bool:
    """Whether a server is one of `make up` on this machine, so that no other machine reaches it.

    A loopback address alone says nothing: a container, or a cluster behind a forwarded port, has
    one too.

    Args:
        url: Address of the server.
    """
    port = urlsplit(url).port
    found = [item for item in listeners() if item.port == port]
    is_own = bool(found) and all(item.is_loopback and item.is_embedded for item in found)
    return is_own and not is_remote_host(url)


def _known_secrets() -> Iterator[Finding]:
    for variable, values in _DEFAULT_SECRETS.items():
        if os.environ.get(variable) in values:
            text = f"{variable} is a value that everybody knows"
            yield Finding("security", "wrong", text, "take a secret of your own")
