"""Addresses that try to reach this machine, against servers on loopback; nothing goes out."""

import contextlib
import http.server
import ipaddress
import socket
import ssl
import threading
import time

import pytest

from tests.https_server import certificate
from ursa.artifacts import FailureReason
from ursa.errors import DataError
from ursa.sources import https
from ursa.sources.https import FetchError, Rules, fetch, is_public, look_up
from ursa.sources.listing import discover_videos

CONTENT = bytes(range(256)) * 1000
PRIVATE = "127.0.0.2"
"""Where the canary listens; the server that may be asked listens at 127.0.0.1."""


class Canary:
    """Counts connections."""

    def __init__(self):
        self.listener = socket.create_server((PRIVATE, 0))
        self.port = self.listener.getsockname()[1]
        self.hits = 0
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.hits += 1
                connection.close()


@pytest.fixture(scope="module")
def canary():
    canary = Canary()
    yield canary
    canary.listener.close()


def numeric(host, port):
    """Resolve as the C library does, without asking anybody: 127.1, 0x7f.1, 2130706434, names."""
    if host in NAMES:
        return NAMES[host]
    with contextlib.suppress(OSError):
        return [socket.inet_ntoa(socket.inet_aton(host))]
    with contextlib.suppress(ValueError):
        return [str(ipaddress.ip_address(host))]
    raise OSError(f"no such host: {host}")


NAMES = {
    "localhost": [PRIVATE],
    "localhost.": [PRIVATE],
    "metadata.google.internal": ["169.254.169.254"],
    "both.test": ["93.184.216.34", PRIVATE],
    "six.test": ["::1"],
    "mapped.test": [f"::ffff:{PRIVATE}"],
    "scoped.test": ["fe80::1%lo"],
    "zero.test": ["0.0.0.0"],
    "xn--bcher-kva.test": [PRIVATE],
    "bad.test": ["no address"],
}

FORMS = [
    # numbers
    *("127.0.0.2", "127.2", "127.0.2", "2130706434", "0x7f000002", "0x7f.0.0.2", "0177.0.0.2"),
    *("017700000002", "127.0.0.0x2", "0x7f.2", "127.0.0.2.", "00127.0.0.2", "0", "0.0.0.0"),
    *(
        "10.0.0.1",
        "172.16.0.1",
        "192.168.0.1",
        "169.254.169.254",
        "100.100.100.200",
        "255.255.255.255",
    ),
    # addresses of version 6
    *("[::1]", "[::]", f"[::ffff:{PRIVATE}]", "[::ffff:7f00:2]", f"[::{PRIVATE}]", "[fe80::1]"),
    *("[fe80::1%25lo]", "[fd00:ec2::254]", "[64:ff9b::7f00:2]", "[64:ff9b:1::7f00:2]", "[ff02::1]"),
    *(
        "[2002:7f00:2::]",
        "[2001:0:7f00:2::]",
        "[2001:db8::1]",
        "[0:0:0:0:0:0:0:1]",
        "[::1",
        "[v1.x]",
    ),
    # names
    *("localhost", "LOCALHOST", "localhost.", "metadata.google.internal", "both.test", "six.test"),
    *("mapped.test", "scoped.test", "zero.test", "xn--bcher-kva.test", "bad.test", "unknown.test"),
    # what programs read in different ways
    *(
        "user@127.0.0.2",
        "public.test@127.0.0.2",
        "127.0.0.2#@public.test",
        "127.0.0.2\\@public.test",
    ),
    *(
        "127\u30020\u30020\u30022",
        "\uff11\uff12\uff17.0.0.2",
        "%31%32%37.0.0.2",
        "127.0.0.2%00.test",
    ),
    *(
        "①27.0.0.2",
        "127.0.0.2\t",
        " 127.0.0.2",
        "127.0.0.2\r\nHost: x",
        "a..test",
        "",
        "loc\u00adalhost",
    ),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_port", [True, False])
def test_no_form_of_an_address_reaches_this_machine(canary, form, with_port):
    rules = Rules(resolve=numeric, ports=frozenset({443, canary.port}), connect_s=2)
    port = f":{canary.port}" if with_port else ""
    with pytest.raises(FetchError) as caught:
        look_up(f"https://{form}{port}/a.mp4", rules)
    expected = "unavailable" if form in {"bad.test", "unknown.test"} else "refused"
    assert caught.value.reason == expected
    assert canary.hits == 0


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.2/", "file:///etc/passwd", "gopher://127.0.0.2/", "ftp://127.0.0.2/"),
        *("//127.0.0.2/", "https:///a", "https:127.0.0.2", "HTTP://x/", "https://127.0.0.2:99999/"),
        *(
            "https://public.test:22/",
            "https://public.test:0x1bb/",
            "data:text/plain,x",
            "",
            "https://",
        ),
    ],
)
def test_no_other_kind_of_address_is_asked(canary, url):
    with pytest.raises(FetchError) as caught:
        look_up(url, Rules(resolve=numeric))
    assert caught.value.reason is FailureReason.REFUSED


