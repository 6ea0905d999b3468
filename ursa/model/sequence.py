"""The token layout: text | BOV | visual. The only place that adds `text_vocab_size`.

Text is left-padded to a fixed length L, then one begin-of-video token, then the visual tokens,
frame by frame, row by row, column by column. As in a language model the logits for visual token j
stand one position to the left: BOV carries those of the first.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ursa.errors import ConfigError


class TokenLayout(NamedTuple):
    """Sizes that fix where every token stands.

    Attributes:
        text_vocab_size: Number of text ids; the id of code k is k more.
        bov_id: Begin of video, a text id.
    """

    text_vocab_size: int
    bov_id: int

    def input_ids(self, text_ids: Tensor, visual_ids: Tensor) -> Tensor:
        """Join prompt and visual tokens into model ids.

        Args:
            text_ids: Left-padded prompts, shape (B, L), int64.
            visual_ids: Codes in [0, V), shape (B, T, H, W), int64.

        Returns:
            Model ids, shape (B, L + 1 + T*H*W), int64.
        """
        bov = text_ids.new_full((len(text_ids), 1), self.bov_id)
        return torch.cat([text_ids, bov, visual_ids.flatten(1) + self.text_vocab_size], dim=1)


def positions(text_length: int, latent_shape: tuple[int, int, int]) -> Tensor:
    """Return (t, h, w) of every token.

    Text token i is (i, i, i), BOV is (L, L, L), visual tokens are (L + 1 + frame, row, column).

    Args:
        text_length: L, ids of a prompt.
        latent_shape: Frames T, rows H and columns W of the latents.

    Returns:
        Positions, shape (L + 1 + T*H*W, 3), int64.
    """
    text = torch.arange(text_length).unsqueeze(-1).expand(-1, 3)
    return torch.cat([text, block_positions(text_length, latent_shape)[0]])


def block_positions(
    start: int, latent_shape: tuple[int, int, int], *, num_blocks: int = 1, with_bov: bool = True
) -> Tensor:
    """Return (t, h, w) of blocks of frames, each led by a BOV, that follow one another in time.

    The BOV of block k is (s, s, s) with s = start + k (T + 1), its visual tokens are
    (s + 1 + frame, row, column): rows and columns are not shifted. Without BOV each visual token is
    one earlier in time.

    Args:
        start: First position, the length of the text before.
        latent_shape: Frames T, rows and columns of one block.
        num_blocks: How many blocks; URSA is trained and sampled with one.
        with_bov: Whether the blocks have their BOV.

    Returns:
        Positions, shape (num_blocks, T*H*W (+ 1 with BOV), 3), int64.
    """
    frames, rows, columns = latent_shape
    blocks = []
    for begin in range(start, start + num_blocks * (frames + 1), frames + 1):
        grid = torch.cartesian_prod(
            torch.arange(frames) + begin + int(with_bov), torch.arange(rows), torch.arange(columns)
        )
        bov = torch.full((int(with_bov), 3), begin)
        blocks.append(torch.cat([bov, grid.view(-1, 3)]))
    return torch.stack(blocks)


def block_causal_mask(lengths: Sequence[int], *, is_full: Sequence[bool] | None = None) -> Tensor:
    """Return who sees whom when blocks stand one after another and see what came before.

    Every token sees all tokens before it and, in a full block, those after it in its own block;
    no token sees a later block. URSA itself uses no mask; this one is for block-wise training.
    The published flags -1 (triangular) and 1 (full) have no effect on the first block, which stays
    full, since they are multiplied with its number 0; here each block is what `is_full` says.

    Args:
        lengths: Tokens of each block, in order.
        is_full: Whether each block is full (True) or lower triangular; None: all are full.

    Returns:
        bool, shape (L, L), L = sum(lengths); True where the row attends to the column.

    Raises:
        ConfigError: If a length is not positive or `is_full` has another number of entries.
    """
    if not lengths or min(lengths) < 1:
        raise ConfigError(f"lengths must be at least one positive number, got {list(lengths)}")
    full = [True] * len(lengths) if is_full is None else list(is_full)
    if len(full) != len(lengths):
        raise ConfigError(
            f"is_full must say full or not for each of the {len(lengths)} blocks, got {len(full)}"
        )
    counts = torch.tensor(lengths)
    block = torch.arange(len(lengths)).repeat_interleave(counts)
    see_ahead = torch.tensor(full).repeat_interleave(counts)
    place = torch.arange(len(block))
    same = block[:, None] == block[None]
    return (place[:, None] >= place[None]) | (same & see_ahead[:, None])


def posterior_slice(text_length: int, num_visual: int) -> slice:
    """Return the positions whose outputs predict the visual tokens, one to the left of them.

    Args:
        text_length: L, ids of a prompt.
        num_visual: T*H*W, visual tokens.
    """
    return slice(text_length, text_length + num_visual)
