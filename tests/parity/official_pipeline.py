"""The small pipeline whose tokens the official code has drawn too."""

from pathlib import Path

import numpy as np
import torch

from ursa.generation import SampleDefaults, SchedulerConfig, UrsaPipeline
from ursa.model.config import TransformerConfig
from ursa.model.transformer import UrsaTransformer
from ursa.tokenizers.text import load_text_tokenizer
from ursa.tokenizers.visual import load_visual_tokenizer

DATA = Path(__file__).parent / "data"


def build_pipeline() -> UrsaPipeline:
    """Return 64,000 codes, two layers; the weights are numbers of NumPy's frozen generator."""
    config = TransformerConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        max_window_layers=2,
        vocab_size=64_293,
        lm_vocab_size=293,
        bov_token_id=291,
    )
    transformer = UrsaTransformer(config)
    numbers = np.random.RandomState(0)
    with torch.no_grad():
        for name, weight in sorted(transformer.state_dict().items()):
            values = 0.5 * torch.from_numpy(numbers.standard_normal(weight.shape)).float()
            weight.copy_(1 + 0.2 * values if "norm" in name else values)
    return UrsaPipeline(
        transformer=transformer,
        scheduler=SchedulerConfig(alpha=1.0, c=5.0, shift=3.0),
        visual_tokenizer=load_visual_tokenizer(DATA / "cosmos_tiny"),
        text_tokenizer=load_text_tokenizer(DATA / "tokenizer_tiny"),
        defaults=SampleDefaults(),
    )
