"""Texts of others stay texts: on a terminal, in a log, in Markdown; secrets are not shown."""

import html
import io
import logging
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from ursa.cli import app, main
from ursa.cli.lines import print_lines
from ursa.errors import DataError
from ursa.inspection.page import escape
from ursa.texts import (
    PrintableRecords,
    host_of,
    is_file_name,
    markdown_code,
    markdown_text,
    printable,
    secret_of_address,
    without_user,
)

HOSTILE = (
    "a\nERROR: forged\r\x1b[31mred\x1b]0;title\x07\x00\x9b2J\u202egpj.\u2066x\u2028y"
    "<script>alert(1)</script><img src=x onerror=alert(1)>[x](javascript:alert(1))|`b`\\[y](data:,)"
)
PIECES = ("<", ">", "`", "``", "|", "\\", "[x](javascript:y)", "![i](u)", "<script>", "&lt;", "\n")
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=8).map("".join)
markdown = MarkdownIt("commonmark", {"html": True}).enable("table")


class Elements(HTMLParser):
    """Names of the elements of a page, and the texts of its cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.cells = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, _attrs):
        self.tags.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


def cells_of(first: str, second: str) -> Elements:
    return Elements(markdown.render(f"| a | b |\n| --- | --- |\n| {first} | {second} |\n"))


@settings(max_examples=400, deadline=None)
@given(texts)
def test_a_text_stays_a_text_in_a_table_of_markdown(text):
    found = cells_of(markdown_text(text), "last")
    assert set(found.tags) <= {"table", "thead", "tbody", "tr", "th", "td", "em", "strong"}
    assert len(found.cells) == 2
    assert found.cells[1].strip() == "last"
    if not re.search(r"[*_&]", text):  # emphasis and entities are texts too
        assert found.cells[0].split() == printable(text).split()


def test_an_address_in_a_text_does_not_become_a_link():
    """GFM makes links of what looks like an address; not of what is escaped."""
    text = markdown_text("see http://a.test/b, HTTPS://c.test, www.d.test, e@f.test, a: b.c")
    assert text == r"see http\://a.test/b, HTTPS\://c.test, www\.d.test, e\@f.test, a: b.c"
    assert cells_of(text, "last").cells[0].strip().startswith("see http://a.test/b, HTTPS://c")


@settings(max_examples=400, deadline=None)
@given(texts)
def test_a_text_stays_code_in_a_table_of_markdown(text):
    found = cells_of(markdown_code(text), "last")
    assert set(found.tags) <= {"table", "thead", "tbody", "tr", "th", "td", "code"}
    assert len(found.cells) == 2
    assert found.cells[0].split() == printable(text).split()


@given(st.text() | texts)
def test_what_is_printed_is_one_line_that_says_nothing_to_a_terminal(text):
    for shown in (printable(text), html.unescape(escape(text))):
        assert len(shown.splitlines()) <= 1
        assert not re.search("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", shown)
        shown.encode()
    assert text.isprintable() <= (printable(text) == text)


def test_lines_of_a_log_are_one_line_each():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(PrintableRecords())
    log = logging.getLogger("ursa.test_texts")
    log.addHandler(handler)
    log.propagate = False
    log.warning("%s: quarantined, %s", HOSTILE, "https://me:secret@host.test/a")
    log.error("unexpected", exc_info=ValueError(HOSTILE))
    log.removeHandler(handler)
    first, *rest = stream.getvalue().split("\n")
    assert first.startswith("a\\nERROR: forged\\r\\x1b[31mred")
    assert first.endswith("https://***@host.test/a")
    assert rest[0] == "unexpected"
    assert rest[1].startswith("ValueError: a")
    assert "".join(rest).isprintable()


def test_an_error_of_the_command_line_is_one_printable_line(capsys, monkeypatch):
    def fail(*_arguments, **_options):
        raise DataError(f"{HOSTILE} at https://me:secret@host.test/")

    monkeypatch.setattr("ursa.cli.app", fail)
    with pytest.raises(SystemExit):
        main(["config"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a ERROR: forged \\x1b[31mred")
    assert line.isprintable()
    assert "secret" not in line
    assert app is not fail


def test_lines_of_the_command_line_are_printable(capsys):
    print_lines(HOSTILE, "plain")
    first, second = capsys.readouterr().out.splitlines()
    assert first.isprintable()
    assert second == "plain"


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("https://me:pass@host.test/a", "a user name or password"),
        ("s3://key:secret@bucket/a", "a user name or password"),
        ("https://me:pa/ss@host.test/a", "a user name or password"),
        ("https://me:pa#ss@host.test/a", "a user name or password"),
        ("https://host.test:8443/@someone/a.mp4", None),
        ("https://[::1]/@someone/a.mp4", None),
        ("https://h.test/a?private_key=abc", "private_key=..."),
        ("https://h.test/a?passphrase=abc", "passphrase=..."),
        ("https://h.test/a?X-Amz-Signature=1", "X-Amz-Signature=..."),
        ("https://h.test/a?x=1&X-Goog-Credential=1", "X-Goog-Credential=..."),
        ("https://h.test/a?sv=1&se=2&sig=abc", "sig=..."),
        ("https://h.test/a?access_token=abc", "access_token=..."),
        ("https://h.test/a?api_key=abc", "api_key=..."),
        ("https://h.test/a?x=1&version=2&design=3&keyframe=4", None),
        ("https://h.test/a?token=", None),
        ("s3://bucket/a@b.mp4", None),
        ("file:///a@b.mp4", None),
        ("https://[bad", None),
        ("https://me:secret@[bad/x.mp4", "a user name or password"),
        ("https://[bad/x?token=abc", "token=..."),
        ("https://h.test/a#access_token=abc", "access_token=..."),
        ("https://h.test/a?v=1?x;jwt=abc", "jwt=..."),
        ("https://h.test/a?auth_key=1-0-abc", "auth_key=..."),
        ("https://h.test/a?hdnts=exp=1~hmac=abc", "hdnts=..."),
        ("https://h.test/a?rlkey=abc", "rlkey=..."),
        ("https://h.test/a?code=q1Zk39fjq2", "code=..."),
        ("https://h.test/a?code=de&key=videos/first.mp4&auth=no&pageToken=7&se=2", None),
        ("https://h.test/a?tokenizer=cosmos&secretary=1", None),
        ("s3://bucket/who?token=x.mp4", None),
        ("file:///who?key=x1234567.mp4", None),
    ],
)
def test_secrets_in_addresses(address, found):
    assert secret_of_address(address) == found


def test_users_of_addresses_are_not_shown():
    assert without_user("no route to http://u:p@h:1/x, s3://a/b@c") == (
        "no route to http://***@h:1/x, s3://a/b@c"
    )
    assert without_user("'http://u:p@ss@h/x' and https://u:pa/ss@h/y") == (
        "'http://***@h/x' and https://***@h/y"
    )


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("https://h.test:8/a?token=b@c", "h.test:8"),
        ("https://u:p@h.test/a", "h.test"),
        ("s3://key:se/cret@bucket/a", "***"),
        ("s3://key:se@cr/et@bucket/a", "***"),
        ("https://u:p@h.test/a?token=b@c", "***"),
    ],
)
def test_the_host_of_an_address_holds_no_secret(address, host):
    assert host_of(address) == host


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\0", "x" * 256, 5, None])
def test_what_is_no_name_of_a_file(name):
    assert not is_file_name(name)
    assert is_file_name("model-00001-of-00002.safetensors")
