"""The network: Qwen3 blocks with full attention, 3-D RoPE and a head over the visual codes.

The network gets no time: it reads the noise level off the tokens. Pads are attended to.

References:
    URSA, arXiv 2510.24717, section 3.4; Qwen3: arXiv 2505.09388.
"""

import torch
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
)

from ursa.config import FrozenModel, ModelConfig
from ursa.model.rope import rotary_embedding
from ursa.model.sequence import TokenLayout, positions, posterior_slice

HEAD_RANGE = 0.02
"""Standard deviation of the head: small, so that an untrained network knows nothing (ln V)."""
CODE_BANDWIDTH = 2.0
"""Codes half a unit apart (of [-1, 1] a channel) start with a similarity of 0.6."""


class TransformerConfig(FrozenModel):
    """Everything needed to build the network: the backbone and the two vocabularies."""

    backbone: ModelConfig
    text_vocab_size: int
    codebook_size: int
    bov_id: int
    max_prompt_length: int


class Backbone(nn.Module):
    """Embedding, Qwen3 layers and the final norm, under the parameter names of Qwen3."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Qwen3DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class UrsaTransformer(nn.Module):
    """Posterior network p(x_1 | x_t, prompt) over the codes of every visual token."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build the network with freshly drawn weights (torch's global generator).

        Their standard deviation is hidden_size ** -0.5: Qwen3's 0.02 at its widths, and enough for
        small networks to learn at once.
        """
        super().__init__()
        backbone = config.backbone
        self.config = config
        self.layout = TokenLayout(config.text_vocab_size, config.bov_id)
        qwen = Qwen3Config(
            vocab_size=config.text_vocab_size + config.codebook_size,
            hidden_size=backbone.hidden_size,
            intermediate_size=backbone.intermediate_size,
            num_hidden_layers=backbone.num_layers,
            num_attention_heads=backbone.num_attention_heads,
            num_key_value_heads=backbone.num_key_value_heads,
            head_dim=backbone.head_dim,
            rms_norm_eps=backbone.rms_norm_eps,
        )
        qwen._attn_implementation = "sdpa"
        self.model = Backbone(qwen)
        self.lm_head = nn.Linear(backbone.hidden_size, config.codebook_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=backbone.hidden_size**-0.5)
            if module is self.lm_head:
                nn.init.normal_(self.lm_head.weight, std=HEAD_RANGE)
            if isinstance(module, Qwen3Attention):
                module.is_causal = False

    def forward(self, text_ids: Tensor, visual_ids: Tensor) -> Tensor:
        """Return posterior logits of every visual token.

        Args:
            text_ids: Left-padded prompt ids, shape (B, L), int64.
            visual_ids: Noisy codes x_t, shape (B, T, H, W), int64.

        Returns:
            Logits over the codes, shape (B, T*H*W, V).
        """
        text_length = text_ids.shape[1]
        frames, rows, columns = visual_ids.shape[1:]
        hidden = self.model.embed_tokens(self.layout.input_ids(text_ids, visual_ids))
        grid = positions(text_length, (frames, rows, columns)).to(hidden.device)
        rotary = rotary_embedding(
            grid, head_dim=self.config.backbone.head_dim, theta=self.config.backbone.rope_theta
        )
        rotary = (rotary[0].to(hidden.dtype), rotary[1].to(hidden.dtype))
        for layer in self.model.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        hidden = hidden[:, posterior_slice(text_length, frames * rows * columns)]
        logits: Tensor = self.lm_head(self.model.norm(hidden))
        return logits


def build_transformer(
    config: TransformerConfig, *, seed: int, codebook: Tensor | None = None
) -> UrsaTransformer:
    """Build a network whose weights are a function of the seed and the codebook alone.

    Args:
        config: Shape of the network.
        seed: Seed of all draws.
        codebook: Code embeddings, shape (V, D). Given, the rows of the codes in the embedding and
            in the head start as random Fourier features of them, so that near codes start near
            and what is learned of one serves its neighbours; None draws all rows independently.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UrsaTransformer(config)
        if codebook is not None:
            features = _fourier_features(codebook, config.backbone.hidden_size)
            with torch.no_grad():
                model.model.embed_tokens.weight[config.text_vocab_size :] = (
                    config.backbone.hidden_size**-0.5 * features
                )
                model.lm_head.weight.copy_(HEAD_RANGE * features)
        return model


def _fourier_features(codebook: Tensor, num_features: int) -> Tensor:
    """Return features whose inner product falls with the distance of two codes.

    sqrt(2) cos(w e + b) with w ~ N(0, CODE_BANDWIDTH^2) approximates a Gaussian kernel (Rahimi and
    Recht, 2007). Shape (V, num_features), standard deviation about 1.
    """
    weight = CODE_BANDWIDTH * torch.randn(codebook.shape[1], num_features)
    phase = 2 * torch.pi * torch.rand(num_features)
    features = 2**0.5 * torch.cos(codebook.float() @ weight + phase)
    return features - features.mean(0)
