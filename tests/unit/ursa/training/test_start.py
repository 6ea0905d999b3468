"""What a stage starts from: the stage before, a model directory, a Qwen3 language model."""

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests import factories
from ursa import storage
from ursa.config import STAGES
from ursa.errors import ConfigError
from ursa.model.pretrained import load_transformer
from ursa.training import stage as stage_module
from ursa.training.distributed import Group
from ursa.training.stage import find_stage, stage_fingerprint, train_stage


def begun(request):
    """The trainer of a stage before its first step."""
    return stage_module._build_trainer(request, Group(0, 1))


@pytest.fixture
def model_folder(exported_model) -> Path:
    return storage.local_path(exported_model.directory_uri)


@pytest.fixture(scope="module")
def qwen3(tiny_data, tmp_path_factory) -> Path:
    """A language model of the run's size, with the text tokenizer of the run."""
    model = factories.tiny_config().model
    folder = tmp_path_factory.mktemp("qwen3")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        language_model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=tiny_data.text_tokenizer.vocab_size + 7,  # rows without an id
                hidden_size=model.hidden_size,
                intermediate_size=model.intermediate_size,
                num_hidden_layers=model.num_layers,
                num_attention_heads=model.num_attention_heads,
                num_key_value_heads=model.num_key_value_heads,
                head_dim=model.head_dim,
                rope_theta=model.rope_theta,
                rms_norm_eps=model.rms_norm_eps,
            )
        )
    language_model.to(torch.bfloat16).save_pretrained(folder)
    shutil.copytree(tiny_data.text_tokenizer.directory_uri, folder, dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize("part", ["", "transformer"])
def test_a_model_directory_gives_its_weights_and_nothing_else(make_request, model_folder, part):
    uri = str(model_folder / part)
    request = make_request("async_finetune", init_from_uri=uri)
    trainer = begun(request)
    expected = load_transformer(model_folder / "transformer").state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
        assert value.dtype == torch.float32
    # the average starts as a copy, the optimizer anew, the schedule at its first step
    for name, value in trainer.average.module.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert int(trainer.average.n_averaged) == 0
    assert trainer.optimizer.state_dict()["state"] == {}
    assert trainer.model.training
    steps: list[int] = []
    done = train_stage(request, on_metrics=lambda step, _: steps.append(step))
    assert steps == [1, 2, 3, 4, 5, 6]
    assert done.parent_uri == uri
    assert find_stage(request) == done


def test_a_stage_before_does_not_matter_beside_a_start(make_request, model_folder):
    parent = train_stage(make_request("video_pretrain", max_steps=1))
    uri = str(model_folder)
    alone = make_request("async_finetune", init_from_uri=uri)
    after = make_request("async_finetune", init_from_uri=uri, init_from=parent)
    assert stage_fingerprint(alone) == stage_fingerprint(after)
    assert stage_fingerprint(alone) != stage_fingerprint(make_request("async_finetune"))


def test_only_stages_after_a_start_are_needed():
    def needed(*with_start):
        stages = {name: {"init_from": "/model"} for name in with_start}
        return factories.tiny_config({"stages": stages}).stages.needed()

    assert needed() == needed("image_pretrain") == STAGES
    assert needed("video_pretrain") == STAGES[1:]
    assert needed("image_pretrain", "async_finetune") == STAGES[2:]


def test_a_language_model_gives_layers_and_text_rows(make_request, qwen3, tiny_data):
    request = make_request("image_pretrain", init_from_uri=str(qwen3))
    model = begun(request).model
    source = Qwen3ForCausalLM.from_pretrained(qwen3, dtype=torch.bfloat16).state_dict()
    text = tiny_data.text_tokenizer.vocab_size
    for name, value in model.state_dict().items():
        if name == "model.embed_tokens.weight":
            assert torch.equal(value[:text], source[name][:text].float())
            assert value.shape[0] == text + factories.CODEBOOK_SIZE
        elif name != "lm_head.weight":
            assert torch.equal(value, source[name].float()), name
    again, other = (
        begun(make_request("image_pretrain", init_from_uri=str(qwen3), config={"seed": seed})).model
        for seed in (0, 1)
    )
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    metrics = train_stage(request).metrics
    assert metrics["train/loss"] < 4.3  # ln 60 = 4.09


@pytest.mark.parametrize("whole", [[], ["lm_head"], ["embed_tokens"]])
def test_adapters_leave_no_new_row_of_a_language_model_at_random(make_request, qwen3, whole):
    lora = {"rank": 2, "whole_modules": whole}
    request = make_request("image_pretrain", init_from_uri=str(qwen3), lora=lora)
    with pytest.raises(
        ConfigError, match=r"is a language model.*lora.whole_modules to \[embed_tokens, lm_head\]"
    ):
        begun(request)
    lora["whole_modules"] = ["embed_tokens", "lm_head"]
    trainer = begun(make_request("image_pretrain", init_from_uri=str(qwen3), lora=lora))
    trained = {name for name, _ in trainer.trained.named_parameters() if ".lora_" not in name}
    assert trained == {"model.embed_tokens.weight", "lm_head.weight"}


def test_weights_that_do_not_fit_are_named(make_request, model_folder, qwen3):
    for uri in (model_folder, qwen3):
        request = make_request(
            init_from_uri=str(uri), config={"model": {"num_layers": 3, "rope_theta": 5.0}}
        )
        with pytest.raises(
            ConfigError,
            match=r"stages.video_pretrain.init_from: .* num_hidden_layers 2 where model.num_layers "
            r"gives 3; rope_theta 100.0 where model.rope_theta gives 5.0; change",
        ):
            train_stage(request)


def test_other_tokenizers_are_refused(make_request, model_folder, qwen3, tmp_path, tiny_data):
    other = factories.write_visual_tokenizer(str(tmp_path / "other"), seed=3)
    request = make_request(init_from_uri=str(model_folder))
    with pytest.raises(ConfigError, match=r"set visual_tokenizer.directory_uri to .*/vae"):
        train_stage(request.model_copy(update={"visual_tokenizer": other}))
    for uri, place in ((model_folder, "/tokenizer$"), (qwen3, f"{qwen3}$")):
        folder = tmp_path / "words"
        shutil.copytree(tiny_data.text_tokenizer.directory_uri, folder, dirs_exist_ok=True)
        words = Tokenizer.from_file(str(folder / "tokenizer.json"))
        words.add_tokens(["one more word"])
        words.save(str(folder / "tokenizer.json"))
        text = tiny_data.text_tokenizer.model_copy(update={"directory_uri": str(folder)})
        request = make_request(init_from_uri=str(uri))
        with pytest.raises(ConfigError, match=rf"set text_tokenizer.directory_uri to .*{place}"):
            train_stage(request.model_copy(update={"text_tokenizer": text}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no weights at .*: expected transformer/config.json"),
        ("{", "is no JSON"),
        ('{"model_type": "llama"}', "is no Qwen3 model|must be 'qwen3'"),
    ],
)
def test_directories_without_weights_say_what_is_expected(make_request, tmp_path, config, message):
    folder = tmp_path / "start"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=message):
        train_stage(make_request(init_from_uri=str(folder)))


def test_a_directory_that_is_not_there_is_named(make_request, tmp_path):
    with pytest.raises(ConfigError, match=r"no weights at .*gone"):
        train_stage(make_request(init_from_uri=str(tmp_path / "gone")))
