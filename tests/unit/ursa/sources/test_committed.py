import tracemalloc

import pytest

from ursa import storage
from ursa.artifacts import FailureReason, SourceVideo
from ursa.config import fingerprint
from ursa.errors import ShardFormatError
from ursa.sources.committed import SourceListing, commit_listing, load_listing

VIDEO = SourceVideo(uri="file:///v/a%20b.mp4", num_bytes=3, etag="e")
MEMBER = SourceVideo(uri="s3://b/x.tar#c.mp4", num_bytes=0, etag="f", offset_bytes=1 << 40)
LOST = SourceVideo(
    uri="s3://b/z", num_bytes=1, etag="g", problem=FailureReason.MISSING, detail="no such file"
)


def listing_of(folder, sources):
    return SourceListing(
        manifest_uri=str(folder / "manifest.json"),
        source_uri="s3://b",
        sources=tuple(sources),
        notes_digest="n",
        fingerprint="f",
    )


def many(count):
    return tuple(
        SourceVideo(
            uri=f"s3://bucket/videos/shard-{index // 1000:05d}/clip-{index:09d}.mp4",
            num_bytes=12345678,
            etag=f"{index:032x}",
        )
        for index in range(count)
    )


@pytest.mark.parametrize("sources", [(VIDEO, MEMBER, LOST), ()])
def test_a_listing_is_read_as_it_was(tmp_path, sources):
    listing = listing_of(tmp_path, sources)
    assert load_listing(listing.manifest_uri) is None
    commit_listing(listing)
    commit_listing(listing)  # as the next run does
    found = load_listing(listing.manifest_uri)
    assert found.sources == sources
    assert (found.source_uri, found.notes_digest, found.fingerprint) == ("s3://b", "n", "f")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_listing_moves_with_its_root(tmp_path):
    (tmp_path / "old").mkdir()
    commit_listing(listing_of(tmp_path / "old", [VIDEO]))
    (tmp_path / "old").rename(tmp_path / "new")
    assert load_listing(str(tmp_path / "new" / "manifest.json")).sources == (VIDEO,)


def test_a_damaged_table_is_named_and_written_again(tmp_path):
    listing = listing_of(tmp_path, [VIDEO])
    commit_listing(listing)
    (table,) = tmp_path.glob("sources-*.parquet")
    table.write_bytes(table.read_bytes()[:-1])
    with pytest.raises(ShardFormatError, match=r"sources-.* is damaged"):
        load_listing(listing.manifest_uri)
    commit_listing(listing)
    assert load_listing(listing.manifest_uri).sources == (VIDEO,)


def test_hundreds_of_thousands_of_files(tmp_path):
    listing = listing_of(tmp_path, many(350_000))
    commit_listing(listing)
    assert storage.size_bytes(listing.manifest_uri) < 1000
    assert load_listing(listing.manifest_uri).sources == listing.sources


def test_a_listing_takes_little_more_than_its_files(tmp_path):
    tracemalloc.start()
    try:
        listing = listing_of(tmp_path, many(20_000))
        size = tracemalloc.get_traced_memory()[0]
        fingerprint(listing.sources)
        commit_listing(listing)
        assert tracemalloc.get_traced_memory()[1] < 1.3 * size
        found = load_listing(listing.manifest_uri)
        assert tracemalloc.get_traced_memory()[1] < 2.5 * size  # both of them
        assert len(found.sources) == 20_000
    finally:
        tracemalloc.stop()
