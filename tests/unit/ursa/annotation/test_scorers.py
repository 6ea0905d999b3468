import logging
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, ViTForImageClassification

from tests import tiny_models
from ursa.annotation.records import SeenClip
from ursa.annotation.scorers import check_scorers, load_scorer, resolve_scorers
from ursa.config import AnnotationConfig
from ursa.errors import ConfigError

LABELS = ("drawing", "NSFW", "porn")


@pytest.fixture(scope="module", autouse=True)
def quiet_transformers():
    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of tiny models by kind."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "clip": tiny_models.write_clip(folder / "clip"),
        "siglip": tiny_models.write_siglip(folder / "siglip"),
        "vit": tiny_models.write_classifier(folder / "vit", LABELS),
        "many": tiny_models.write_classifier(
            folder / "many", LABELS, problem="multi_label_classification"
        ),
        "llava": tiny_models.write_captioner(folder / "llava"),
    }


def frames(count=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 40, 56, 3), np.uint8)


def annotation(scorer=None, captioner=None, name="mine", **changes):
    values = {
        "captioner": captioner,
        "scorers": {} if scorer is None else {name: scorer},
        "device": "cpu",
        "clips_per_unit": 2,
        "max_failed_fraction": 0.0,
    }
    return AnnotationConfig.model_validate(values | changes)


def measure(config, caption="a red ball rolls", pictures=None):
    (scorer,) = resolve_scorers(config)
    seen = SeenClip(frames() if pictures is None else pictures, caption)
    return load_scorer(scorer, config)(seen)


def print_of(scorer, **changes):
    (resolved,) = resolve_scorers(annotation(scorer, **changes))
    return resolved.fingerprint


def embed(folder, pictures, caption):
    """The same numbers by hand: each picture alone, text by text."""
    model = AutoModel.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = tokenizer(caption, padding="max_length", max_length=20, return_tensors="pt")
    with torch.no_grad():
        images = [
            model.get_image_features(**processor(images=picture, return_tensors="pt"))
            for picture in pictures
        ]
        text = model.get_text_features(**texts).pooler_output[0]
    return torch.cat([image.pooler_output for image in images]), text


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_similarity_is_the_mean_cosine(models, kind):
    caption = "a red ball"
    images, text = embed(models[kind], frames(), caption)
    expected = torch.cosine_similarity(images, text[None]).mean()
    scorer = {"kind": "similarity", "model": str(models[kind])}
    found = measure(annotation(scorer), caption)
    assert found.scores == {"similarity": pytest.approx(float(expected), abs=1e-5)}
    assert measure(annotation(scorer), caption) == found
    other = measure(annotation(scorer), "the night city")
    assert other.scores["similarity"] != pytest.approx(found.scores["similarity"], abs=1e-4)


def test_a_long_caption_is_cut_off(models):
    scorer = {"kind": "similarity", "model": str(models["clip"])}
    assert -1 <= measure(annotation(scorer), "ball " * 500).scores["similarity"] <= 1


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_aesthetic_head_is_applied_to_normalised_embeddings(models, tmp_path, activation):
    torch.manual_seed(3)
    first, last = nn.Linear(tiny_models.EMBEDDING, 7), nn.Linear(7, 1)
    # LAION's layout: numbers of a Sequential with dropouts between
    tensors = {
        f"layers.{place}.{name}": value
        for place, layer in ((0, first), (10, last))
        for name, value in layer.state_dict().items()
    }
    save_file(tensors, tmp_path / "head.safetensors")
    images, _ = embed(models["clip"], frames(), "a")
    hidden = first(nn.functional.normalize(images, dim=-1))
    expected = last(hidden.relu() if activation == "relu" else hidden)
    scorer = {
        "kind": "aesthetic",
        "model": str(models["clip"]),
        "head": str(tmp_path / "head.safetensors"),
        "activation": activation,
    }
    assert measure(annotation(scorer)).scores == {
        "rating": pytest.approx(expected.mean().item(), abs=1e-5),
        "least_rating": pytest.approx(expected.min().item(), abs=1e-5),
    }


