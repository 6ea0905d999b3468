import json
import logging
import os
import time
import tracemalloc
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ursa import storage
from ursa.errors import DataError
from ursa.sources import manifest
from ursa.sources.manifest import read_manifest
from ursa.sources.names import resolve_name
from ursa.video.captions import Notes

ROWS = [
    {"path": "a b.mp4", "caption": "A,  bee.", "license": "CC-BY-4.0", "start_s": 0, "end_s": 2.5},
    {"path": "a b.mp4", "caption": 'A "bus".', "license": "CC-BY-4.0", "start_s": 2.5, "end_s": 9},
    {"path": "sub/c.mp4", "caption": None, "caption_long": "Long.", "attribution": "Ann, Bo"},
]


def as_csv(rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    quoted = [
        ["" if row.get(name) is None else str(row[name]).replace('"', '""') for name in names]
        for row in rows
    ]
    lines = [",".join(f'"{value}"' for value in line) for line in ([*[names], *quoted])]
    return "\ufeff" + "\r\n".join(lines)


def write(folder, kind, rows):
    path = folder / f"list.{kind}"
    if kind == "csv":
        path.write_text(as_csv(rows), "utf-8", newline="")
    elif kind == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)))
    else:
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns = {name: [row.get(name) for row in rows] for name in names}
        pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_all_kinds_say_the_same(tmp_path, kind):
    rows = read_manifest(write(tmp_path, kind, ROWS))
    first = (tmp_path / "a b.mp4").as_uri()
    assert [row.uri for row in rows] == [first, first, (tmp_path / "sub" / "c.mp4").as_uri()]
    assert [row.number for row in rows] == [1, 2, 3]
    assert [(row.said.start_s, row.said.end_s) for row in rows] == [
        (0, 2.5),
        (2.5, 9),
        (0, float("inf")),
    ]
    assert [row.said.notes for row in rows] == [
        Notes("A, bee.", None, "CC-BY-4.0", None),
        Notes('A "bus".', None, "CC-BY-4.0", None),
        Notes(None, "Long.", None, "Ann, Bo"),
    ]


