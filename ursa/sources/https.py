"""Files from https addresses that others have written down, without being led astray by them.

An address may try to make this machine ask services that only it can reach (SSRF). So: https
alone, no user name, no unusual port, a host name that is no number in disguise; the name is
resolved once, every address that it has must be public, and the connection goes to the address
that was checked. Every redirect is judged in the same way. Proxies of the environment are not
used. Time and size are limited, and what comes is written to one file.
"""

import contextlib
import functools
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import SplitResult, urljoin, urlsplit

import urllib3
from urllib3.connection import HTTPSConnection
from urllib3.response import BaseHTTPResponse

from ursa.artifacts import FailureReason
from ursa.sources.names import stand_in_etag
from ursa.texts import without_user
from ursa.video.probe import QuarantinedError

FetchError = QuarantinedError
"""Why an address gives no file: `reason` and `detail`."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_MAX_ADDRESSES = 4
_CHUNK_BYTES = 1 << 16
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_GONE = frozenset({404, 410})
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "ursa-pipeline"}
# beyond what `ipaddress` of every supported Python calls not global
_REFUSED_NETWORKS = tuple(
    map(
        ipaddress.ip_network,
        (
            "0.0.0.0/8",
            "100.64.0.0/10",  # shared by carriers, and services of some clouds
            "168.63.129.16/32",  # the host of a machine in Azure
            "192.0.0.0/24",
            "192.88.99.0/24",  # 6to4 relays
            "198.18.0.0/15",
            "2001::/23",  # Teredo, ORCHID
            "2001:db8::/32",
            "2002::/16",  # 6to4: an IPv4 address in disguise
            "3fff::/20",
        ),
    )
)
# every IPv6 address that the internet routes; NAT64, mapped and local ones are outside
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet and to nothing else.

    Args:
        address: Any address; IPv4 addresses inside IPv6 ones are never public.
    """
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id or address not in _GLOBAL_UNICAST:
            return False
    elif address.is_multicast or address.is_reserved:
        return False
    is_refused = any(
        address in network for network in _REFUSED_NETWORKS if network.version == address.version
    )
    return address.is_global and not address.is_private and not is_refused


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host, as the system resolves it.

    Args:
        host: A name or address.
        port: Where the connection will go.

    Raises:
        OSError: If the name has none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(item[4][0]) for item in found))


@functools.cache
def system_tls() -> ssl.SSLContext:
    """Return settings that trust what the system trusts, or what SSL_CERT_FILE names."""
    return ssl.create_default_context()


class Rules(NamedTuple):
    """What may be fetched, and how long it may take.

    Attributes:
        resolve: Gives the addresses of a host.
        is_allowed: Judges an address.
        ports: Ports that may be asked.
        tls: Makes the settings of a connection; the default trusts what the system trusts.
        connect_s: Time for a connection, seconds.
        read_s: Longest silence of a server, seconds.
        deadline_s: Time for a whole file with all redirects, seconds.
        max_redirects: How many redirects are followed.
    """

    resolve: Callable[[str, int], list[str]] = resolve
    is_allowed: Callable[[Address], bool] = is_public
    ports: frozenset[int] = frozenset({443})
    tls: Callable[[], ssl.SSLContext] = system_tls
    connect_s: float = 10.0
    read_s: float = 30.0
    deadline_s: float = 900.0
    max_redirects: int = 3


RULES = Rules()


class RemoteFile(NamedTuple):
    """What a server says about a file.

    Attributes:
        num_bytes: Size; None if it does not say.
        etag: Hash of the address and of all that the server says about the version.
    """

    num_bytes: int | None
    etag: str


def look_up(url: str, rules: Rules | None = None) -> RemoteFile:
    """Ask for a file without reading it.

    Args:
        url: An https address.
        rules: What is allowed; None takes `RULES`.

    Returns:
        What the server says.

    Raises:
        FetchError: `refused` if the address or one that it leads to is not allowed, `missing` if
            the server has no such file, `unavailable` if it does not answer or says something
            else.
    """
    with _opened(url, rules or RULES) as (_, response):
        return _described(url, response)


