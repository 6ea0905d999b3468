"""Checkpoints that commit: a new folder each time, its marker last, never overwritten.

`<stage_uri>/step-00000100.<nonce>/` holds `state.safetensors` and, last, `COMMITTED.json` with the
sha256 of the state, after that was read back. What has no marker, or a state that does not match
it, does not exist. Randomness is addressed by (seed, stage, step, sample), so there is no generator
state to keep.
"""

import contextlib
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ursa import storage
from ursa.config import FrozenModel
from ursa.errors import CheckpointError, ManifestError, NonFiniteLossError, StorageError
from ursa.training.distributed import local_part, shard_like, whole
from ursa.training.guard import SkippedSteps

logger = logging.getLogger(__name__)

STATE_FILE = "state.safetensors"
MARKER_FILE = "COMMITTED.json"
SAVE_LIMIT_S = 1800.0
_FOLDER = re.compile(r"/(step-(\d{8})\.[0-9a-f]+)/" + re.escape(MARKER_FILE) + "$")
_ANY_FILE = re.compile(r"^(.*/step-\d{8}\.[0-9a-f]+)/[^/]+$")


class CheckpointMarker(FrozenModel):
    """What a committed checkpoint is."""

    step: int
    num_samples_seen: int
    state_sha256: str
    fingerprint: str
    metrics: dict[str, float]
    skipped: SkippedSteps = SkippedSteps()


def training_state(
    model: nn.Module, average: AveragedModel, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Flatten weights, average and optimizer moments into named tensors.

    Args:
        model: The network.
        average: Average of its weights.
        optimizer: That of its parameters.

    Returns:
        Tensors named `model.*`, `ema.*`, `ema_num_averaged` and `optimizer.<key>.<parameter>`,
        detached, not copied where they are contiguous; sharded ones as they are.
    """
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    state |= {f"ema.{name}": value for name, value in average.module.state_dict().items()}
    state["ema_num_averaged"] = average.n_averaged
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            state[f"optimizer.{key}.{name}"] = value
    return {name: value.detach().contiguous() for name, value in state.items()}


def gathered_copy(state: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Copy a state to the memory of the processor, sharded tensors whole; all ranks call this.

    One tensor at a time is gathered, so that a rank that keeps none holds one whole tensor at most.

    Args:
        state: Named tensors of `training_state`.
        keep: Whether this rank wants the copy.

    Returns:
        Named tensors on the CPU; none if they are not kept.
    """
    copies = {}
    for name, value in state.items():
        full = whole(value)
        if keep:
            copies[name] = full.to("cpu", copy=full is value)
    return copies


def restore_state(
    state: dict[str, Tensor],
    model: nn.Module,
    average: AveragedModel,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put a flattened state back; the inverse of `training_state`.

    Args:
        state: Named tensors of `training_state`, whole, the same on all ranks.
        model: Its weights are replaced; sharded or not, as the average and the optimizer.
        average: Its weights and count are replaced.
        optimizer: Its moments are replaced; they go where the weights are.

    Raises:
        RuntimeError: If names or shapes of the weights do not fit the network.
    """
    for network, prefix in ((model, "model."), (average.module, "ema.")):
        known = network.state_dict()
        weights = _strip(state, prefix)
        network.load_state_dict(
            {name: shard_like(value, known.get(name, value)) for name, value in weights.items()}
        )
    average.n_averaged.copy_(state["ema_num_averaged"])
    is_fused = bool(optimizer.defaults.get("fused"))
    for name, parameter in model.named_parameters():
        suffix = f".{name}"
        optimizer.state[parameter] = {
            key.removeprefix("optimizer.").removesuffix(suffix): _moment(
                value, parameter, is_fused=is_fused
            )
            for key, value in state.items()
            if key.startswith("optimizer.") and key.split(".", 2)[2] == name
        }


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity.

    Args:
        state: Named tensors; of sharded ones this rank's part is looked at.
    """
    parts = {name: local_part(value) for name, value in state.items()}
    # a sum is much faster and finite for nearly all that is; it may only overflow
    return [
        name
        for name, value in parts.items()
        if not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all())
    ]


def save_checkpoint(
    state: dict[str, Tensor],
    stage_uri: str,
    *,
    step: int,
    num_samples_seen: int,
    fingerprint: str,
    keep: int | None,
    metrics: Mapping[str, float] | None = None,
    skipped: SkippedSteps | None = None,
) -> str:
    """Write a checkpoint, read it back, commit it, then remove older ones beyond `keep`.

    Args:
        state: Named tensors of `training_state`.
        stage_uri: The checkpoint becomes a new folder below it.
        step: Steps done.
        num_samples_seen: Samples of these steps over all workers.
        fingerprint: What decides the run; a checkpoint with another one is not resumed.
        keep: Number of checkpoints left, at least 1; None removes none.
        metrics: Those of the last step, kept in the marker.
        skipped: Steps that left no trace, kept in the marker.

    Returns:
        URI of the new folder.

    Raises:
        NonFiniteLossError: If a tensor holds NaN or infinity; nothing is written.
        CheckpointError: If the store gives back other bytes than it was given, or none; no older
            one is removed.
        StorageError: If the store refuses or does not answer.
    """
    bad = not_finite(state)
    if bad:
        raise NonFiniteLossError(
            f"step {step}: {len(bad)} tensors are not finite ({', '.join(bad[:3])}); the last "
            "good checkpoint is kept; lower the learning rate"
        )
    folder_uri = storage.join(stage_uri, f"step-{step:08d}.{secrets.token_hex(4)}")
    state_uri = storage.join(folder_uri, STATE_FILE)
    with storage.scratch_directory("checkpoint") as folder:
        path = folder / STATE_FILE
        save_file(state, path)
        digest = storage.sha256_file(path)
        storage.upload_file(path, state_uri)
    try:
        with storage.local_copy(state_uri) as path:
            found = storage.sha256_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{state_uri} was written and is gone: another run has removed it, or the store has "
            "lost it; run again"
        ) from error
    if found != digest:
        raise CheckpointError(
            f"{state_uri} was written and read back with other bytes; older checkpoints are kept; "
            "check the store, then run again"
        )
    marker = CheckpointMarker(
        step=step,
        num_samples_seen=num_samples_seen,
        state_sha256=digest,
        fingerprint=fingerprint,
        metrics=dict(metrics or {}),
        skipped=skipped or SkippedSteps(),
    )
    storage.commit_record(storage.join(folder_uri, MARKER_FILE), marker)
    for old, old_step in _committed(stage_uri)[keep:] if keep is not None else []:
        if old_step < step:  # never one that another writer has just made of the same step
            # its marker first: half a checkpoint must not look committed
            with contextlib.suppress(FileNotFoundError):  # another writer was faster
                storage.remove_file(storage.join(old, MARKER_FILE))
            storage.remove_directory(old)
    return folder_uri


