import json

import pytest

from ursa.video.captions import (
    CaptionRow,
    Notes,
    caption_of,
    clean_caption,
    join_notes,
    names_beside,
    parse_caption_rows,
    parse_text_beside,
    template_caption,
)


def test_rows_are_read_and_bad_lines_are_numbered():
    lines = [
        json.dumps({"path": "a.mp4", "caption": " A  bee\nflies. ", "extra": 1}),
        "",
        json.dumps({"path": "a.mp4", "start_s": 1, "end_s": 2.5, "caption": "A bee."}),
        "{broken",
        json.dumps(["a.mp4", "x"]),
        json.dumps({"path": "a.mp4", "caption": ""}),
        json.dumps({"path": 3, "caption": "x"}),
        json.dumps({"path": "a.mp4", "caption": "x", "start_s": 2, "end_s": 1}),
        json.dumps({"path": "a.mp4"}),
        '{"path": "a.mp4", "caption": "x", "path": "b.mp4"}',
        json.dumps({"uri": "b.mp4", "caption": "By its other name."}),
    ]
    rows, bad_lines = parse_caption_rows("\n".join(lines).encode())
    assert rows == [
        CaptionRow("a.mp4", 0.0, float("inf"), Notes("A bee flies.")),
        CaptionRow("a.mp4", 1.0, 2.5, Notes("A bee.")),
        CaptionRow("b.mp4", 0.0, float("inf"), Notes("By its other name.")),
    ]
    assert bad_lines == [4, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize(
    "end_s",
    [
        "1" + "0" * 400,
        "-1" + "0" * 400,
        "9" * 5000,
        "NaN",
        "[3]",
        '{"a": 3}',
        "[" * 990 + "]" * 990,
    ],
)
def test_a_line_with_a_bad_number_is_left_out(end_s):
    bad = f'{{"path": "a.mp4", "caption": "x", "start_s": 0, "end_s": {end_s}}}'
    good = '{"path": "a.mp4", "caption": "x", "end_s": "4"}'
    rows, bad_lines = parse_caption_rows(f"{bad}\n{good}".encode())
    assert rows == [CaptionRow("a.mp4", 0.0, 4.0, Notes("x"))]
    assert bad_lines == [1]


def test_row_with_the_largest_overlap_wins_then_sidecar_then_name():
    first, second, beside = Notes("first"), Notes("second", "the long second"), Notes("beside")
    rows = [
        CaptionRow("a.mp4", 0, 2, first),
        CaptionRow("a.mp4", 2, 9, second),
        CaptionRow("a.mp4", 0, 99, Notes(license="CC0")),
    ]
    said = caption_of("a.mp4", 1.5, 4, rows=rows, beside=beside)
    assert said == ("second", "the long second", "manifest")
    said = caption_of("a.mp4", 20, 21, rows=rows, beside=beside)
    assert said == ("beside", None, "sidecar")
    said = caption_of("a.mp4", 0, 1, rows=[], beside=Notes(None, "long"), beside_source="tar")
    assert said == ("long", "long", "tar")
    said = caption_of("red_Bus-02.mp4", 0, 1, rows=[], beside=Notes(license="CC0"))
    assert said == ("a video of red bus 02", None, "template")


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("видео_🎬.mp4", "a video of видео"),
        ("🎬.mp4", "a video"),
        ("-dash\nfirst.mp4", "a video of dash first"),
        ("latin1_\ufffd.mp4", "a video of latin 1"),
        ("no_extension", "a video of no extension"),
    ],
)
def test_template_is_made_of_the_words_of_a_name(name, caption):
    assert template_caption(name) == caption


def test_texts_beside_a_video_fill_each_other_up():
    assert names_beside("d/a.b.mp4") == (
        *("d/a.b.mp4.txt", "d/a.b.txt", "d/a.b.mp4.TXT", "d/a.b.TXT"),
        *("d/a.b.mp4.json", "d/a.b.json", "d/a.b.mp4.JSON", "d/a.b.JSON"),
    )
    assert "d/a.txt" in names_beside("d/a.b.mp4", in_tar=True)
    assert names_beside("a") == ("a.txt", "a.TXT", "a.json", "a.JSON")
    short = parse_text_beside("a.txt", b" A\nbee. ")
    data = {"caption": "x", "caption_long": "Long.", "licence": "CC0", "attribution": None, "w": 1}
    long = parse_text_beside("a.JSON", json.dumps(data).encode())
    assert join_notes(short, long) == Notes("A bee.", "Long.", "CC0", None)
    for bad in (b"[1]", b"{", b'{"caption": 3}', b"[" * 100_000, b"\xff"):
        assert parse_text_beside("a.json", bad) == Notes()


def test_a_repeated_key_beside_a_video_is_named(caplog):
    twice = b'{"caption": "first", "caption": "last", "license": "CC0"}'
    assert parse_text_beside("d/a\n.json", twice) == Notes()
    assert r"'d/a\n.json' is left out: 'caption' is there more than once" in caplog.text


def test_captions_are_one_bounded_line():
    assert clean_caption("a\x00b\u2028c\td") == "a b c d"
    assert len(clean_caption("word " * 5000)) <= 2000
