"""What a network and a clip cost: parameters, tokens, operations, bytes. Arithmetic, no tensors.

Dimensions: h = hidden_size, f = intermediate_size, a = heads x head_dim, b = key-value heads x
head_dim, M = layers, P = parameters, L = tokens of a sequence, N = visual tokens, V = codes.

References:
    Operations of a transformer: PaLM, arXiv 2204.02311, appendix B, of which the forward pass is a
    third. Memory of training: ZeRO, arXiv 1910.02054, section 3.1. Formulae in docs/math.md.
"""

import os
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from ursa.config import FrozenModel, LoraConfig, LoraTarget
from ursa.errors import ConfigError, size_hint
from ursa.model.config import TransformerConfig

Qwen3Size = Literal["0.6b", "1.7b", "4b"]
Recomputed = Literal["none", "mlp", "attention", "layer"]
"""What a backward pass computes again: nothing, MLPs, attention too, all but inputs of layers."""
LOGITS_AT_ONCE = 2**23
"""Logits that the sampler holds at once, as in `ursa.diffusion.solver`."""
MAX_SIDE_PX = 8192
"""Longest side of a picture: of the largest video that H.264 allows, 8192 x 4320 (level 6.2)."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_LOGITS_COPIES = 2
"""Logits, and the weights that are drawn from."""
_FLOAT32_BYTES = 4
_TRAINING_COPIES = 5
"""Weights, gradients, two moments of AdamW and the average, each float32."""


class Clip(NamedTuple):
    """Latent frames, rows and columns of a clip, and the tokens of its prompt.

    Attributes:
        latent_shape: Latent frames, rows and columns.
        prompt_length: Ids of the padded prompt.
    """

    latent_shape: tuple[int, int, int]
    prompt_length: int

    @property
    def num_visual_tokens(self) -> int:
        """N."""
        frames, rows, columns = self.latent_shape
        return frames * rows * columns

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole sequence: prompt, BOV, visual."""
        return self.prompt_length + 1 + self.num_visual_tokens


class Plan(FrozenModel):
    """Costs of a network and of one clip on it; bytes are of one clip at a time.

    Attributes:
        num_parameters: P.
        latent_shape: Latent frames, rows and columns.
        num_visual_tokens: N.
        num_tokens: L.
        forward_flops: Floating point operations of one sequence through the network.
        num_sequences: Sequences through the network over a whole sampling; guidance takes two a
            step.
        sampling_flops: Operations of a whole sampling.
        weight_bytes: Weights for inference.
        activation_bytes: Tensors alive at once inside a layer, at most.
        logits_bytes: Logits and probabilities of the tokens that are drawn at once, float32.
        inference_bytes: Sum of the three.
        code_tensor_bytes: One float32 tensor over (visual tokens, codes), as probabilities and
            velocities are.
        training_state_bytes: Weights, gradients, AdamW and average, float32, without activations.
    """

    num_parameters: int
    latent_shape: tuple[int, int, int]
    num_visual_tokens: int
    num_tokens: int
    forward_flops: int
    num_sequences: int
    sampling_flops: int
    weight_bytes: int
    activation_bytes: int
    logits_bytes: int
    inference_bytes: int
    code_tensor_bytes: int
    training_state_bytes: int


def qwen3_config(size: Qwen3Size) -> TransformerConfig:
    """Return the network of the paper made from a Qwen3 language model, with 64,000 codes.

    Args:
        size: Parameters of the language model, in billions.
    """
    match size:
        case "0.6b":
            return TransformerConfig(hidden_size=1024, intermediate_size=3072)
        case "1.7b":
            return TransformerConfig()
        case "4b":
            return TransformerConfig(
                hidden_size=2560,
                intermediate_size=9728,
                num_attention_heads=32,
                num_hidden_layers=36,
                max_window_layers=36,
            )


