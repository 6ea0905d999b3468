import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests import factories
from ursa import storage
from ursa.artifacts import SCHEMA_VERSION
from ursa.data.dataset import TokenSamples, code_counts, motion_scores
from ursa.data.schema import token_schema
from ursa.data.shards import iter_shards, read_shard, write_shard
from ursa.errors import DataExhaustedError, ShardFormatError

SAMPLE_BYTES = 2 * 12 + 512
"""What a sample counts as in a block."""


@pytest.fixture
def shard(tmp_path):
    rows = factories.token_rows("video", 5)
    return write_shard(rows, str(tmp_path / "s"), codebook_size=60)


@pytest.mark.parametrize(
    ("codes", "kind"), [(60, pa.uint16()), (1 << 16, pa.uint16()), ((1 << 16) + 1, pa.uint32())]
)
def test_ids_are_as_wide_as_the_codebook_needs(codes, kind):
    assert token_schema(codes).field("visual_ids").type.value_type == kind


def test_name_holds_the_hash(shard):
    assert shard.uri.endswith(f"-{shard.sha256[:16]}.parquet")
    data = storage.read_bytes(shard.uri)
    assert len(data) == shard.num_bytes
    assert (
        pq.read_schema(pa.BufferReader(data)).metadata[b"ursa.schema_version"]
        == str(SCHEMA_VERSION).encode()
    )


def test_missing_shard(shard):
    storage.remove_file(shard.uri)
    with pytest.raises(ShardFormatError, match="is missing; `ursa data repair`"):
        read_shard(shard, codebook_size=60)


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:-9] + b"x" + d[-8:]])
def test_damaged_shard(shard, damage):
    storage.write_bytes(shard.uri, damage(storage.read_bytes(shard.uri)))
    with pytest.raises(ShardFormatError, match="sha256 is"):
        read_shard(shard, codebook_size=60)


def test_shard_of_other_codes_is_refused(shard):
    with pytest.raises(ShardFormatError, match=r"ursa\.codebook_size is 60, expected 61"):
        read_shard(shard, codebook_size=61)


def test_wrong_number_of_rows(shard):
    with pytest.raises(ShardFormatError, match="5 rows, expected 6"):
        read_shard(shard.model_copy(update={"num_samples": 6}), codebook_size=60)


def test_rows_that_do_not_fit_the_schema_are_not_written(tmp_path):
    rows = factories.token_rows("video", 2)
    rows[1]["visual_ids"][0] = 1 << 16
    with pytest.raises(pa.ArrowInvalid):
        write_shard(rows, str(tmp_path / "s"), codebook_size=60)
    assert list(tmp_path.iterdir()) == []


def test_rows_from_arrays_are_those_from_lists(tmp_path):
    rows = factories.token_rows("video", 5)
    arrays = [row | {"visual_ids": np.array(row["visual_ids"], np.uint16)} for row in rows]
    lists, from_arrays = (
        write_shard(each, str(tmp_path / "s"), codebook_size=60) for each in (rows, arrays)
    )
    assert from_arrays == lists


@pytest.mark.parametrize("columns", [["caption"], ["visual_ids", "sample_id"]])
def test_columns_are_those_that_are_asked_for(shard, columns):
    table = read_shard(shard, codebook_size=60, columns=columns)
    assert table.equals(read_shard(shard, codebook_size=60).select(columns))


def test_shards_come_in_their_order(tmp_path):
    rows = factories.token_rows("video", 30)
    shards = [write_shard(rows[i : i + 2], f"{tmp_path}/s", codebook_size=60) for i in range(15)]
    tables = list(iter_shards(shards, codebook_size=60))
    assert [table["sample_id"][0].as_py() for table in tables] == [
        row["sample_id"] for row in rows[:15]
    ]
    assert list(iter_shards([], codebook_size=60)) == []


@pytest.mark.usefixtures("no_threads_left")
def test_a_damaged_shard_stops_those_behind_it(tmp_path):
    rows = factories.token_rows("video", 30)
    shards = [write_shard(rows[i : i + 2], f"{tmp_path}/s", codebook_size=60) for i in range(15)]
    storage.write_bytes(shards[2].uri, b"x")
    tables = iter_shards(shards, codebook_size=60)
    assert len([next(tables), next(tables)]) == 2
    with pytest.raises(ShardFormatError, match="sha256 is"):
        next(tables)