def test_uri_column_british_spelling_and_unused_columns(tmp_path, caplog):
    rows = [{"uri": "s3://b/k ey.mp4", "licence": "CC0", "width": 3, "fps": 2}]
    for kind in ("csv", "jsonl", "parquet"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ursa"):
            (row,) = read_manifest(write(tmp_path, kind, rows))
        assert (row.uri, row.said.notes.license) == ("s3://b/k ey.mp4", "CC0")
        (line,) = caplog.messages
        assert line.endswith("columns that are not used: fps, width")


def test_a_text_file_has_one_name_a_line(tmp_path):
    (tmp_path / "list.txt").write_text("# mine\n\n \t\na.mp4\r\nhttps://host.test/b.mp4?x=1\n")
    uri = str(tmp_path / "list.txt")
    rows = read_manifest(uri, allow_https=True)
    assert [row.uri for row in rows] == [
        (tmp_path / "a.mp4").as_uri(),
        "https://host.test/b.mp4?x=1",
    ]
    with pytest.raises(DataError, match=r"1 https addresses, such as 'https://host.test/b.mp4"):
        read_manifest(uri)
    with pytest.raises(DataError, match=r'{"ingestion": {"allow_https": true}}'):
        read_manifest(uri)


@pytest.mark.parametrize(
    "name",
    [" a.mp4", "a.mp4 ", "\ta.mp4\t", "a\x0bb\x0cc\x1cd\x85e\u2028f\u3000.mp4", "a\rb.mp4", "./#a"],
)
def test_every_character_of_a_name_in_a_text_file_counts(tmp_path, name):
    (tmp_path / "list.txt").write_text(f"{name}\nb.mp4", "utf-8", newline="")
    first, second = read_manifest(str(tmp_path / "list.txt"))
    assert (first.uri, first.number) == ((tmp_path / name).as_uri(), 1)
    assert second.uri == (tmp_path / "b.mp4").as_uri()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_manifest_without_names_is_named(tmp_path, kind):
    uri = write(tmp_path, kind, [{"file": "a.mp4", "caption": "x"}])
    with pytest.raises(DataError, match=r"expected `path` or `uri`, got 'caption', 'file'"):
        read_manifest(uri)


def test_equal_rows_count_once_and_others_are_refused(tmp_path, caplog):
    rows = [{"path": "a.mp4", "caption": "x"}, {"path": "./a.mp4", "caption": " x "}]
    with caplog.at_level(logging.WARNING, "ursa"):
        (row,) = read_manifest(write(tmp_path, "csv", rows))
    assert row.number == 1
    assert "1 rows repeat others and count once, the first is row 2" in caplog.text
    rows[1]["caption"] = "y"
    with pytest.raises(DataError, match="rows 1 and 2 say different things about file:"):
        read_manifest(write(tmp_path, "csv", rows))


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("a.csv", b"path,caption\na.mp4,x,y\n", "line 2 has more values than the header"),
        ("a.csv", b'path\n"a.mp4\n', r"no CSV after line 1 \(unexpected end"),
        ("a.csv", b"path\n\xff.mp4\n", "byte 5 is no UTF-8"),
        ("a.csv", b"", "got no rows"),
        ("a.csv", b"path,start_s,end_s\na.mp4,2,1\nb.mp4,x,\n", "2 rows cannot be used.*row 1: "),
        ("a.csv", b"path,end_s\na.mp4,nan\n", "row 1: start_s 0 must be before end_s nan"),
        ("a.csv", b"path,caption\n,x\n", "row 1: `path` or `uri` must be text"),
        ("a.jsonl", b'{"path": "a.mp4"}\n{broken\n', "line 2 is no JSON"),
        ("a.jsonl", b"[1]\n", "line 1 is no JSON object"),
        ("a.jsonl", b"[" * 100_000, "line 1 is no JSON"),
        ("a.csv", b"path,caption,path\na.mp4,x,b.mp4\n", "a.csv has more than one column 'path'"),
        ("a.jsonl", b'{"path": "a.mp4", "path": "b.mp4"}\n', "line 1: 'path' is there more than"),
        ("a.jsonl", b'{"path": 3}\n', "row 1: .* must be text, got 3"),
        (
            "a.jsonl",
            b'{"path": "a.mp4", "end_s": 1' + b"0" * 400 + b"}\n",
            r"a\.jsonl: 1 rows .* row 1: end_s must be seconds, got 1(0{79})\.\.\.$",
        ),
        (
            "a.jsonl",
            b'{"path": "a.mp4"}\n{"end_s": ' + b"9" * 5000 + b"}\n",
            r"a\.jsonl: line 2: a number in .* has more digits than can be read; shorten it$",
        ),
        ("a.jsonl", b'{"path": "a.mp4", "end_s": [3]}', r"row 1: end_s must be seconds, got \[3\]"),
        ("a.jsonl", b'{"path": "a.mp4", "caption": ["x"]}\n', "row 1: expected text"),
        ("a.jsonl", b'{"path": "gopher://x/y"}\n', "row 1: 'gopher://x/y' is no address"),
        ("a.parquet", b"PAR1xxxx", "is no Parquet file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, data, named):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=named):
        read_manifest(str(tmp_path / name))


def test_a_repeated_column_of_a_parquet_file_is_named(tmp_path):
    table = pa.table([["a.mp4"], ["b.mp4"]], names=["path", "path"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has more than one column 'path'"):
        read_manifest(str(tmp_path / "a.parquet"))


def test_repeated_columns_that_are_not_used_do_not_matter(tmp_path):
    (tmp_path / "a.csv").write_text("path,,\na.mp4,1,2\n")
    (row,) = read_manifest(str(tmp_path / "a.csv"))
    assert row.uri == (tmp_path / "a.mp4").as_uri()


class Hostile(pa.ExtensionType):
    """A type whose values run code when they are looked at."""

    seen: ClassVar[list[str]] = []

    def __init__(self):
        super().__init__(pa.string(), "test.hostile")

    def __arrow_ext_serialize__(self):
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        return cls()

    def __arrow_ext_scalar_class__(self):
        class Value(pa.ExtensionScalar):
            def as_py(self, **_):
                Hostile.seen.append("run")

        return Value


def test_columns_of_strange_types_are_not_looked_at(tmp_path):
    pa.register_extension_type(Hostile())
    try:
        values = pa.ExtensionArray.from_storage(Hostile(), pa.array(["a.mp4"]))
        path = tmp_path / "list.parquet"
        pq.write_table(pa.table({"path": values}), path)
        pq.read_table(path).to_pylist()
        assert Hostile.seen == ["run"]
        with pytest.raises(DataError, match=r"column 'path' is of type .*expected text"):
            read_manifest(str(path))
        assert Hostile.seen == ["run"]
    finally:
        pa.unregister_extension_type("test.hostile")
    for column in ({"path": [b"a"]}, {"path": ["a"], "start_s": [[1.0]]}, {"path": [3]}):
        pq.write_table(pa.table(column), path)
        with pytest.raises(DataError, match="is of type"):
            read_manifest(str(path))
    named = pa.table({"path": pa.array(["a", "b", "a"]).dictionary_encode(), "end_s": [1, 2, 3]})
    pq.write_table(named, path)
    assert [row.said.end_s for row in read_manifest(str(path))] == [1.0, 2.0, 3.0]


def test_a_missing_or_huge_manifest_is_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="does not exist"):
        read_manifest(str(tmp_path / "none.csv"))
    path = tmp_path / "huge.csv"
    path.touch()
    os.truncate(path, (256 << 20) + 1)
    with pytest.raises(DataError, match="expected at most 268435456"):
        read_manifest(str(path))
    monkeypatch.setattr(manifest, "UNPACKED_LIMIT_BYTES", 1 << 20)
    # long names that pack into nothing
    names = pa.table({"path": ["x" * 8000] * 200})
    pq.write_table(names, tmp_path / "bomb.parquet", use_dictionary=False)
    assert (tmp_path / "bomb.parquet").stat().st_size < 1 << 18
    with pytest.raises(DataError, match="bytes unpacked, expected at most"):
        read_manifest(str(tmp_path / "bomb.parquet"))


def write_shared(path, caption, num_rows):
    """A text that all rows share is in a Parquet file once."""
    indices = pa.array([0] * num_rows, pa.int32())
    shared = pa.DictionaryArray.from_arrays(indices, [caption])
    rows = {"path": ["a.mp4"] * num_rows, "caption": shared, "start_s": range(num_rows)}
    table = pa.table({name: pa.array(values) for name, values in rows.items()})
    pq.write_table(table, path, store_schema=False, compression="zstd")


@pytest.mark.parametrize("num_rows", [3000, 60_000])
def test_a_text_that_rows_share_counts_in_each_before_it_is_read(tmp_path, num_rows):
    path = tmp_path / "bomb.parquet"
    write_shared(path, "x" * (1 << 20), num_rows)
    assert path.stat().st_size < 1 << 18
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with pytest.raises(DataError, match=r"\d{10,} bytes unpacked, expected at most"):
            read_manifest(str(path))
        assert time.perf_counter() - started < 5  # 0.1 s; one by one the texts take minutes
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_long_texts_below_the_limit_are_read_in_little_memory(tmp_path):
    path = tmp_path / "list.parquet"
    write_shared(path, "\n".join(["x" * 999] * 1000), 300)
    tracemalloc.start()
    try:
        rows = read_manifest(str(path))
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert [row.said.start_s for row in rows] == list(range(300))
    assert {row.said.notes.caption for row in rows} == {f"{'x' * 999} {'x' * 999} "[:2000].strip()}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "txt"])
def test_too_many_rows_are_refused_before_they_are_read(tmp_path, monkeypatch, kind):
    if kind == "txt":
        (tmp_path / "list.txt").write_text("a.mp4\n" * 4)
    else:
        write(tmp_path, kind, [{"path": f"{name}.mp4"} for name in "abcd"])
    uri = str(tmp_path / f"list.{kind}")
    assert len(read_manifest(uri)) == (1 if kind == "txt" else 4)
    monkeypatch.setattr(manifest, "MANIFEST_LIMIT_ROWS", 3)
    with pytest.raises(
        DataError, match=rf"list\.{kind}: \d (rows|lines), expected at most 3; split"
    ):
        read_manifest(uri)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a.csv", "b.mp4," + "," * (1 << 20)),
        ("a.jsonl", '{"path": "b.mp4", "x": [' + "[]," * (1 << 19) + "0]}"),
    ],
)
def test_a_line_that_is_too_long_is_named(tmp_path, name, line):
    header = "path" if name == "a.csv" else '{"path": "a.mp4"}'
    (tmp_path / name).write_text(f"{header}\n{line}\n")
    with pytest.raises(DataError, match=r"line 2 has \d{7} characters, expected at most 1048576"):
        read_manifest(str(tmp_path / name))