def latent_shape(
    num_frames: int,
    height_px: int,
    width_px: int,
    *,
    temporal_stride: int = 4,
    spatial_stride: int = 8,
) -> tuple[int, int, int]:
    """Return latent frames, rows and columns of a clip.

    Args:
        num_frames: Frames, 1 + k temporal_stride.
        height_px: Pixels, divisible by spatial_stride, `MAX_SIDE_PX` at most.
        width_px: Pixels, likewise.
        temporal_stride: Frames per latent frame after the first.
        spatial_stride: Pixels per latent row and column.

    Raises:
        ConfigError: If a size does not fit; the message names the nearest that do.
    """
    if hint := size_hint(num_frames, temporal_stride, 1):
        raise ConfigError(f"num_frames must be 1 + {temporal_stride}k, got {num_frames}; {hint}")
    for name, size in (("height", height_px), ("width", width_px)):
        if hint := size_hint(size, spatial_stride, spatial_stride):
            raise ConfigError(f"{name} must be divisible by {spatial_stride}, got {size}; {hint}")
        if size > MAX_SIDE_PX:
            raise ConfigError(
                f"{name} must be at most {MAX_SIDE_PX}, the longest side of an H.264 video, got "
                f"{size}"
            )
    return (
        1 + (num_frames - 1) // temporal_stride,
        height_px // spatial_stride,
        width_px // spatial_stride,
    )