def test_samples_keep_ids_captions_and_motion(token_datasets):
    samples = TokenSamples(token_datasets.video_train)
    rows = factories.token_rows("video", 20)
    assert len(samples) == 20
    batch = samples.batch([3, 0, 17])
    assert batch.visual_ids.shape == (3, 2, 2, 3)
    assert batch.visual_ids.dtype == torch.int64
    for place, index in enumerate([3, 0, 17]):
        expected = np.array(rows[index]["visual_ids"]).reshape(2, 2, 3)
        assert np.array_equal(batch.visual_ids[place].numpy(), expected)
        assert batch.captions[place] == rows[index]["caption"]
        assert batch.motion_px_per_s[place] == rows[index]["motion_px_per_s"]
        assert batch.sample_ids[place] == rows[index]["sample_id"]


def test_order_of_samples_does_not_depend_on_the_shards(token_datasets):
    dataset = token_datasets.video_train
    assert len(dataset.shards) > 1
    turned = dataset.model_copy(update={"shards": dataset.shards[::-1]})
    one, other = TokenSamples(dataset), TokenSamples(turned)
    assert one.sample_ids == other.sample_ids
    places = list(range(len(one)))
    assert torch.equal(one.batch(places).visual_ids, other.batch(places).visual_ids)


@pytest.mark.parametrize("block_bytes", [1 << 20, 5 * SAMPLE_BYTES])
@pytest.mark.parametrize("limit", [1, 7, 20, 99])
def test_a_few_samples_are_spread(token_datasets, block_bytes, limit):
    dataset = token_datasets.video_train
    every = TokenSamples(dataset)
    few = TokenSamples(dataset, max_samples=limit, block_bytes=block_bytes)
    assert len(few) == len(set(few.sample_ids)) == min(limit, 20)
    rows = [every.sample_ids.index(name) for name in few.sample_ids]
    assert torch.equal(few.batch(range(len(few))).visual_ids, every.batch(rows).visual_ids)
    assert few.captions == [every.captions[row] for row in rows]
    if block_bytes > 20 * SAMPLE_BYTES:
        assert rows == [index * 20 // len(few) for index in range(len(few))]
    elif limit == 7:  # from both shards
        assert {row < 10 for row in rows} == {True, False}


def test_of_a_large_data_set_only_shards_with_chosen_samples_are_read(token_datasets):
    dataset = token_datasets.video_train
    first, last = sorted(dataset.shards, key=lambda shard: shard.sha256)
    gone = last.model_copy(update={"uri": last.uri + ".gone"})
    torn = dataset.model_copy(update={"shards": (gone, first)})
    assert len(TokenSamples(torn, max_samples=1, block_bytes=5 * SAMPLE_BYTES)) == 1
    with pytest.raises(ShardFormatError, match="is missing"):
        TokenSamples(torn, max_samples=1)


def test_counts_and_scores_are_over_all_samples(token_datasets):
    dataset = token_datasets.video_train
    rows = factories.token_rows("video", 20)
    ids = np.concatenate([row["visual_ids"] for row in rows])
    assert np.array_equal(code_counts(dataset), [(ids == code).sum() for code in range(60)])
    scores = [row["motion_px_per_s"] for row in rows]
    assert sorted(motion_scores(dataset)) == sorted(score for score in scores if score is not None)


def test_samples_of_another_shape_are_refused(token_datasets):
    other = token_datasets.video_train.model_copy(update={"latent_shape": (2, 2, 2)})
    with pytest.raises(ShardFormatError, match=r"other numbers of ids than the 8 of the data set"):
        TokenSamples(other)


def test_no_samples_say_what_to_do(token_datasets):
    empty = token_datasets.video_train.model_copy(update={"shards": ()})
    with pytest.raises(DataExhaustedError, match="loosen the selection"):
        TokenSamples(empty)