def test_columns_that_are_not_used_cost_nothing_a_row(tmp_path):
    names = [f"c{index}" for index in range(100_000)]
    path = tmp_path / "wide.csv"
    path.write_text("\n".join([",".join([*names, "path", "caption"]), *["x"] * 1000, ""]))
    started = time.perf_counter()
    with pytest.raises(DataError, match=r"1000 rows cannot be used.* row 1: `path` or `uri` must"):
        read_manifest(str(path))
    assert time.perf_counter() - started < 5  # 0.3 s; as a dictionary each row took 10 ms


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.mp4", "file:///m/f/a.mp4"),
        ("./s/../a b%20.mp4", "file:///m/f/a%20b%2520.mp4"),
        ("..a/b.mp4", "file:///m/f/..a/b.mp4"),
        ("/else/a.mp4", "file:///else/a.mp4"),
        ("file:///else/a%20b.mp4", "file:///else/a%20b.mp4"),
        ("s3://b/../k", "s3://b/../k"),
        ("../a.mp4", None),
        ("s/../../a.mp4", None),
        ("../f2/a.mp4", None),
        ("", None),
        ("a\0.mp4", None),
        ("file://host/a.mp4", None),
        ("file://localhosts/a.mp4", None),
        ("file://localhost/else/a%20b.mp4", "file:///else/a%20b.mp4"),
        ("file:///a%00b/../c.mp4", None),
        ("http://host/a.mp4", None),
        ("subfile,,start,0,end,0,,:///etc/passwd", None),
        ("s3://bucket", None),
    ],
)
def test_names_stay_where_they_may(name, found):
    if found is None:
        with pytest.raises(DataError):
            resolve_name("/m/f/list.csv", name)
    else:
        assert resolve_name("/m/f/list.csv", name) == found


