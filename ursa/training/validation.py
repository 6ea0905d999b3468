"""Held-out loss and accuracy on a fixed grid of times and samples, by latent frame.

The noise of a token depends on the seed, t and the name of its sample alone: two models, and two
settings of one model, are compared on the same noisy tokens.

Dimensions: B = samples at once, T = times, F, H, W = latent frames, rows, columns.
"""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ursa.artifacts import GridSetting, LossGrid
from ursa.data.addresses import address_seed
from ursa.data.dataset import TokenBatch, TokenSamples
from ursa.diffusion.loss import linear_posterior_loss
from ursa.diffusion.path import ProbabilityPath
from ursa.model.transformer import UrsaTransformer
from ursa.tokenizers.text import TextTokenizer
from ursa.training.distributed import drop_gathered

SETTING_PREFIX: Mapping[GridSetting, str] = {
    "synchronous": "",
    "per_frame": "async_",
    "image_to_video": "i2v_",
}
"""Beginning of the names of metrics."""
_SAME = ("setting", "timesteps", "first_frame")
"""What two grids must have in common to be compared."""
GIVEN_FRAMES = 1
"""Latent frames that image-to-video has clean: the encoded image."""


class _Case(NamedTuple):
    """Noisy codes of a batch, shape (B, F, H, W), and the number of each frame's time, (B, F)."""

    x_t: Tensor
    places: Tensor


@torch.inference_mode()
def measure_grid(  # noqa: PLR0913  (a model, what goes with it, and the grid)
    model: UrsaTransformer,
    path: ProbabilityPath,
    text_tokenizer: TextTokenizer,
    samples: TokenSamples,
    *,
    timesteps: Sequence[float],
    batch_size: int,
    max_prompt_length: int,
    seed: int,
    setting: GridSetting = "synchronous",
    precision: torch.dtype = torch.float32,
) -> LossGrid:
    """Measure mean cross-entropy and accuracy by time and latent frame in one pass over the grid.

    Args:
        model: The network, left in evaluation mode; with a sharded one all ranks call this.
        path: The probability path.
        text_tokenizer: Turns captions into ids.
        samples: What is measured on.
        timesteps: Times t in [0, 1); a repeated one counts once.
        batch_size: Samples at once.
        max_prompt_length: Ids a prompt.
        seed: Decides the noise, together with t and the name of the sample.
        setting: What each frame sees around it; see `LossGrid`. With one latent frame the settings
            but "synchronous" measure nothing that it does not.
        precision: In which matrices are multiplied.

    Returns:
        The grid. len(timesteps) forward passes a sample, whatever the setting.
    """
    model.eval()
    device = model.lm_head.weight.device
    times = tuple(dict.fromkeys(timesteps))
    count = len(samples)
    given = GIVEN_FRAMES if setting == "image_to_video" else 0
    sums: Tensor | float = 0.0
    totals = torch.zeros(len(times), 2, dtype=torch.float64)
    by_sample = torch.zeros(2, count, dtype=torch.float64)
    for start in range(0, count, batch_size):
        batch = samples.batch(range(start, min(start + batch_size, count)))
        text = text_tokenizer.encode(batch.captions, max_length=max_prompt_length).to(device)
        clean = batch.visual_ids[:, given:].flatten(1).to(device)
        noisy = torch.stack([_noisy(batch, path, t, seed) for t in times])
        for number in range(len(times)):
            case = _case(batch, noisy, number, setting, seed)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                hidden = model.hidden_states(text, case.x_t.to(device))[:, -clean.shape[1] :]
            measured = linear_posterior_loss(hidden.to(precision), model.lm_head.weight, clean)
            size = len(batch.sample_ids)
            totals[number] += torch.stack([measured.loss, measured.accuracy]).double().cpu() * size
            # (2, B, F): loss and accuracy of each frame, added to the time that the frame is at
            both = torch.stack([measured.token_loss, measured.token_right.float()]).double().cpu()
            frames = both.unflatten(-1, (batch.visual_ids.shape[1] - given, -1)).mean(-1)
            by_sample[:, start : start + size] += frames.mean(-1) / len(times)
            is_at = case.places[:, given:] == torch.arange(len(times))[:, None, None]
            sums = sums + torch.einsum("tbf,kbf->ktf", is_at.double(), frames)
    drop_gathered(model)
    assert isinstance(sums, Tensor)
    loss, accuracy = sums / count
    # in a row of the setting "per_frame" there are all times
    by_time = (
        torch.stack([loss, accuracy], -1).mean(1) if setting == "per_frame" else totals / count
    )
    return LossGrid(
        setting=setting,
        timesteps=times,
        loss_by_time=by_time[:, 0].tolist(),
        accuracy_by_time=by_time[:, 1].tolist(),
        first_frame=given,
        loss=loss.tolist(),
        accuracy=accuracy.tolist(),
        sample_loss=by_sample[0].tolist(),
        sample_accuracy=by_sample[1].tolist(),
    )