class CheckpointWriter:
    """Runs `save_checkpoint` in the background, one at a time.

    What fails is raised by the next call, in the thread that trains: nothing fails in silence.
    """

    def __init__(self, *, limit_s: float = SAVE_LIMIT_S) -> None:
        """Nothing is written yet.

        Args:
            limit_s: A save that takes longer is an error, seconds.
        """
        self._limit_s = limit_s
        self._began_s = 0.0
        self._what = ""
        self._running: Future[str] | None = None
        self._uri = ""

    def submit(self, save: Callable[[], str], what: str) -> None:
        """Begin a save, after the one before has ended.

        Args:
            save: Returns the URI of the new checkpoint; what it reads must not change meanwhile.
            what: Names it in errors.

        Raises:
            UrsaError: What the save before raised.
            StorageError: If it took longer than the limit.
        """
        self.wait()
        self._began_s, self._what, self._running = time.monotonic(), what, Future()
        # a daemon: a store that hangs must not keep the process from ending
        threading.Thread(
            target=_run, args=(save, self._running), name="checkpoint", daemon=True
        ).start()

    def check(self) -> None:
        """Raise what has gone wrong so far; does not wait.

        Raises:
            UrsaError: What the save raised.
            StorageError: If it has taken longer than the limit.
        """
        if self._running is not None and (
            self._running.done() or time.monotonic() - self._began_s > self._limit_s
        ):
            self.wait()

    def wait(self) -> str:
        """Wait for the save in flight.

        Returns:
            URI of the last checkpoint; "" if there was none.

        Raises:
            UrsaError: What the save raised.
            StorageError: If it takes longer than the limit.
        """
        running, self._running = self._running, None
        if running is not None:
            left_s = self._limit_s - (time.monotonic() - self._began_s)
            try:
                self._uri = running.result(timeout=max(0.0, left_s))
            except TimeoutError as error:
                if running.done():
                    raise
                raise StorageError(
                    f"{self._what} was not written within {self._limit_s:g} s; check the store, "
                    "then run again: the stage goes on from the checkpoint before"
                ) from error
        return self._uri


