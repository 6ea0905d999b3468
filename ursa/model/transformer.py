"""The network: Qwen3 blocks with full attention, 3-D RoPE and a head over the visual codes.

The network gets no time: it reads the noise level off the tokens. Pads are attended to.

References:
    URSA, arXiv 2510.24717, section 3.4; Qwen3: arXiv 2505.09388. Names of parameters and of the
    configuration are those of the published class URSATransformer3DModel.
"""

import torch
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
)

# the configuration stands apart so that it can be read without torch; it is imported from here too
from ursa.model.config import TransformerConfig as TransformerConfig
from ursa.model.rope import rotary_embedding
from ursa.model.sequence import TokenLayout, positions, posterior_slice

HEAD_RANGE = 0.02
"""Standard deviation of the head: small, so that an untrained network knows nothing (ln V)."""
CODE_BANDWIDTH = 2.0
"""Codes half a unit apart (of [-1, 1] a channel) start with a similarity of 0.6."""


class Backbone(nn.Module):
    """Embedding, Qwen3 layers and the final norm, under the parameter names of Qwen3."""

    def __init__(self, config: Qwen3Config) -> None:
        """Build the layers with freshly drawn weights.

        Args:
            config: Sizes, in the terms of transformers.
        """
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
        small networks to learn at once. Below `torch.device("meta")` nothing is drawn.

        Args:
            config: Shape of the network.
        """
        super().__init__()
        self.config = config
        self.layout = TokenLayout(config.lm_vocab_size, config.bov_token_id)
        # no rope_theta: transformers 4 and 5 spell it differently, and the rotation is our own
        qwen = Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
        )
        qwen._attn_implementation = "sdpa"
        self.model = Backbone(qwen)
        self.lm_head = nn.Linear(config.hidden_size, config.lm_head_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.hidden_size**-0.5)
            if module is self.lm_head:
                nn.init.normal_(self.lm_head.weight, std=HEAD_RANGE)
            if isinstance(module, Qwen3Attention):
                module.is_causal = False

    def forward(self, text_ids: Tensor, visual_ids: Tensor) -> Tensor:
        """Return posterior logits of every visual token: `lm_head` of `hidden_states`.

        Args:
            text_ids: Left-padded prompt ids, shape (B, L), int64.
            visual_ids: Noisy codes x_t in [0, V), shape (B, T, H, W), int64.

        Returns:
            Logits over the codes, shape (B, T*H*W, V).
        """
        logits: Tensor = self.lm_head(self.hidden_states(text_ids, visual_ids))
        return logits

    def hidden_states(self, text_ids: Tensor, visual_ids: Tensor) -> Tensor:
        """Return what the head reads to predict every visual token.

        Args:
            text_ids: Left-padded prompt ids, shape (B, L), int64.
            visual_ids: Noisy codes x_t, shape (B, T, H, W), int64.

        Returns:
            Hidden states after the final norm, shape (B, T*H*W, hidden_size).
        """
        text_length = text_ids.shape[1]
        frames, rows, columns = visual_ids.shape[1:]
        return self.forward_ids(
            self.layout.input_ids(text_ids, visual_ids),
            positions(text_length, (frames, rows, columns)),
            keep=posterior_slice(text_length, frames * rows * columns),
        )

    def forward_ids(
        self,
        input_ids: Tensor,
        positions: Tensor,
        *,
        attention_mask: Tensor | None = None,
        keep: slice = slice(None),
    ) -> Tensor:
        """Return the last hidden states, after the final norm; `lm_head` makes logits of them.

        Args:
            input_ids: Model ids, shape (B, L), int64, in [0, vocab_size).
            positions: Rotary positions: (t, h, w) of every token, shape (L, 3) or (B, L, 3), or
                one number for all three axes, shape (L,).
            attention_mask: Who sees whom, bool, shape (L, L) or (B, L, L), True where the row
                attends to the column; None lets every token see every token, pads included.
            keep: Places of the sequence whose states are returned.

        Returns:
            Hidden states, shape (B, L', hidden_size), L' places kept.
        """
        hidden: Tensor = self.model.embed_tokens(input_ids)
        cos, sin = rotary_embedding(
            positions.to(hidden.device),
            head_dim=self.config.head_dim,
            theta=self.config.rope_theta,
        )
        rotary = (cos.to(hidden.dtype), sin.to(hidden.dtype))
        mask = attention_mask
        if mask is not None:
            mask = mask.to(hidden.device).reshape(-1, 1, *mask.shape[-2:])
        for layer in self.model.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        kept: Tensor = self.model.norm(hidden[:, keep])
        return kept


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

    Returns:
        The network on the CPU in float32, in training mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UrsaTransformer(config)
        if codebook is not None:
            features = fourier_features(codebook, config.hidden_size)
            with torch.no_grad():
                model.model.embed_tokens.weight[config.lm_vocab_size :] = (
                    config.hidden_size**-0.5 * features
                )
                model.lm_head.weight.copy_(HEAD_RANGE * features)
        return model


def fourier_features(codebook: Tensor, num_features: int) -> Tensor:
    """Return features whose inner product falls with the distance of two codes.

    sqrt(2) cos(w e + b) with w ~ N(0, CODE_BANDWIDTH^2) approximates a Gaussian kernel (Rahimi and
    Recht, 2007); the mean over the codes is taken off. Drawn from torch's global generator.

    Args:
        codebook: Code embeddings e, shape (V, D), on the CPU.
        num_features: F, the width of the network.

    Returns:
        Shape (V, F), float32, standard deviation about 1.
    """
    weight = CODE_BANDWIDTH * torch.randn(codebook.shape[1], num_features)
    phase = 2 * torch.pi * torch.rand(num_features)
    features = 2**0.5 * torch.cos(codebook.float() @ weight + phase)
    return features - features.mean(0)