def test_a_manifest_of_a_store_names_no_file_of_this_machine():
    assert resolve_name("s3://b/p/list.csv", "x/./a.mp4") == "s3://b/p/x/a.mp4"
    assert resolve_name("s3://b/p/list.csv", "s3://c/a.mp4") == "s3://c/a.mp4"
    assert resolve_name("s3://b/p/list.csv", "x//a.mp4") == "s3://b/p/x//a.mp4"
    assert resolve_name("s3://b/p//list.csv", "a.mp4") == "s3://b/p//a.mp4"
    assert resolve_name("s3://b/p/list.csv", "s3://c//x//a.mp4") == "s3://c//x//a.mp4"
    for name in (
        ".",
        "x/",
        "file://localhost/etc/passwd",
        "/etc/passwd",
        "file:///etc/passwd",
        "../a.mp4",
        "x/../../a.mp4",
    ):
        with pytest.raises(DataError):
            resolve_name("s3://b/p/list.csv", name)


def test_a_link_does_not_lead_out(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    with pytest.raises(DataError, match="leads out"):
        resolve_name(str(tmp_path / "in" / "list.csv"), "link/a.mp4")
    linked = tmp_path / "linked"
    linked.symlink_to(tmp_path / "in")  # the folder itself may be one
    assert resolve_name(str(linked / "list.csv"), "a.mp4") == (linked / "a.mp4").as_uri()


part = st.sampled_from(
    [
        "..",
        ".",
        "",
        "a",
        "%2e%2e",
        "\\..",
        "..\\",
        "\u2025",
        "\uff0e\uff0e",
        "x" * 300,
        "~",
        "$HOME",
    ]
)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(parts=st.lists(part, min_size=1, max_size=6))
def test_no_relative_name_leads_out(tmp_path, parts):
    name = "/".join(parts).lstrip("/")
    try:
        uri = resolve_name(str(tmp_path / "f" / "list.csv"), name)
    except DataError:
        return
    path = storage.local_path(uri)
    assert os.path.realpath(path).startswith(f"{os.path.realpath(tmp_path)}/f/")


def test_what_is_not_used_is_said_once_a_run(tmp_path, caplog):
    from ursa.ingestion import notes_digest
    from ursa.sources.listing import discover_videos

    (tmp_path / "a.mp4").write_bytes(b"video")
    path = tmp_path / "list.csv"
    path.write_text("path,colour\na.mp4,red\na.mp4,blue\n")
    with caplog.at_level(logging.WARNING):
        sources = discover_videos(str(path))
        notes_digest(str(path), sources)
    assert caplog.text.count("columns that are not used: colour") == 1
    assert caplog.text.count("1 rows repeat others") == 1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["gone.mp4"], r"the file that .*list\.txt names does not exist; .*/gone\.mp4"),
        (["a.mp4", "b/c.mp4"], r"none of the 2 files that .*list\.txt names exists; .*/b/c\.mp4"),
    ],
)
def test_manifest_whose_files_are_all_missing_is_refused(tmp_path, names, expected):
    from ursa.sources.listing import discover_videos

    path = tmp_path / "list.txt"
    path.write_text("\n".join(names))
    with pytest.raises(DataError, match=expected):
        discover_videos(str(path))
    (tmp_path / "there.mp4").write_bytes(b"video")
    path.write_text("\n".join([*names, "there.mp4"]))
    assert len(discover_videos(str(path))) == len(names) + 1


def test_a_name_that_no_file_can_have_is_missing_and_says_why(tmp_path):
    from ursa.sources.listing import discover_videos

    (tmp_path / "there.mp4").write_bytes(b"video")
    path = tmp_path / "list.txt"
    path.write_text(f"there.mp4\n{'a' * 252}.mp4\n{'b' * 251}.mp4\n{'c/' * 2050}d.mp4")
    found = discover_videos(str(path))
    problems = {source.uri.rpartition("/")[2]: (source.problem, source.detail) for source in found}
    assert problems.pop("there.mp4") == (None, "")
    assert problems.pop(f"{'b' * 251}.mp4") == ("missing", "there is no such file")
    assert len(problems) == 2
    for problem, detail in problems.values():
        assert problem == "missing"
        assert "no file can have this name" in detail