def test_aesthetic_head_of_one_layer(models, tmp_path):
    weight = torch.zeros(1, tiny_models.EMBEDDING)
    head = tmp_path / "head.safetensors"
    save_file({"weight": weight, "bias": torch.tensor([5.5])}, head)
    scorer = {"kind": "aesthetic", "model": str(models["clip"]), "head": str(head)}
    assert measure(annotation(scorer)).scores == {
        "rating": 5.5,
        "least_rating": 5.5,
    }


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}, "5 numbers, but .* gives 12"),
        ({"weight": torch.zeros(2, 12), "bias": torch.zeros(2)}, "ends with 2 outputs"),
        ({"weight": torch.zeros(1, 12)}, r"weight of .* has shape \(1, 12\)"),
        ({"0.weight": torch.zeros(4, 12), "0.bias": torch.zeros(4), "1.weight": torch.zeros(1, 3)},
         "expected a matrix over 4"),
        ({"other": torch.zeros(3)}, "ends with no outputs"),
    ],
)  # fmt: skip
def test_a_head_that_does_not_fit(models, tmp_path, tensors, message):
    head = tmp_path / "head.safetensors"
    save_file(tensors, head)
    scorer = {"kind": "aesthetic", "model": str(models["clip"]), "head": str(head)}
    with pytest.raises(ConfigError, match=message):
        measure(annotation(scorer))


def test_a_pickled_head_is_not_loaded(models, tmp_path):
    torch.save({"weight": torch.zeros(1, 12)}, tmp_path / "head.pth")
    scorer = {
        "kind": "aesthetic",
        "model": str(models["clip"]),
        "head": str(tmp_path / "head.pth"),
    }
    with pytest.raises(ConfigError, match=r"head.pth' cannot be read as safetensors"):
        measure(annotation(scorer))


def logits_of(folder, pictures):
    model = ViTForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        return model(**processor(images=list(pictures), return_tensors="pt")).logits


def test_classifier_takes_the_worst_frame(models):
    found = logits_of(models["vit"], frames()).softmax(-1)
    expected = found[:, 1] + found[:, 2]
    scorer = {"kind": "classifier", "model": str(models["vit"]), "labels": ["nsfw", "porn"]}
    assert measure(annotation(scorer)).scores == {
        "probability": pytest.approx(float(expected.max()), abs=1e-6),
        "mean_probability": pytest.approx(float(expected.mean()), abs=1e-6),
    }
    assert float(expected.min()) < float(expected.max()) - 1e-4  # frames do differ


def test_classifier_with_labels_that_do_not_exclude_each_other(models):
    expected = logits_of(models["many"], frames()).sigmoid()[:, 1:].amax(-1)
    scorer = {"kind": "classifier", "model": str(models["many"]), "labels": ["NSFW", "porn"]}
    assert measure(annotation(scorer)).scores == {
        "probability": pytest.approx(float(expected.max()), abs=1e-6),
        "mean_probability": pytest.approx(float(expected.mean()), abs=1e-6),
    }


def test_an_unknown_label_is_named_before_work_begins(models):
    scorer = {"kind": "classifier", "model": str(models["vit"]), "labels": ["nsfw", "gore"]}
    message = "annotation.scorers.mine.labels: the model has no label 'gore'; it has NSFW, drawing"
    with pytest.raises(ConfigError, match=message):
        check_scorers(annotation(scorer))


def captioner(models, **changes):
    return {"kind": "model", "model": str(models["llava"]), "max_tokens": 12, **changes}


def test_captioner_says_the_same_twice_and_looks_at_the_frames(models):
    config = annotation(captioner=captioner(models))
    found = measure(config)
    assert found.caption
    assert found.caption_long
    assert found.caption != found.caption_long  # another prompt
    assert measure(config) == found
    others = {measure(config, pictures=frames(seed=seed)).caption for seed in range(1, 6)}
    assert others != {found.caption}
    assert measure(annotation(captioner=captioner(models, long_prompt=None))).caption_long is None


def test_a_captioner_without_a_chat_template(models, tmp_path):
    folder = tiny_models.write_captioner(tmp_path / "plain", chat_template=None)
    config = annotation(captioner=captioner(models, model=str(folder)))
    with pytest.raises(ConfigError, match=r"annotation.captioner: .* has no chat template"):
        measure(config)


def test_fingerprint_is_of_what_decides_a_score(models, tmp_path):
    base = {"kind": "classifier", "model": str(models["vit"]), "labels": ["nsfw"]}
    copied = shutil.copytree(models["vit"], tmp_path / "copy")
    same = print_of(base)
    assert print_of({**base, "model": str(copied)}) == same
    assert print_of(base, name="other") == same
    assert print_of(base, device="auto", clips_per_unit=9) == same
    (copied / "notes.md").write_text("of no account", "utf-8")
    assert print_of({**base, "model": str(copied)}) == same
    assert print_of({**base, "labels": ["porn"]}) != same
    assert print_of({**base, "num_frames": 5}) != same
    weights = load_file(copied / "model.safetensors")
    weights["classifier.bias"][0] += 1
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert print_of({**base, "model": str(copied)}) != same