def _run(save: Callable[[], str], outcome: "Future[str]") -> None:
    try:
        outcome.set_result(save())
    except BaseException as error:  # noqa: BLE001  (raised by the next call of the writer)
        outcome.set_exception(error)


def load_checkpoint(folder_uri: str) -> tuple[CheckpointMarker, dict[str, Tensor]]:
    """Read a committed checkpoint after checking its hash.

    Args:
        folder_uri: What `save_checkpoint` returned.

    Returns:
        The marker and the named tensors, on the CPU.

    Raises:
        CheckpointError: If it is not committed or damaged.
    """
    try:
        marker = storage.load_record(storage.join(folder_uri, MARKER_FILE), CheckpointMarker)
    except ManifestError as error:
        raise CheckpointError(f"{folder_uri}: {MARKER_FILE} is damaged: {error}") from error
    if marker is None:
        raise CheckpointError(f"{folder_uri}: not committed ({MARKER_FILE} is missing)")
    try:
        with storage.local_copy(storage.join(folder_uri, STATE_FILE)) as path:
            digest = storage.sha256_file(path)
            if digest != marker.state_sha256:
                raise CheckpointError(
                    f"{folder_uri}: sha256 of {STATE_FILE} is {digest[:16]}..., expected "
                    f"{marker.state_sha256[:16]}..."
                )
            return marker, load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(f"{folder_uri}: {STATE_FILE} is missing or damaged") from error


def latest_checkpoint(
    stage_uri: str, *, fingerprint: str, wanted: Callable[[int], bool] = lambda _step: True
) -> tuple[str, CheckpointMarker, dict[str, Tensor]] | None:
    """Find the newest checkpoint of a stage that is whole; damaged ones are passed over.

    Args:
        stage_uri: Where the checkpoints of the stage are.
        fingerprint: What decides the run; checkpoints with another one are passed over.
        wanted: Whether a checkpoint of so many steps counts.

    Returns:
        URI, marker and named tensors on the CPU; None if there is no such checkpoint.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    seen: set[str] = set()
    while True:
        new = [uri for uri, step in _committed(stage_uri) if uri not in seen and wanted(step)]
        if not new:
            return None
        for folder_uri in new:
            try:
                marker, state = load_checkpoint(folder_uri)
            except CheckpointError as error:
                logger.warning("passing over a checkpoint: %s", error)
                continue
            if marker.fingerprint == fingerprint:
                return folder_uri, marker, state
        # a writer may have removed all of the list after it had committed a newer one
        seen.update(new)


def unfinished_checkpoints(root_uri: str, *, min_age_s: float) -> dict[str, int]:
    """Return what kills in the middle of a save have left: folders without a marker.

    Args:
        root_uri: The data root.
        min_age_s: What was written less long ago may be a save under way, seconds.

    Returns:
        Bytes by URI of the folder.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    folders: dict[str, list[storage.StoredFile]] = {}
    try:
        files = storage.list_files(storage.join(root_uri, "checkpoints"), with_etag=False)
    except FileNotFoundError:
        return {}
    for item in files:
        if match := _ANY_FILE.match(item.uri):
            folders.setdefault(match[1], []).append(item)
    before_s = time.time() - min_age_s
    left: dict[str, int] = {}
    for uri, parts in folders.items():
        if storage.join(uri, MARKER_FILE) in {item.uri for item in parts}:
            continue
        with contextlib.suppress(FileNotFoundError):  # it has just been removed
            if max(storage.modified_s(item.uri) for item in parts) < before_s:
                left[uri] = sum(item.num_bytes for item in parts)
    return left


def _committed(stage_uri: str) -> list[tuple[str, int]]:
    """List folders that have a marker, newest first."""
    try:
        files = storage.list_files(stage_uri, with_etag=False)
    except FileNotFoundError:
        return []
    found = [
        (storage.join(stage_uri, match[1]), int(match[2]))
        for item in files
        if (match := _FOLDER.search(item.uri))
    ]
    return sorted(found, key=lambda item: item[1], reverse=True)


def _moment(value: Tensor, parameter: Tensor, *, is_fused: bool) -> Tensor:
    """Return a copy for the optimizer, sharded as its parameter; the step count is a number.

    A fused optimizer counts its steps on the device.
    """
    if value.shape == parameter.shape:
        return shard_like(value, parameter).to(parameter.device, copy=True)
    return value.to(parameter.device if is_fused else "cpu", copy=True)


def _strip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }
