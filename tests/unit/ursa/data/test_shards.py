import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests import factories
from ursa import storage
from ursa.artifacts import SCHEMA_VERSION
from ursa.data.dataset import TokenSamples
from ursa.data.schema import token_schema
from ursa.data.shards import read_shard, read_shards, write_shard
from ursa.errors import DataExhaustedError, ShardFormatError


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
    with pytest.raises(ShardFormatError, match="schema differs from version 3 with 61 codes"):
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


def test_no_shards_are_an_empty_table():
    assert read_shards([], codebook_size=60).num_rows == 0


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


def test_no_samples_say_what_to_do(token_datasets):
    empty = token_datasets.video_train.model_copy(update={"shards": ()})
    with pytest.raises(DataExhaustedError, match="loosen the selection"):
        TokenSamples(empty)