def fetch(url: str, target: Path, *, max_bytes: int, rules: Rules | None = None) -> RemoteFile:
    """Write a file to a new local one.

    Args:
        url: An https address.
        target: Where it goes; must not exist. It may be there half-written after an error.
        max_bytes: Larger files are given up.
        rules: What is allowed; None takes `RULES`.

    Returns:
        What the server says.

    Raises:
        FetchError: As `look_up`; also `file_too_large`.
        OSError: If the file cannot be written.
    """
    with _opened(url, rules or RULES) as (clock, response):
        found = _described(url, response)
        if (found.num_bytes or 0) > max_bytes:
            raise _too_large(found.num_bytes, max_bytes)
        num_bytes = 0
        with target.open("xb") as file:
            while chunk := _read(url, response, clock):
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise _too_large(num_bytes, max_bytes)
                file.write(chunk)
    clock.check()
    if found.num_bytes is not None and num_bytes != found.num_bytes:
        raise FetchError(
            FailureReason.UNAVAILABLE, f"{num_bytes} bytes came, expected {found.num_bytes}"
        )
    return found


class _Clock:
    """Closes a connection when the time is up, whatever it is waiting for."""

    def __init__(self, deadline_s: float) -> None:
        self._end_s = time.monotonic() + deadline_s
        self._deadline_s = deadline_s

    def check(self) -> float:
        """Return the time that is left, seconds."""
        left_s = self._end_s - time.monotonic()
        if left_s <= 0:
            raise FetchError(FailureReason.UNAVAILABLE, f"not done after {self._deadline_s:g} s")
        return left_s

    @contextlib.contextmanager
    def watching(self, connection: HTTPSConnection) -> Iterator[None]:
        """Close the connection at the deadline: a server may send a byte now and then."""
        sock = connection.sock
        assert sock is not None, "connected"

        def close() -> None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

        timer = threading.Timer(self.check(), close)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


@contextlib.contextmanager
def _opened(url: str, rules: Rules) -> Iterator[tuple[_Clock, BaseHTTPResponse]]:
    """Yield the answer at the end of all redirects, with its body unread."""
    clock = _Clock(rules.deadline_s)
    with contextlib.ExitStack() as stack:
        yield clock, _followed(url, rules, clock, stack)


def _followed(
    url: str, rules: Rules, clock: _Clock, stack: contextlib.ExitStack
) -> BaseHTTPResponse:
    place = url
    for _ in range(rules.max_redirects + 1):
        with _named_errors(place, clock):
            response = _ask(place, rules, clock, stack)
        if response.status not in _REDIRECTS:
            _check_status(response)
            return response
        try:
            place = urljoin(place, response.headers.get("Location", ""))
        except ValueError as error:
            raise _refused(f"{_host(place)} redirects to what is no address") from error
    raise _refused(f"more than {rules.max_redirects} redirects")


@contextlib.contextmanager
def _named_errors(url: str, clock: _Clock) -> Iterator[None]:
    try:
        yield
    except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
        clock.check()
        raise FetchError(
            FailureReason.UNAVAILABLE,
            f"{_host(url)} does not answer: {str(error) or type(error).__name__}",
        ) from error


def _ask(url: str, rules: Rules, clock: _Clock, stack: contextlib.ExitStack) -> BaseHTTPResponse:
    parts, host, port = _checked(url, rules)
    addresses = _resolved(host, port, rules)
    connection = _connected(host, port, addresses, rules, clock)
    stack.callback(connection.close)
    stack.enter_context(clock.watching(connection))
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection.request(
        "GET", target, headers={**_HEADERS, "Host": parts.netloc}, preload_content=False
    )
    return connection.getresponse()


