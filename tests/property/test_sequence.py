import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ursa.errors import ConfigError
from ursa.model.rope import frequency_axes, rotary_embedding
from ursa.model.sequence import (
    TokenLayout,
    block_causal_mask,
    block_positions,
    positions,
    posterior_slice,
)

shapes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), shapes, st.integers(0, 2**31 - 1))
def test_layout_is_text_bov_visual(length, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(100, (2, length), generator=generator)
    visual = torch.randint(30, (2, *shape), generator=generator)
    ids = TokenLayout(text_vocab_size=101, bov_id=100).input_ids(text, visual)
    num_visual = shape[0] * shape[1] * shape[2]
    assert ids.shape == (2, length + 1 + num_visual)
    assert torch.equal(ids[:, :length], text)
    assert (ids[:, length] == 100).all()
    assert torch.equal(ids[:, length + 1 :].view_as(visual) - 101, visual)
    part = posterior_slice(length, num_visual)
    # outputs stand one to the left of the tokens that they predict
    assert (part.start, part.stop) == (length, length + num_visual)
    assert len(range(*part.indices(ids.shape[1]))) == num_visual


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), shapes)
def test_positions_follow_the_raster(length, shape):
    grid = positions(length, shape)
    frames, rows, columns = shape
    assert grid.shape == (length + 1 + frames * rows * columns, 3)
    for place in range(length + 1):
        assert grid[place].tolist() == [place] * 3
    expected = [
        [length + 1 + t, h, w] for t in range(frames) for h in range(rows) for w in range(columns)
    ]
    assert grid[length + 1 :].tolist() == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), shapes, st.integers(1, 4))
def test_blocks_follow_one_another_in_time(start, shape, num_blocks):
    with_bov = block_positions(start, shape, num_blocks=num_blocks)
    without = block_positions(start, shape, num_blocks=num_blocks, with_bov=False)
    for block in range(num_blocks):
        begin = start + block * (shape[0] + 1)
        assert torch.equal(with_bov[block], positions(begin, shape)[begin:])
        one_earlier = with_bov[block, 1:] - torch.tensor([1, 0, 0])
        assert torch.equal(without[block], one_earlier)


blocks = st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(blocks)
def test_block_mask_is_what_it_says(drawn):
    lengths, is_full = zip(*drawn, strict=True)
    mask = block_causal_mask(lengths, is_full=is_full)
    block = [index for index, length in enumerate(lengths) for _ in range(length)]
    for row, own in enumerate(block):
        for column, other in enumerate(block):
            expected = column <= row or (own == other and is_full[own])
            assert bool(mask[row, column]) == expected
    everything_full = block_causal_mask(lengths, is_full=[True] * len(lengths))
    assert torch.equal(block_causal_mask(lengths), everything_full)


def test_blocks_that_do_not_fit_are_refused():
    for lengths in ([], [3, 0]):
        with pytest.raises(ConfigError, match="lengths must be"):
            block_causal_mask(lengths)
    with pytest.raises(ConfigError, match="each of the 2 blocks, got 1"):
        block_causal_mask([3, 2], is_full=[True])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4).map(lambda n: 16 * n))
def test_one_number_a_token_is_the_usual_rotation(length, head_dim):
    line = torch.arange(length)
    for actual, expected in zip(
        rotary_embedding(line, head_dim=head_dim, theta=1e4),
        rotary_embedding(line[:, None].expand(-1, 3), head_dim=head_dim, theta=1e4),
        strict=True,
    ):
        assert torch.equal(actual, expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8).map(lambda n: 16 * n))
def test_every_frequency_reads_one_axis(head_dim):
    axes = frequency_axes(head_dim)
    assert axes.shape == (head_dim // 2,)
    assert set(axes.tolist()) <= {0, 1, 2}
    assert (axes == 0).sum() == head_dim // 8
    assert (axes == 1).sum() == (axes == 2).sum() > (axes == 0).sum()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 50), st.integers(0, 2**31 - 1))
def test_scores_depend_on_differences_of_positions(shift, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 16, generator=generator)
    places = torch.randint(20, (2, 3), generator=generator)

    def score(offset):
        cos, sin = rotary_embedding(places + offset, head_dim=16, theta=1e4)
        rotated = [
            x * cos[0, i] + torch.cat([-x[8:], x[:8]]) * sin[0, i] for i, x in enumerate((q, k))
        ]
        return rotated[0] @ rotated[1]

    torch.testing.assert_close(score(0), score(shift), rtol=0, atol=1e-3)
