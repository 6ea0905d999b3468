import html
import json
import logging
import socket
import time
from urllib.parse import quote, quote_plus

import numpy as np
import pytest

from tests.chat_server import Answer, running_chat_server, said, text_said
from ursa.annotation.chat import KEY_VARIABLE, ChatCaptioner, check_key, masked, parse_captions
from ursa.annotation.records import AnnotationError, AnnotationFailure, SeenClip
from ursa.config import UrlCaptionerConfig
from ursa.errors import ConfigError, ServiceError

CANARY = "sk-canary-d41d8cd98f"


@pytest.fixture(scope="module")
def server():
    with running_chat_server() as running:
        yield running


@pytest.fixture(autouse=True)
def fresh(server, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    server.requests.clear()
    server.answer = lambda *_: said("a short one", "a long one")


def frames(count=3, height=40, width=60):
    colors = np.linspace(40, 200, count).astype(np.uint8)
    return np.stack([np.full((height, width, 3), (c, 20, 90), np.uint8) for c in colors])


def config(server, **changes):
    values = {"kind": "url", "base_url": server.url, "model": "seer", "max_retries": 1}
    return UrlCaptionerConfig(**(values | changes))


def ask(server, **changes):
    return ChatCaptioner(config(server, **changes))(SeenClip(frames(), "not to be sent"))


def test_frames_go_out_and_both_captions_come_back(server):
    found = ask(server, seed=7, max_tokens=99, prompt="say it")
    assert (found.caption, found.caption_long) == ("a short one", "a long one")
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    body = request.body
    assert (body["model"], body["seed"], body["max_tokens"]) == ("seer", 7, 99)
    assert body["temperature"] == 0
    assert body["messages"][0]["content"][-1] == {"type": "text", "text": "say it"}
    assert set(body["response_format"]["json_schema"]["schema"]["required"]) == {"short", "long"}
    sent = np.stack(request.pictures())
    assert sent.shape == (3, 40, 60, 3)
    # RGB went out as RGB, up to what JPEG loses
    assert np.abs(sent[..., ::-1].astype(int) - frames().astype(int)).max() <= 6
    assert "not to be sent" not in json.dumps(body)
    assert "Authorization" not in request.headers


@pytest.mark.parametrize(
    ("wanted", "sent"), [("json_object", {"type": "json_object"}), ("none", None)]
)
def test_other_ways_to_ask_for_json(server, wanted, sent):
    ask(server, response_format=wanted)
    assert server.requests[0].body.get("response_format") == sent


def test_the_key_is_sent_and_shown_nowhere(server, monkeypatch, caplog):
    monkeypatch.setenv(KEY_VARIABLE, CANARY)
    server.answer = lambda *_: Answer(401, f"bad key {CANARY}".encode())
    with caplog.at_level(logging.DEBUG), pytest.raises(ConfigError) as refused:
        ask(server)
    assert server.requests[0].headers["Authorization"] == f"Bearer {CANARY}"
    assert KEY_VARIABLE in str(refused.value)
    assert "status 401: bad key ***" in str(refused.value)
    assert CANARY not in str(refused.value) + caplog.text
    assert CANARY not in repr(vars(config(server)))


HARD_KEY = "sk+\"q\\u/<&>'=a b%~\u007b9"


def escaped(key):
    """A key as servers and proxies may write it into an error."""
    as_json = json.dumps(key)[1:-1]
    return {
        "plain": key,
        "json": as_json,
        "json twice": json.dumps(as_json)[1:-1],
        "json with slashes": as_json.replace("/", "\\/"),
        "json of Go": as_json.replace("<", "\\u003c")
        .replace(">", "\\u003E")
        .replace("&", "\\u0026"),
        "json, all escaped": "".join(f"\\u{ord(character):04x}" for character in key),
        "url": quote(key, safe=""),
        "url, slashes kept": quote(key),
        "url of a form": quote_plus(key),
        "url, lower case": quote(key, safe="").lower(),
        "url twice": quote(quote(key, safe=""), safe=""),
        "html": html.escape(key),
        "html, numbers": "".join(f"&#{ord(character)};" for character in key),
        "html of html": html.escape(html.escape(key)),
        "url in json": json.dumps(quote(key))[1:-1],
    }


@pytest.mark.parametrize("key", [CANARY, HARD_KEY])
@pytest.mark.parametrize("form", escaped(""))
def test_the_key_is_masked_in_every_form(server, monkeypatch, caplog, key, form):
    shown = escaped(key)[form]
    monkeypatch.setenv(KEY_VARIABLE, key)
    server.answer = lambda *_: Answer(401, f"bad key '{shown}', said twice: {shown}!".encode())
    with caplog.at_level(logging.DEBUG), pytest.raises(ConfigError) as refused:
        ask(server)
    assert "bad key '***', said twice: ***!" in str(refused.value)
    assert shown not in str(refused.value) + caplog.text


def test_a_masked_answer_is_still_one(server, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, HARD_KEY)
    server.answer = lambda *_: said(f"the key is {HARD_KEY}.", "a longer one")
    assert ask(server).caption == "the key is ***."


@pytest.mark.parametrize("filler", [b"\\", b"%25", b"&amp;", b"s", b"sk", b"&#0"])
def test_no_answer_takes_long_to_mask(filler):
    data = filler * ((1 << 20) // len(filler))
    started = time.process_time()
    assert masked(data, HARD_KEY) == data
    assert time.process_time() - started < 2


def test_a_key_that_cannot_be_sent_is_refused_unseen(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, f"{CANARY}\nX-Evil: 1")
    with pytest.raises(ConfigError, match="printable ASCII") as refused:
        check_key()
    assert CANARY not in str(refused.value)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, status):
    busy = Answer(status, b"later", {"Retry-After": "0"})
    server.answer = lambda number, _: busy if number < 1 else said("at last", "at long last")
    assert ask(server).caption == "at last"
    assert len(server.requests) == 2


def test_a_server_that_stays_busy_stops_the_run(server):
    server.answer = lambda *_: Answer(429, b"slow down", {"Retry-After": "0"})
    with pytest.raises(ServiceError, match=r"stays busy .*slow down.*concurrency"):
        ask(server)
    assert len(server.requests) == 2


def test_a_server_that_breaks_on_a_clip_fails_that_clip(server):
    server.answer = lambda *_: Answer(500, b"no <b>luck</b>", {"Retry-After": "0"})
    with pytest.raises(AnnotationError, match="status 500: no <b>luck</b>") as failed:
        ask(server)
    assert failed.value.reason is AnnotationFailure.NO_ANSWER


def test_a_silent_server_fails_the_clip(server):
    server.answer = lambda *_: said("late", "late", delay_s=0.6)
    with pytest.raises(
        AnnotationError, match=r"no answer within .*0\.1 s, asked 1 times"
    ) as failed:
        ask(server, timeout_s=0.1, max_retries=0)
    assert failed.value.reason is AnnotationFailure.NO_ANSWER


def test_a_server_that_is_not_there_stops_the_run():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        captioner = ChatCaptioner(
            UrlCaptionerConfig(kind="url", base_url=url, model="seer", max_retries=0)
        )
        with pytest.raises(ServiceError, match=r"cannot be reached .*correct annotation.captioner"):
            captioner(SeenClip(frames(), None))


def test_a_redirect_is_not_followed(server):
    away = Answer(307, b"", {"Location": f"{server.url}/elsewhere"})
    server.answer = lambda *_: away
    with pytest.raises(AnnotationError, match="status 307"):
        ask(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(200, b"<html>hello</html>"), "chat completions protocol, got '<html>hello"),
        (Answer(200, b'{"choices": []}'), "chat completions protocol"),
        (Answer(200, b"[" * 100_000), "chat completions protocol"),
        (Answer(200, b"x" * 1_100_000), "more than 1048576 bytes"),
        (Answer(400, b"too many pictures"), "status 400: too many pictures"),
        (text_said(None), "no text but NoneType"),
        (text_said("a ball rolls"), "no such JSON: 'a ball rolls'.*max_tokens"),
        (text_said('{"short": "a ball", "long": "a ba'), "no such JSON"),
        (text_said('{"short": "a ball"}'), "no such texts"),
        (said(["a"], "b"), "no such texts"),
        (said("a", 3), "no such texts"),
        (text_said("\ud800 half a character"), "no such JSON"),
    ],
)
def test_garbage_fails_the_clip(server, answer, message):
    server.answer = lambda *_: answer
    with pytest.raises(AnnotationError, match=message) as failed:
        ask(server)
    assert failed.value.reason is AnnotationFailure.BAD_ANSWER
    assert len(str(failed.value)) < 400