def grid_metrics(grid: LossGrid, prefix: str, *, by_frame: bool = False) -> dict[str, float]:
    """Return the means of a grid by name.

    Args:
        grid: What was measured.
        prefix: Beginning of the names, as "val/".
        by_frame: Whether means over t of each latent frame are among them.

    Returns:
        `<prefix>loss` in nats and `<prefix>accuracy` in [0, 1], means over t; `<prefix>loss_t*`,
        `<prefix>accuracy_t*`, and with by_frame `<prefix>loss_frame*`, counted from 0.
    """
    metrics = {f"{prefix}loss": grid.mean_loss, f"{prefix}accuracy": grid.mean_accuracy}
    for t, loss, accuracy in zip(
        grid.timesteps, grid.loss_by_time, grid.accuracy_by_time, strict=True
    ):
        metrics |= {f"{prefix}loss_t{t:g}": loss, f"{prefix}accuracy_t{t:g}": accuracy}
    if by_frame:
        for frame, loss in enumerate(np.mean(grid.loss, axis=0), grid.first_frame):
            metrics[f"{prefix}loss_frame{frame}"] = float(loss)
    return metrics


def gain_metrics(grid: LossGrid, alone: LossGrid, prefix: str) -> dict[str, float]:
    """Return what a setting gains over one t for all frames, on the same noisy tokens.

    Args:
        grid: Of the setting.
        alone: Of the setting "synchronous", of the same model, times and samples.
        prefix: Beginning of the names, as "val/i2v_".

    Returns:
        `<prefix>loss_gain`, nats by which the loss is lower, and `<prefix>accuracy_gain`, by which
        the accuracy is higher.
    """
    rest = slice(grid.first_frame, None)
    loss, accuracy = (np.array(rows)[:, rest].mean() for rows in (alone.loss, alone.accuracy))
    return {
        f"{prefix}loss_gain": float(loss - np.mean(grid.loss)),
        f"{prefix}accuracy_gain": float(np.mean(grid.accuracy) - accuracy),
    }


def change_metrics(
    grids: Sequence[LossGrid], before: Sequence[LossGrid], prefix: str
) -> dict[str, float]:
    """Return the means of an earlier model and the change since, where both had the same grid.

    Args:
        grids: Of a model.
        before: Of the model that it was trained from, on samples of the same data sets.
        prefix: Beginning of the names, as "val/".

    Returns:
        For each of loss (nats) and accuracy, with the setting's `async_` or `i2v_` before it:
        `<prefix>before_<name>`, `<prefix><name>_change`, now less before, and of two samples or
        more its standard error, `<prefix><name>_change_se`, of the differences of the samples.
    """
    metrics: dict[str, float] = {}
    for grid in grids:
        for old in before:
            if not comparable(grid, old):
                continue
            for kind in ("loss", "accuracy"):
                name = f"{SETTING_PREFIX[grid.setting]}{kind}"
                then = getattr(old, f"mean_{kind}")
                metrics[f"{prefix}before_{name}"] = then
                metrics[f"{prefix}{name}_change"] = getattr(grid, f"mean_{kind}") - then
                changes = np.subtract(
                    getattr(grid, f"sample_{kind}"), getattr(old, f"sample_{kind}")
                )
                if len(changes) > 1:
                    error = float(changes.std(ddof=1) / np.sqrt(len(changes)))
                    metrics[f"{prefix}{name}_change_se"] = error
    return metrics


