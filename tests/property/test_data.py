import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import factories
from ursa.config import fingerprint, load_config, parse_config
from ursa.data.addresses import address_seed
from ursa.data.shards import read_shard, write_shard
from ursa.errors import ConfigError
from ursa.training.stage import stage_fingerprint

few = settings(max_examples=40, deadline=None)


@few
@given(st.lists(st.one_of(st.integers(0, 99), st.text("ab0", max_size=5)), min_size=1, max_size=4))
def test_address_is_a_seed(address):
    seed = address_seed(*address)
    assert 0 <= seed < 2**63
    assert seed == address_seed(*address)
    assert seed != address_seed(*address, 0)
    torch.Generator().manual_seed(seed)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    count=st.integers(1, 7),
    seed=st.integers(0, 1000),
    codebook_size=st.sampled_from([60, 1 << 16, (1 << 16) + 1]),
    caption=st.text('aé\n"\x00猫', max_size=20),
)
def test_shards_are_a_round_trip(tmp_path, count, seed, codebook_size, caption):
    rows = factories.token_rows("video", count, seed=seed, codebook_size=codebook_size)
    rows[0]["caption"] = caption
    rows[0]["visual_ids"][0] = codebook_size - 1
    prefix = str(tmp_path / "shard")
    shard = write_shard(rows, prefix, codebook_size=codebook_size)
    assert read_shard(shard, codebook_size=codebook_size).to_pylist() == rows
    assert write_shard(rows, prefix, codebook_size=codebook_size) == shard


json_values = st.recursive(
    st.one_of(st.integers(-9, 9), st.text("ab1é", max_size=3), st.booleans(), st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("ab1é", max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@few
@given(json_values, json_values)
def test_fingerprints_are_equal_iff_the_content_is(one, other):
    def canonical(value):
        # 1 == True in Python but not in JSON
        if isinstance(value, dict):
            return {key: canonical(item) for key, item in sorted(value.items())}
        return [canonical(v) for v in value] if isinstance(value, list) else (type(value), value)

    assert len(fingerprint(one)) == 64
    assert (fingerprint(one) == fingerprint(other)) == (canonical(one) == canonical(other))


@few
@given(st.dictionaries(st.text("abcé", max_size=4), st.integers(), min_size=2, max_size=5))
def test_order_of_keys_does_not_matter(values):
    assert fingerprint(values) == fingerprint(dict(reversed(values.items())))


RELEVANT = [
    {"seed": 1},
    {"model": {"num_layers": 3}},
    {"path": {"c": 4.0}},
    {"text_tokenizer": {"max_prompt_length": 7}},
    {"stages": {"video_pretrain": {"max_steps": 7}}},
    {"stages": {"video_pretrain": {"prompt_dropout": 0.2}}},
]
IRRELEVANT = [
    {"stages": {"async_finetune": {"max_steps": 7}}},
    {"release": {"model_name": "other"}},
    {"evaluation": {"max_samples": 3}},
    {"ingestion": {"max_duration_s": 1.0}},
]


@pytest.mark.parametrize("changes", RELEVANT)
def test_a_relevant_change_makes_another_stage(make_request, changes):
    print_ = stage_fingerprint(make_request())
    changed = make_request().model_copy(update={"config": factories.tiny_config(changes)})
    assert stage_fingerprint(changed) != print_


@pytest.mark.parametrize("changes", IRRELEVANT)
def test_other_changes_keep_the_stage(make_request, changes):
    request = make_request()
    changed = request.model_copy(update={"config": factories.tiny_config(changes)})
    assert stage_fingerprint(changed) == stage_fingerprint(request)
    assert stage_fingerprint(make_request(output="elsewhere")) == stage_fingerprint(request)


def leaves(values, path=()):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


DUMPED = load_config("tiny").model_dump(mode="json")
LEAVES = sorted(leaves(DUMPED))


@few
@given(st.sampled_from(LEAVES))
def test_an_override_changes_its_own_value_alone(path):
    def value(of, where):
        for key in where:
            of = of[key]
        return of

    def nested(where, leaf):
        return {where[0]: nested(where[1:], leaf)} if where else leaf

    same = load_config("tiny", nested(path, value(DUMPED, path)))
    assert same == load_config("tiny")
    with pytest.raises(ConfigError, match=r"\.".join(path)):
        load_config("tiny", nested(path, {"not": "a value"}))
    unknown = (*path[:-1], path[-1] + "_x")
    with pytest.raises(ConfigError, match=r"\.".join(unknown)):
        load_config("tiny", nested(unknown, 1))
    assert parse_config(DUMPED).model_dump(mode="json") == DUMPED


@few
@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_overrides_of_several_sections_are_merged(steps, batch):
    config = load_config(
        "tiny",
        {"seed": 3, "stages": {"video_pretrain": {"max_steps": steps, "global_batch_size": batch}}},
    )
    expected = factories.merged(
        DUMPED,
        {"seed": 3, "stages": {"video_pretrain": {"max_steps": steps, "global_batch_size": batch}}},
    )
    assert config.model_dump(mode="json") == expected
