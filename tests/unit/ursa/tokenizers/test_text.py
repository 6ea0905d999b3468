import json

import pytest
import torch
from tokenizers import Tokenizer, models

from tests import factories
from ursa.errors import ConfigError
from ursa.tokenizers.text import (
    TextTokenizer,
    load_text_tokenizer,
    motion_prompt,
    train_text_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_text_tokenizer(factories.CAPTIONS, vocab_size=300)


@pytest.mark.parametrize("text", ["a red ball rolls", "猫が走る 🐈", "", " two  spaces\n", "Ünï"])
def test_any_text_is_a_round_trip(tokenizer, text):
    ids = tokenizer.encode([text], max_length=60)[0]
    assert tokenizer.decode(ids.tolist()) == text


def test_prompts_are_padded_left_and_cut_right(tokenizer):
    ids = tokenizer.encode(["a red ball rolls", "", "a"], max_length=3)
    assert ids.shape == (3, 3)
    assert ids.dtype == torch.int64
    full = tokenizer.encode(["a red ball rolls"], max_length=60)[0]
    assert ids[0].tolist() == [i for i in full.tolist() if i != tokenizer.pad_id][:3]
    assert (ids[1] == tokenizer.pad_id).all()
    assert ids[2, :2].tolist() == [tokenizer.pad_id] * 2
    assert ids[2, 2] != tokenizer.pad_id
    assert ids.max() < tokenizer.vocab_size


def test_no_prompts_are_no_rows(tokenizer):
    ids = tokenizer.encode([], max_length=3)
    assert ids.shape == (0, 3)
    assert ids.dtype == torch.int64


def test_captions_become_shorter_than_their_bytes(tokenizer):
    ids = tokenizer.encode(["the night city"], max_length=60)[0]
    assert int((ids != tokenizer.pad_id).sum()) < len("the night city")


def test_training_does_not_depend_on_order(tokenizer, tmp_path):
    other = train_text_tokenizer(reversed(factories.CAPTIONS), vocab_size=300)
    for name, item in (("a", tokenizer), ("b", other)):
        item.save(tmp_path / name)
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    again = load_text_tokenizer(tmp_path / "t")
    prompts = ["a tree, slowly", "unseen words"]
    assert torch.equal(again.encode(prompts, max_length=9), tokenizer.encode(prompts, max_length=9))
    assert (again.pad_id, again.bov_id) == (tokenizer.pad_id, tokenizer.bov_id)
    assert again.vocab_size == tokenizer.vocab_size <= 300


def test_transformers_reads_what_is_saved(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    prompts = ["motion=9.0, a red ball rolls", "", "a tree, 2 cats"]
    ids = theirs(prompts, padding="max_length", truncation=True, max_length=20).input_ids
    assert ids == tokenizer.encode(prompts, max_length=20).tolist()
    assert theirs.pad_token_id == tokenizer.pad_id


def test_files_of_others_are_written_again_as_they_were(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    config = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", "custom": 1}
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "a" / "merges.txt").write_text("#version: 0.2\n")
    loaded = load_text_tokenizer(tmp_path / "a")
    assert loaded.class_name == "Qwen2TokenizerFast"
    loaded.save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json is not a tokenizer file"):
        load_text_tokenizer(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer.json is missing"):
        load_text_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks the token <\|endoftext\|>"):
        TextTokenizer(Tokenizer(models.BPE()))


def test_motion_prefix():
    assert motion_prompt("a red ball", 9) == "motion=9.0, a red ball"
    assert motion_prompt("a red ball", 0.04) == "motion=0.0, a red ball"
    assert motion_prompt("a red ball", None) == "a red ball"
