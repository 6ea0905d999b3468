"""Models of transformers with random weights, saved as directories in milliseconds."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SIDE_PX = 28
EMBEDDING = 12
_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_VISION = {**_SMALL, "image_size": SIDE_PX, "patch_size": 14}
_CHAT_TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} answer: {% endif %}"
)


def text_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with little more than the bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["a red ball rolls", "the night city"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )


def write_clip(folder: Path, *, seed: int = 0) -> Path:
    """A CLIP model with embeddings of `EMBEDDING` numbers."""
    tokenizer = text_tokenizer()
    text = {
        **_SMALL,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 20,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(
            CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=EMBEDDING)
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": SIDE_PX, "width": SIDE_PX}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE_PX}, crop_size=size).save_pretrained(folder)
    return folder


def write_siglip(folder: Path) -> Path:
    """A SigLIP model."""
    tokenizer = text_tokenizer()
    text = {**_SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 20}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=_VISION))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": SIDE_PX, "width": SIDE_PX}).save_pretrained(folder)
    return folder


def write_classifier(folder: Path, labels: tuple[str, ...], *, problem: str | None = None) -> Path:
    """A ViT that names pictures."""
    names = dict(enumerate(labels))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ViTConfig(
            **_VISION, id2label=names, label2id={name: place for place, name in names.items()}
        )
        config.problem_type = problem
        model = ViTForImageClassification(config)
        torch.nn.init.normal_(model.classifier.weight, std=2.0)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE_PX, "width": SIDE_PX}).save_pretrained(folder)
    return folder


def write_captioner(folder: Path, *, chat_template: str | None = _CHAT_TEMPLATE) -> Path:
    """A Llava model: what it says is gibberish."""
    tokenizer = text_tokenizer()
    size = {"height": SIDE_PX, "width": SIDE_PX}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE_PX}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
    config = LlavaConfig(
        vision_config={**_VISION, "num_hidden_layers": 2, "model_type": "clip_vision_model"},
        text_config=LlamaConfig(**_SMALL, num_key_value_heads=1, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        for weights in model.parameters():  # as large as it takes for pictures to matter
            if weights.ndim > 1:
                torch.nn.init.normal_(weights, std=0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