def _checked(url: str, rules: Rules) -> tuple[SplitResult, str, int]:
    """Take an address apart; whatever two programs may read in two ways is refused."""
    if not re.fullmatch(r"[!-~]+", url) or "\\" in url:
        raise _refused(f"{_shown(url)} has characters that must be percent-encoded")
    try:
        parts = urlsplit(url)
        port = parts.port or 443
    except ValueError as error:
        raise _refused(f"{_shown(url)} is no address: {error}") from error
    if parts.scheme != "https":
        raise _refused(f"{_shown(url)} is no https address")
    if "@" in parts.netloc:
        raise _refused("addresses with a user name are not fetched")
    if port not in rules.ports:
        raise _refused(f"port {port} of {parts.hostname!r}, expected {sorted(rules.ports)}")
    host = parts.hostname or ""
    if parts.netloc.startswith("["):
        if not re.fullmatch(r"\[[0-9a-fA-F:.]+\](:\d+)?", parts.netloc):
            raise _refused(f"{parts.netloc!r} is no IPv6 address")
        return parts, host, port
    labels = host.rstrip(".").split(".")
    if not re.fullmatch(r"[a-z0-9_.-]{1,253}", host) or not all(labels):
        raise _refused(f"{host!r} is no host name; write names of other scripts as xn--...")
    is_plain = re.fullmatch(r"(0|[1-9]\d{0,2})(\.(0|[1-9]\d{0,2})){3}", host)
    if re.fullmatch(r"\d+|0x[0-9a-f]*", labels[-1]) and not is_plain:
        raise _refused(f"{host!r} is a number in disguise; write a host name")
    return parts, host, port


def _resolved(host: str, port: int, rules: Rules) -> list[str]:
    try:
        found = rules.resolve(host, port)
        addresses = [ipaddress.ip_address(address) for address in found]
    except (OSError, ValueError) as error:
        raise FetchError(
            FailureReason.UNAVAILABLE, f"{host!r} cannot be resolved: {error}"
        ) from error
    for address in addresses:
        if not rules.is_allowed(address):
            # one bad address is enough: which of them is taken must not be left to chance
            raise _refused(f"{host!r} is {address}, which is not public")
    if not addresses:
        raise FetchError(FailureReason.UNAVAILABLE, f"{host!r} has no address")
    return [str(address) for address in addresses[:_MAX_ADDRESSES]]


def _connected(
    host: str, port: int, addresses: list[str], rules: Rules, clock: _Clock
) -> HTTPSConnection:
    """Connect to the first checked address that answers; the certificate must be the host's."""
    failure: Exception | None = None
    for address in addresses:
        connection = HTTPSConnection(
            address,
            port,
            timeout=min(rules.connect_s, clock.check()),
            ssl_context=rules.tls(),
            cert_reqs=ssl.CERT_REQUIRED,
            server_hostname=host.rstrip("."),
        )
        try:
            connection.connect()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            connection.close()
            failure = error
            if isinstance(error.__cause__ or error, ssl.SSLCertVerificationError):
                break
            continue
        assert connection.sock is not None, "connected"
        connection.sock.settimeout(rules.read_s)
        return connection
    hint = "; SSL_CERT_FILE names certificates to trust" if "certificate" in str(failure) else ""
    raise FetchError(FailureReason.UNAVAILABLE, f"{host} does not answer: {failure}{hint}")


def _check_status(response: BaseHTTPResponse) -> None:
    if response.status in _GONE:
        raise FetchError(FailureReason.MISSING, f"the server answers {response.status}")
    if response.status != 200:
        raise FetchError(FailureReason.UNAVAILABLE, f"the server answers {response.status}")
    coding = response.headers.get("Content-Encoding", "identity")
    if coding.lower() != "identity":
        raise FetchError(
            FailureReason.UNAVAILABLE, f"the server sends {coding!r}, expected plain bytes"
        )


def _read(url: str, response: BaseHTTPResponse, clock: _Clock) -> bytes:
    clock.check()
    with _named_errors(url, clock):
        return response.read1(_CHUNK_BYTES, decode_content=False)


def _described(url: str, response: BaseHTTPResponse) -> RemoteFile:
    headers = response.headers
    length = headers.get("Content-Length", "")
    num_bytes = int(length) if re.fullmatch(r"\d{1,18}", length) else None
    version = headers.get("ETag") or headers.get("Last-Modified")
    return RemoteFile(num_bytes, stand_in_etag("https", url, version, num_bytes))


def _host(url: str) -> str:
    with contextlib.suppress(ValueError):
        return urlsplit(url).hostname or url
    return url


def _shown(url: str) -> str:
    """Return an address without what may be a secret: a server may send one in a redirect."""
    return repr(without_user(url.partition("?")[0]))


def _refused(detail: str) -> QuarantinedError:
    return FetchError(FailureReason.REFUSED, detail)


def _too_large(num_bytes: int | None, max_bytes: int) -> QuarantinedError:
    return FetchError(
        FailureReason.FILE_TOO_LARGE, f"{num_bytes} bytes, expected at most {max_bytes}"
    )