def comparable(grid: LossGrid, other: LossGrid) -> bool:
    """Whether two grids are of one setting and times, and of as many samples.

    Args:
        grid: A grid.
        other: Another, on samples of the same data set.
    """
    # samples are compared one by one, so there must be as many
    return len(grid.sample_loss) == len(other.sample_loss) and all(
        getattr(grid, name) == getattr(other, name) for name in _SAME
    )


def copy_accuracy(samples: TokenSamples, *, batch_size: int) -> float:
    """Return the accuracy of repeating the first latent frame, which needs no model.

    Args:
        samples: Samples of more than `GIVEN_FRAMES` latent frames.
        batch_size: Samples at once.

    Returns:
        Share, in [0, 1], of the later tokens that equal the last given one at their place: what
        image-to-video must be better than.
    """
    right = total = 0
    for start in range(0, len(samples), batch_size):
        ids = samples.batch(range(start, min(start + batch_size, len(samples)))).visual_ids
        equal = ids[:, GIVEN_FRAMES:] == ids[:, GIVEN_FRAMES - 1 : GIVEN_FRAMES]
        right, total = right + int(equal.sum()), total + equal.numel()
    return right / total


def picture(grids: Sequence[LossGrid]) -> bytes:
    """Draw the loss by time and latent frame, one heat map a grid on one scale of colours.

    Args:
        grids: At least one.

    Returns:
        PNG.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  (half a second, rarely needed)

    num_frames = max(grid.first_frame + len(grid.loss[0]) for grid in grids)
    most = max(max(row) for grid in grids for row in grid.loss)
    width = 1.2 + len(grids) * max(2.6, 0.5 * num_frames)
    figure = Figure(figsize=(width, 1.4 + 0.4 * len(grids[0].loss)), layout="constrained")
    for axes, grid in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids, strict=True):
        values = np.full((len(grid.loss), num_frames), np.nan)
        values[:, grid.first_frame :] = grid.loss
        image = axes.imshow(values, vmin=0, vmax=most, cmap="viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "black" if value > most / 2 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
        axes.set(
            title=grid.setting.replace("_", " "),
            xlabel="latent frame",
            ylabel="t",
            xticks=range(num_frames),
            yticks=range(len(grid.timesteps)),
            yticklabels=[f"{t:g}" for t in grid.timesteps],
        )
    figure.colorbar(image, ax=figure.axes, label="held-out loss, nats")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    return drawn.getvalue()


def settings_of(samples: TokenSamples) -> tuple[GridSetting, ...]:
    """Return the settings in which samples differ: with one latent frame "synchronous" alone."""
    num_frames = samples.batch([0]).visual_ids.shape[1]
    return tuple(SETTING_PREFIX) if num_frames > GIVEN_FRAMES else ("synchronous",)


def _noisy(batch: TokenBatch, path: ProbabilityPath, t: float, seed: int) -> Tensor:
    """Return the codes of a batch at time t, shape (B, F, H, W)."""
    uniform = torch.stack(
        [
            torch.rand(
                batch.visual_ids.shape[1:],
                dtype=torch.float64,
                generator=torch.Generator().manual_seed(
                    address_seed(seed, "validation", str(t), name)
                ),
            )
            for name in batch.sample_ids
        ]
    )
    return path.sample(batch.visual_ids, torch.tensor(t), uniform=uniform)


def _case(batch: TokenBatch, noisy: Tensor, number: int, setting: GridSetting, seed: int) -> _Case:
    """Return one row of the grid. `noisy` holds the batch at all times, (T, B, F, H, W)."""
    num_times, size, num_frames = noisy.shape[:3]
    places = torch.full((size, num_frames), number)
    if setting == "per_frame":
        # each frame begins at a time of its own and goes through all: over the rows of the grid a
        # cell holds the same noisy tokens as with one time for all, among others
        offsets = [
            torch.randint(
                num_times,
                (num_frames,),
                generator=torch.Generator().manual_seed(address_seed(seed, "offsets", name)),
            )
            for name in batch.sample_ids
        ]
        places = (places + torch.stack(offsets)) % num_times
    x_t = noisy[places, torch.arange(size)[:, None], torch.arange(num_frames)]
    if setting == "image_to_video":
        x_t[:, :GIVEN_FRAMES] = batch.visual_ids[:, :GIVEN_FRAMES]
    return _Case(x_t, places)