@pytest.mark.parametrize(
    "text",
    [
        '{"short": "a {ball}", "long": "it rolls", "mood": 1}',
        '```json\n{"short": "a {ball}", "long": "it rolls"}\n```',
        'Sure! {"short": "a {ball}", "long": "it rolls"} Anything else?',
        '<think>{"short": "no"}</think>{"short": "a {ball}", "long": "it rolls"}',
    ],
)
def test_json_is_found_in_what_a_model_says(text):
    found = parse_captions(text)
    assert (found.short, found.long) == ("a {ball}", "it rolls")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.com/v1", "https:// for host 'example.com'"),
        ("http://127.0.0.1.example.com/v1", "https:// for host"),
        ("ftp://example.com", r"http\(s\)://host"),
        ("https:///v1", r"http\(s\)://host"),
        ("https://example.com/v1?key=1", r"http\(s\)://host"),
        ("https://[::1", r"http\(s\)://host"),
        (f"https://me:{CANARY}@example.com/v1", "no user and password"),
    ],
)
def test_addresses_that_are_refused(url, message):
    from ursa.config import load_config

    captioner = {"kind": "url", "base_url": url, "model": "seer"}
    with pytest.raises(ConfigError, match=message) as refused:
        load_config("tiny", {"annotation": {"captioner": captioner}})
    assert CANARY not in str(refused.value)


@pytest.mark.parametrize("url", ["http://localhost:1/v1", "http://[::1]:1", "https://example.com"])
def test_addresses_that_are_taken(url):
    assert UrlCaptionerConfig(kind="url", base_url=url, model="seer").base_url == url


def test_plain_http_has_to_be_asked_for():
    values = {"kind": "url", "base_url": "http://gpu-box:8000/v1", "model": "seer"}
    assert UrlCaptionerConfig(**values, allow_plain_http=True).allow_plain_http
