"""From a checkpoint to a pipeline that samples."""

from ursa import storage
from ursa.artifacts import CheckpointRef, StageRequest
from ursa.data.dataset import motion_scores
from ursa.generation import UrsaPipeline
from ursa.tokenizers.text import load_text_tokenizer
from ursa.tokenizers.visual import load_visual_tokenizer
from ursa.training.samples import sample_defaults
from ursa.training.schedule import scheduler_config
from ursa.training.stage import load_average


def trained_pipeline(request: StageRequest, checkpoint: CheckpointRef) -> UrsaPipeline:
    """Return the averaged weights of a checkpoint with the path and both tokenizers.

    Args:
        request: The stage that made the checkpoint.
        checkpoint: A committed checkpoint.

    Raises:
        CheckpointError: If the checkpoint is not committed, damaged, or of another model.
        DataExhaustedError: If there is no training video sample.
        ShardFormatError: If a shard is missing or damaged.
        ConfigError: If a tokenizer directory is damaged.
        StorageError: If the store refuses or does not answer.
    """
    motion = motion_scores(request.datasets.video_train)
    with (
        storage.local_directory(request.visual_tokenizer.directory_uri) as visual,
        storage.local_directory(request.text_tokenizer.directory_uri) as text,
    ):
        return UrsaPipeline(
            transformer=load_average(checkpoint, request),
            scheduler=scheduler_config(
                request, shift=request.config.evaluation.sampling.timestep_shift
            ),
            visual_tokenizer=load_visual_tokenizer(visual),
            text_tokenizer=load_text_tokenizer(text),
            defaults=sample_defaults(
                request.config,
                motion_score=sorted(motion)[len(motion) // 2] if motion else None,
                loss_curve=checkpoint.loss_curve,
            ),
        )
