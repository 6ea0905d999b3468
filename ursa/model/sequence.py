"""The token layout: text | BOV | visual. The only place that adds `text_vocab_size`.

Text is left-padded to a fixed length L, then one begin-of-video token, then the visual tokens,
frame by frame, row by row, column by column. As in a language model the logits for visual token j
stand one position to the left: BOV carries those of the first.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenLayout(NamedTuple):
    """Sizes that fix where every token stands."""

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
    """Return (t, h, w) of every token, shape (L + 1 + T*H*W, 3), int64.

    Text token i is (i, i, i), BOV is (L, L, L), visual tokens are (L + 1 + frame, row, column).
    """
    line = torch.arange(text_length + 1).unsqueeze(-1).expand(-1, 3)
    frames, rows, columns = latent_shape
    grid = torch.cartesian_prod(
        torch.arange(frames) + text_length + 1, torch.arange(rows), torch.arange(columns)
    )
    return torch.cat([line, grid.view(-1, 3)])


def posterior_slice(text_length: int, num_visual: int) -> slice:
    """Return the positions whose outputs predict the visual tokens, one to the left of them."""
    return slice(text_length, text_length + num_visual)