def machine_bytes() -> int:
    """Return the memory of this machine, or of the container that this process is in, bytes."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _CGROUP_LIMIT.is_file() and (limit := _CGROUP_LIMIT.read_text("utf-8").strip()) != "max":
        return min(total, int(limit))
    return total


def num_parameters(config: TransformerConfig) -> int:
    """Return P = (rows + V) h + M (h (2a + 2b) + 3 h f + 2 h + 2 head_dim) + h, exactly.

    Args:
        config: The network.
    """
    h = config.hidden_size
    layer = _matrix_parameters(config) + 2 * h + 2 * config.head_dim
    rows = config.vocab_size + config.lm_head_size
    return rows * h + config.num_hidden_layers * layer + h


def num_trained(config: TransformerConfig, lora: LoraConfig | None) -> int:
    """Return how many parameters training changes: P, or those of adapters and whole modules.

    An adapter on a matrix of n inputs and m outputs has rank (n + m).

    Args:
        config: The network.
        lora: Its adapters; None trains all.
    """
    if lora is None:
        return num_parameters(config)
    rows = {"embed_tokens": config.vocab_size, "lm_head": config.lm_head_size}
    whole = config.hidden_size * sum(rows[name] for name in lora.whole_modules)
    return adapter_parameters(config, lora) + whole


def adapter_parameters(config: TransformerConfig, lora: LoraConfig | None) -> int:
    """Return the parameters of the adapters alone, M rank sum(n + m).

    Args:
        config: The network.
        lora: Its adapters, if any.
    """
    if lora is None:
        return 0
    sizes = _matrix_sizes(config)
    each = sum(sum(sizes[name]) for name in lora.target_modules)
    return config.num_hidden_layers * lora.rank * each


def _matrix_sizes(config: TransformerConfig) -> dict[LoraTarget, tuple[int, int]]:
    """Return inputs and outputs of the matrices of a layer."""
    h, f = config.hidden_size, config.intermediate_size
    a, b = (
        heads * config.head_dim
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    return {
        "q_proj": (h, a),
        "k_proj": (h, b),
        "v_proj": (h, b),
        "o_proj": (a, h),
        "gate_proj": (h, f),
        "up_proj": (h, f),
        "down_proj": (f, h),
    }


def forward_flops(config: TransformerConfig, clip: Clip) -> int:
    """Return the operations of one sequence: 2 M L (h (2a + 2b) + 3 h f) + 4 M L^2 a + 2 N h V.

    A multiplication and an addition are two operations; norms, rotations and softmax, below a
    percent, are left out. The head sees the visual tokens alone.

    Args:
        config: The network.
        clip: Sizes of the clip.

    Returns:
        Floating point operations.
    """
    length = clip.num_tokens
    layer = 2 * length * _matrix_parameters(config)
    attention = 4 * length**2 * config.num_attention_heads * config.head_dim
    head = 2 * clip.num_visual_tokens * config.hidden_size * config.lm_head_size
    return config.num_hidden_layers * (layer + attention) + head


def num_sequences(
    num_inference_steps: int, *, shift: float, guidance_trunc: float, is_guided: bool = True
) -> int:
    """Return how many sequences a sampling by Euler steps puts through the network.

    With guidance two a step while t < guidance_trunc, else one; t of a step as in
    `ursa.diffusion.timesteps.inference_times`. The first of several steps moves nothing and is not
    run.

    Args:
        num_inference_steps: Steps of the sampler, at least 1.
        shift: Timestep shift, positive; 1 is none.
        guidance_trunc: From this t on, in [0, 1], guidance is off.
        is_guided: Whether there is guidance at all.
    """
    count = 0
    for step in range(1 if num_inference_steps > 1 else 0, num_inference_steps):
        sigma = 1 - step / num_inference_steps
        t = 1 - shift * sigma / (1 + (shift - 1) * sigma)
        count += 2 if is_guided and t < guidance_trunc else 1
    return count


def activation_bytes(
    config: TransformerConfig, clip: Clip, *, num_sequences: int, bytes_per_value: int
) -> int:
    """Return the bytes alive at once inside a layer during inference, at most.

    Residual stream, its norm and an output (3 h), cosines and sines in float32 and as used
    (2 head_dim each), ids and positions (32 bytes), and the larger of attention (queries, keys and
    values before and after rotation, keys and values repeated for all heads, output: 5 a + 3 b)
    and the MLP (gate, up and their product: 3 f). Attention scores are not stored: torch's
    attention is fused.

    Args:
        config: The network.
        clip: Sizes of the clip.
        num_sequences: Sequences in the network at once: 2 with guidance, else 1.
        bytes_per_value: Of weights and activations, 2 for bfloat16.
    """
    h, f = config.hidden_size, config.intermediate_size
    a = config.num_attention_heads * config.head_dim
    b = config.num_key_value_heads * config.head_dim
    values = 3 * h + max(5 * a + 3 * b, 3 * f) + 2 * config.head_dim
    per_token = values * bytes_per_value + 2 * config.head_dim * _FLOAT32_BYTES + 32
    return num_sequences * clip.num_tokens * per_token


def saved_bytes(
    config: TransformerConfig,
    clip: Clip,
    recomputed: Recomputed = "none",
    lora: LoraConfig | None = None,
) -> int:
    """Return the bytes that the forward pass of one sequence keeps for the backward pass, float32.

    A layer keeps a token's states before both norms, and what each norm has divided and given
    (6 h); queries as projected, as normed and as rotated and what attention gives (4 a), keys
    likewise with their values (4 b); gate, its SiLU, up and their product (4 f); and a number a
    norm and head. Attention keeps no scores: torch's is fused. Beside the layers there are what the
    last norm keeps, cosines, sines and ids. What is computed again is not kept: of an MLP and of
    attention only the input, which the norm before it has given; of a layer its input.

    Weights that are not trained need neither what a norm has divided nor the inputs of a matrix
    without an adapter; an adapter keeps rank values, and with dropout its input and the mask. What
    the first layer leaves out beyond that is not counted.

    Args:
        config: The network.
        clip: Sizes of the clip.
        recomputed: What the backward pass computes again.
        lora: The adapters, if only they are trained.

    Returns:
        Bytes of one sequence in training, without its loss; those of B sequences are at most B
        times as many, as cosines and sines are shared.
    """
    h = config.hidden_size
    around = h + 2 * config.head_dim + 2
    layer = _layer_values(config, recomputed, lora)
    values = (config.num_hidden_layers * layer + around) * clip.num_tokens
    return _FLOAT32_BYTES * (values + (h + 1) * clip.num_visual_tokens)


def recomputed_bytes(
    config: TransformerConfig, clip: Clip, recomputed: Recomputed, lora: LoraConfig | None = None
) -> int:
    """Return the bytes that a layer's backward pass makes again of one sequence, at most, float32.

    Args:
        config: The network.
        clip: Sizes of the clip.
        recomputed: What the backward pass computes again, part after part.
        lora: The adapters, if only they are trained.
    """
    kept = {level: _layer_values(config, level, lora) for level in get_args(Recomputed)}
    values = {
        "none": 0,
        "mlp": kept["none"] - kept["mlp"],
        "attention": max(kept["none"] - kept["mlp"], kept["mlp"] - kept["attention"]),
        "layer": kept["none"] - kept["layer"],
    }
    return _FLOAT32_BYTES * values[recomputed] * clip.num_tokens


def recomputed_flops(config: TransformerConfig, clip: Clip, recomputed: Recomputed) -> int:
    """Return the operations of one sequence that the backward pass does again.

    Args:
        config: The network.
        clip: Sizes of the clip.
        recomputed: What.
    """
    mlp = 6 * clip.num_tokens * config.hidden_size * config.intermediate_size
    head = 2 * clip.num_visual_tokens * config.hidden_size * config.lm_head_size
    layers = forward_flops(config, clip) - head
    return {
        "none": 0,
        "mlp": config.num_hidden_layers * mlp,
        "attention": layers,
        "layer": layers,
    }[recomputed]


def _layer_values(
    config: TransformerConfig, recomputed: Recomputed, lora: LoraConfig | None
) -> int:
    """Return the values of a token that a layer keeps."""
    h, f = config.hidden_size, config.intermediate_size
    heads, kept_heads = config.num_attention_heads, config.num_key_value_heads
    norms, of_attention, of_mlp = 6 * h + 2, 4, 4 * f
    if lora is not None:
        # with dropout an adapter does not read what its matrix does, but a copy
        targets = set() if lora.dropout else set(lora.target_modules)
        # nothing that a norm has divided; what it has given where something reads it again
        reads_again = (
            recomputed == "attention" or bool(targets & {"q_proj", "k_proj", "v_proj"}),
            recomputed != "none" or bool(targets & {"gate_proj", "up_proj"}),
        )
        norms, of_attention = (2 + sum(reads_again)) * h + 2, 3
        of_mlp = (4 if "down_proj" in targets else 3) * f
    attention = of_attention * (heads + kept_heads) * config.head_dim + 2 * heads + kept_heads
    inner = {part: _adapter_values(config, lora, part) for part in ("attention", "mlp")}
    return {
        "none": norms + attention + inner["attention"] + of_mlp + inner["mlp"],
        "mlp": norms + attention + inner["attention"],
        "attention": norms,
        "layer": h,
    }[recomputed]


def _adapter_values(
    config: TransformerConfig, lora: LoraConfig | None, part: Literal["attention", "mlp"]
) -> int:
    """Return the values of a token that the adapters of a part of a layer keep."""
    if lora is None:
        return 0
    sizes, values = _matrix_sizes(config), 0
    for name in lora.target_modules:
        if (name in {"gate_proj", "up_proj", "down_proj"}) == (part == "mlp"):
            inputs = sizes[name][0]
            # with dropout its own input, and a mask of a byte a value
            values += lora.rank + (inputs + inputs // _FLOAT32_BYTES if lora.dropout else 0)
    return values


def plan(
    config: TransformerConfig,
    clip: Clip,
    *,
    num_sequences: int,
    is_guided: bool,
    bytes_per_value: int = 2,
) -> Plan:
    """Add the costs up.

    Args:
        config: The network.
        clip: Sizes of the clip.
        num_sequences: Sequences through the network over a whole sampling.
        is_guided: Whether two sequences are in the network at once.
        bytes_per_value: Of weights and activations at inference, 2 for bfloat16.

    Returns:
        Counts, floating point operations and bytes.
    """
    parameters = num_parameters(config)
    flops = forward_flops(config, clip)
    at_once = 2 if is_guided else 1
    codes = clip.num_visual_tokens * config.lm_head_size
    weights = parameters * bytes_per_value
    logits = _LOGITS_COPIES * _FLOAT32_BYTES * min(codes, LOGITS_AT_ONCE)
    activations = activation_bytes(
        config, clip, num_sequences=at_once, bytes_per_value=bytes_per_value
    )
    return Plan(
        num_parameters=parameters,
        latent_shape=clip.latent_shape,
        num_visual_tokens=clip.num_visual_tokens,
        num_tokens=clip.num_tokens,
        forward_flops=flops,
        num_sequences=num_sequences,
        sampling_flops=num_sequences * flops,
        weight_bytes=weights,
        activation_bytes=activations,
        logits_bytes=logits,
        inference_bytes=weights + activations + logits,
        code_tensor_bytes=codes * _FLOAT32_BYTES,
        training_state_bytes=_TRAINING_COPIES * _FLOAT32_BYTES * parameters,
    )


def _matrix_parameters(config: TransformerConfig) -> int:
    """Return the parameters of the matrices of one layer, h (2a + 2b) + 3 h f."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