def test_the_canary_would_have_been_heard():
    """Without the judgement of addresses the same call reaches it."""
    canary = Canary()
    rules = Rules(resolve=numeric, is_allowed=lambda _: True, ports=frozenset({canary.port}))
    with pytest.raises(FetchError, match="does not answer"):
        look_up(f"https://127.0.0.2:{canary.port}/", rules)
    assert canary.hits == 1
    canary.listener.close()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((a, True) for a in ("1.1.1.1", "8.8.8.8", "93.184.216.34", "172.15.0.1", "172.32.0.1")),
        *((a, True) for a in ("192.167.1.1", "2606:4700::1111", "2a00:1450:4001::1")),
        *(
            (a, False)
            for a in ("0.1.2.3", "10.1.2.3", "100.64.0.1", "100.127.255.255", "127.9.9.9")
        ),
        *((a, False) for a in ("168.63.129.16", "169.254.0.1", "172.31.255.255", "192.0.0.9")),
        *((a, False) for a in ("192.0.2.1", "192.88.99.1", "198.18.0.1", "198.19.255.255")),
        *(
            (a, False)
            for a in ("198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1")
        ),
        *((a, False) for a in ("::", "::1", "::8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8")),
        *(
            (a, False)
            for a in ("64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:808:808::")
        ),
        *((a, False) for a in ("3fff::1", "5f00::1", "fc00::1", "fdff::1", "fe80::1", "fec0::1")),
        *((a, False) for a in ("ff02::1", "fe80::1%eth0", "2606:4700::1111%eth0")),
    ],
)
def test_public_is_the_internet_and_nothing_else(address, public):
    assert is_public(ipaddress.ip_address(address)) is public


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        name, _, argument = self.path.lstrip("/").partition("?")
        server.seen.append((self.headers["Host"], self.path))
        with contextlib.suppress(OSError):
            getattr(self, f"get_{name}", self.get_status)(argument)
        self.close_connection = True

    def answer(self, status, headers=(), body=b""):
        self.send_response_only(status)
        for key, value in headers:
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def get_ok(self, _):
        self.answer(200, [("Content-Length", len(CONTENT)), ("ETag", '"v1"')], CONTENT)

    def get_unsized(self, _):
        self.answer(200, [], CONTENT)

    def get_short(self, _):
        self.answer(200, [("Content-Length", len(CONTENT) + 1)], CONTENT)

    def get_packed(self, _):
        self.answer(200, [("Content-Encoding", "gzip")], b"\x1f\x8b")

    def get_to(self, place):
        self.answer(302, [("Location", place), ("Content-Length", 0)])

    def get_loop(self, _):
        self.get_to("/loop")

    def get_status(self, number):
        self.answer(int(number or 404), [("Content-Length", 0)])

    def get_drip(self, _):
        self.answer(200, [("Content-Length", 10_000)])
        for _ in range(200):
            self.wfile.write(b"x")
            time.sleep(0.05)

    def get_drip_headers(self, _):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(200):
            self.wfile.write(b"x")
            time.sleep(0.05)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with a certificate for public.test and other.test."""
    pytest.importorskip("cryptography")
    pem = certificate(tmp_path_factory.mktemp("tls"), "public.test", "other.test")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.seen = []
    server.pem = pem
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def rules(server, canary):
    """127.0.0.1 stands for the internet, everything else is judged as ever."""
    names = {"public.test": ["127.0.0.1"], "other.test": ["127.0.0.1"], "wrong.test": ["127.0.0.1"]}
    server.seen.clear()
    return Rules(
        resolve=lambda host, port: names.get(host) or numeric(host, port),
        is_allowed=lambda address: str(address) == "127.0.0.1" or is_public(address),
        ports=frozenset({443, server.server_port, canary.port}),
        tls=lambda: ssl.create_default_context(cafile=str(server.pem)),
        connect_s=5,
        read_s=5,
        deadline_s=10,
    )


def place(server, path, host="public.test"):
    return f"https://{host}:{server.server_port}/{path}"


def test_a_file_is_fetched(server, rules, tmp_path):
    found = fetch(place(server, "ok?a=%20b"), tmp_path / "f", max_bytes=len(CONTENT), rules=rules)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert found.num_bytes == len(CONTENT)
    assert look_up(place(server, "ok?a=%20b"), rules) == found
    assert look_up(place(server, "ok"), rules).etag != found.etag
    assert server.seen[0] == (f"public.test:{server.server_port}", "/ok?a=%20b")
    fetch(place(server, "unsized"), tmp_path / "g", max_bytes=1 << 20, rules=rules)
    assert (tmp_path / "g").read_bytes() == CONTENT


def test_redirects_are_followed_a_few_times(server, rules, tmp_path):
    url = place(server, f"to?{place(server, 'to?/ok', 'other.test')}")
    fetch(url, tmp_path / "f", max_bytes=1 << 20, rules=rules)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert [host.partition(":")[0] for host, _ in server.seen] == [
        "public.test",
        "other.test",
        "other.test",
    ]
    server.seen.clear()
    with pytest.raises(FetchError, match="refused: more than 3 redirects"):
        look_up(place(server, "loop"), rules)
    assert len(server.seen) == 4


@pytest.mark.parametrize(
    "target",
    [
        *(
            "https://127.0.0.2:{0}/",
            "//127.0.0.2:{0}/",
            "https://127.2:{0}/",
            "https://localhost:{0}/",
        ),
        *("http://127.0.0.2:{0}/", "https://[::ffff:127.0.0.2]:{0}/", "https://2130706434:{0}/"),
        *("https://both.test:{0}/", "https://x@127.0.0.2:{0}/", "https://169.254.169.254/latest/"),
        *(
            "file:///etc/passwd",
            "gopher://127.0.0.2:{0}/",
            "https://public.test:1/",
            "https://[bad/x",
            "//[",
            "http://public.test/",
        ),
    ],
)
def test_a_redirect_is_judged_as_an_address_is(server, rules, canary, target):
    with pytest.raises(FetchError) as caught:
        look_up(place(server, f"to?{target.format(canary.port)}"), rules)
    assert caught.value.reason is FailureReason.REFUSED
    assert canary.hits == 0
    assert len(server.seen) == 1


def test_a_user_name_is_refused_wherever_it_leads(server, rules):
    with pytest.raises(FetchError, match=r"refused: .*user name"):
        look_up(place(server, "ok", "user:word@public.test"), rules)
    assert server.seen == []


def test_a_name_is_resolved_once(server, rules, canary):
    """The second answer would be another machine."""
    answers = iter([["127.0.0.1"], [PRIVATE], [PRIVATE]])
    asked = []

    def resolve(host, port):
        asked.append(host)
        return next(answers)

    look_up(place(server, "ok"), rules._replace(resolve=resolve))
    assert asked == ["public.test"]
    assert canary.hits == 0


@pytest.mark.parametrize(
    ("path", "reason", "words"),
    [
        ("status?404", "missing", "404"),
        ("status?410", "missing", "410"),
        ("status?403", "unavailable", "403"),
        ("status?503", "unavailable", "503"),
        ("status?206", "unavailable", "206"),
        ("packed", "unavailable", "'gzip'"),
        ("short", "unavailable", "256000|256001"),
    ],
)
def test_other_answers_are_reasons(server, rules, tmp_path, path, reason, words):
    with pytest.raises(FetchError, match=words) as caught:
        fetch(place(server, path), tmp_path / "f", max_bytes=1 << 20, rules=rules)
    assert caught.value.reason == reason


@pytest.mark.parametrize("path", ["ok", "unsized"])
def test_a_file_that_is_too_large_is_given_up(server, rules, tmp_path, path):
    with pytest.raises(FetchError, match="expected at most 1000") as caught:
        fetch(place(server, path), tmp_path / "f", max_bytes=1000, rules=rules)
    assert caught.value.reason is FailureReason.FILE_TOO_LARGE
    # what says its size is not even begun
    assert (tmp_path / "f").exists() == (path == "unsized")
    assert path == "ok" or (tmp_path / "f").stat().st_size <= 1000


@pytest.mark.parametrize("path", ["drip", "drip_headers"])
def test_a_server_that_sends_a_byte_now_and_then_is_given_up(server, rules, tmp_path, path):
    start_s = time.monotonic()
    with pytest.raises(FetchError, match=r"not done after 0\.5 s"):
        fetch(
            place(server, path),
            tmp_path / "f",
            max_bytes=1 << 20,
            rules=rules._replace(deadline_s=0.5),
        )
    assert time.monotonic() - start_s < 3


def test_the_certificate_must_be_that_of_the_host(server, rules):
    with pytest.raises(FetchError, match=r"wrong.test does not answer: .*certificate"):
        look_up(place(server, "ok", "wrong.test"), rules)
    with pytest.raises(FetchError, match=r"certificate.*SSL_CERT_FILE"):
        look_up(place(server, "ok"), rules._replace(tls=ssl.create_default_context))
    assert server.seen == []


def test_a_full_disk_is_no_failure_of_the_server(server, rules, tmp_path):
    (tmp_path / "f").touch()
    with pytest.raises(FileExistsError):
        fetch(place(server, "ok"), tmp_path / "f", max_bytes=1 << 20, rules=rules)


def test_proxies_of_the_environment_are_not_used(server, rules, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.2:9")
    assert look_up(place(server, "ok"), rules).num_bytes == len(CONTENT)


def test_addresses_are_listed_only_where_they_are_allowed(server, rules, monkeypatch, tmp_path):
    monkeypatch.setattr(https, "RULES", rules)
    good, gone = place(server, "ok"), place(server, "status?404")
    with pytest.raises(DataError, match="allow_https is false"):
        discover_videos(good)
    assert server.seen == []
    (tmp_path / "list.txt").write_text(f"{good}\n{gone}\nhttps://10.0.0.1/a.mp4\n")
    sources = discover_videos(str(tmp_path / "list.txt"), allow_https=True)
    assert {source.uri: source.problem for source in sources} == {
        good: None,
        gone: FailureReason.MISSING,
        "https://10.0.0.1/a.mp4": FailureReason.REFUSED,
    }
