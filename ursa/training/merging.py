"""What a stage that has trained adapters leaves: plain weights for whoever knows none."""

from collections.abc import Mapping

from torch import Tensor

from ursa import storage
from ursa.artifacts import StageRequest
from ursa.model.adapters import merged_weights, save_adapter
from ursa.training.checkpoint import gathered_copy, save_checkpoint
from ursa.training.trainer import Trainer

ADAPTER_FOLDER = "adapter"
"""Beside merged weights and in exported models."""


def plain_average(trainer: Trainer) -> dict[str, Tensor]:
    """Copy the averaged weights of the whole network, adapters merged; all ranks call this.

    Args:
        trainer: Of any stage.

    Returns:
        Tensors on the CPU by the names of `UrsaTransformer`, 4 bytes a parameter, on rank 0; none
        on the others.
    """
    config, is_main = trainer.config.lora, trainer.group.is_main
    with trainer.averaged_model() as model:
        # all ranks hold shards, else rank 0 has everything
        state = model.state_dict() if is_main or trainer.is_sharded else {}
        whole = gathered_copy(state, keep=is_main)
    return whole if config is None else merged_weights(whole, config)


def publish_merged(
    request: StageRequest,
    trainer: Trainer,
    *,
    base: str | None,
    fingerprint: str,
    metrics: Mapping[str, float],
) -> str:
    """Merge the averaged adapters of a stage and commit the weights; all ranks call this.

    The folder is a checkpoint that holds the averaged weights of the whole network alone, and in
    `adapter/` what was trained, in the form of peft.

    Args:
        request: The stage.
        trainer: That of the stage, after its last step.
        base: Address of the weights that the stage began with.
        fingerprint: What decides the stage.
        metrics: Those of the last step.

    Returns:
        URI of the folder, on all ranks.

    Raises:
        NonFiniteLossError: If a merged weight is not finite.
        CheckpointError: If the store gives back other bytes than it was given.
        StorageError: If the store refuses or does not answer.
    """
    config, group = trainer.config.lora, trainer.group
    assert config is not None
    weights = plain_average(trainer)
    trained = gathered_copy(trainer.average.module.state_dict(), keep=group.is_main)

    def write() -> str:
        steps = trainer.config.max_steps
        uri = save_checkpoint(
            {f"ema.{name}": value for name, value in weights.items()},
            storage.join(request.output_uri, "merged", request.stage, fingerprint[:32]),
            step=steps,
            num_samples_seen=trainer.loader.samples_seen(steps),
            fingerprint=fingerprint,
            keep=None,
            metrics=metrics,
        )
        with storage.scratch_directory("adapter") as folder:
            save_adapter(trained, config, folder, base=base)
            storage.upload_directory(folder, storage.join(uri, ADAPTER_FOLDER))
        return uri

    return group.from_main(write)
