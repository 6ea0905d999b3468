import itertools

import pytest
import torch

from tests import factories
from ursa.diffusion.path import MaskedPath, MixturePath
from ursa.diffusion.timesteps import inference_times
from ursa.generation.sampler import Draws, Sampling, sample
from ursa.model.transformer import UrsaTransformer

SHAPE = (2, 2, 2)


def draw(path, solver, num_steps=4):
    """Return the given frame, and the codes of all steps, of a network that has a row more."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    config = factories.transformer_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UrsaTransformer(config).eval()
        wider = torch.nn.Embedding(config.vocab_size + 1, config.hidden_size)
        model.model.embed_tokens = wider
    draws = Draws(generators, 3, SHAPE, "per_token")
    start = draws.source(path)
    start[:, 0] = 1
    seen = [start]

    def note(step, t, codes):
        seen.append(codes)
        return codes, False

    text = torch.zeros(3, 4, dtype=torch.int64)
    sampling = Sampling(
        times=tuple(inference_times(num_steps, 1.0).tolist()),
        scale=1.0,
        trunc=1.0,
        temperature=1.0,
        top_k=None,
        top_p=None,
        draw_order="per_token",
        solver=solver,
    )
    with torch.no_grad():
        sample(
            model,
            path,
            start,
            begins=torch.tensor([1.0, 0.0]),
            text_ids=text,
            negative_ids=text,
            sampling=sampling,
            draws=draws,
            on_step=note,
            progress=lambda steps: steps,
        )
    return seen


@pytest.mark.parametrize("solver", ["exact", "euler", "euler_beta"])
def test_a_masked_token_is_drawn_once_and_none_is_left(solver):
    size = factories.transformer_config().lm_head_size
    path = MaskedPath(size)
    seen = draw(path, solver, num_steps=8)
    assert (seen[0][:, 1] == path.mask_id).all()
    for before, after in itertools.pairwise(seen):
        known = before != path.mask_id
        assert torch.equal(before[known], after[known])
    counts = [int((codes == path.mask_id).sum()) for codes in seen]
    assert counts[-1] == 0
    assert len(set(counts)) > 2
    assert int(seen[-1].max()) < size


def test_the_last_step_of_the_other_paths_draws_all_tokens():
    path = MixturePath(factories.transformer_config().lm_head_size)
    seen = draw(path, "exact")
    assert (seen[-1][:, 0] == 1).all()
    # the network knows nothing: what was drawn before is not kept
    assert (seen[-1][:, 1] != seen[-2][:, 1]).float().mean() > 0.7