def test_fingerprint_of_a_url_captioner_is_not_of_its_address():
    base = {"kind": "url", "base_url": "http://127.0.0.1:1/v1", "model": "seer"}
    same = print_of(None, captioner=base)
    moved = {**base, "base_url": "https://example.com", "concurrency": 9, "timeout_s": 1.0}
    assert print_of(None, captioner=moved) == same
    for change in ({"model": "m"}, {"revision": "2"}, {"prompt": "p"}, {"seed": 1}):
        assert print_of(None, captioner=base | change) != same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "/nowhere/vit"}, "no model at '/nowhere/vit'.*give the directory"),
        ({"model": "org/name"}, "no model at 'org/name'.*`revision`, its commit"),
    ],
)
def test_a_missing_model_is_named_before_work_begins(change, message):
    scorer = {"kind": "classifier", "model": "", "labels": ["nsfw"]} | change
    with pytest.raises(ConfigError, match=f"annotation.scorers.mine: {message}"):
        check_scorers(annotation(scorer))


def test_a_model_of_the_hub_that_cannot_be_fetched(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    scorer = {"kind": "similarity", "model": "org/name", "revision": "0" * 40}
    with pytest.raises(ConfigError, match=r"'org/name' at commit 0000.* give the directory"):
        check_scorers(annotation(scorer))


def test_weights_in_pickle_are_refused(models, tmp_path):
    folder = shutil.copytree(models["vit"], tmp_path / "vit")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    scorer = {"kind": "classifier", "model": str(folder), "labels": ["nsfw"]}
    with pytest.raises(ConfigError, match=r"no .safetensors file; weights in other formats"):
        resolve_scorers(annotation(scorer))


def test_code_of_a_model_is_not_run(models, tmp_path):
    folder = shutil.copytree(models["vit"], tmp_path / "vit")
    config = (folder / "config.json").read_text("utf-8")
    auto = '{"auto_map": {"AutoModelForImageClassification": "evil.Evil"}, "model_type": "evil",'
    patched = re.sub(r'"model_type": "vit",', "", config).replace("{", auto, 1)
    (folder / "config.json").write_text(patched, "utf-8")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", "utf-8")
    scorer = {"kind": "classifier", "model": str(folder), "labels": ["nsfw"]}
    with pytest.raises(ConfigError, match=r"annotation.scorers.mine: .* cannot be loaded"):
        measure(annotation(scorer))
    assert not (tmp_path / "ran").exists()


def test_a_model_of_another_kind_is_refused(models):
    scorer = {"kind": "similarity", "model": str(models["vit"])}
    with pytest.raises(ConfigError, match=r"annotation.scorers.mine: .*model of another kind"):
        measure(annotation(scorer))


def test_weights_that_are_missing_are_not_drawn_at_random(models, tmp_path):
    folder = shutil.copytree(models["vit"], tmp_path / "vit")
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    scorer = {"kind": "classifier", "model": str(folder), "labels": ["nsfw"]}
    with pytest.raises(ConfigError, match=r"lacks 1 weights .*classifier\.weight"):
        measure(annotation(scorer))


def test_a_gpu_that_is_not_there(models, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    scorer = {"kind": "similarity", "model": str(models["clip"])}
    with pytest.raises(ConfigError, match="device is 'cuda' but no GPU"):
        measure(annotation(scorer, device="cuda"))


@pytest.mark.parametrize("found", ["5.1.0", None])
def test_a_missing_extra_is_named(models, monkeypatch, found):
    import importlib.metadata as metadata

    real = metadata.version

    def version(name):
        if name != "transformers":
            return real(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    scorer = {"kind": "similarity", "model": str(models["clip"])}
    message = rf"transformers 5\.23 or later, {found or 'nothing'} .*ursa-pipeline\[scorers\]"
    with pytest.raises(ConfigError, match=message):
        check_scorers(annotation(scorer))


def test_the_captioner_comes_first(models):
    scorer = {"kind": "similarity", "model": str(models["clip"])}
    found = resolve_scorers(annotation(scorer, captioner(models), name="a"))
    assert [item.name for item in found] == ["captioner", "a"]
    assert re.fullmatch(r"llava@[0-9a-f]{12}", found[0].model_name)


@pytest.mark.parametrize("name", ["captioner", "Nsfw", "a/b", ""])
def test_names_that_are_refused(models, name):
    with pytest.raises(ValueError, match=r"captioner|match pattern"):
        annotation({"kind": "text_area"}, name=name)
