"""The export step: a checkpoint and its tokenizers become one directory that anyone can load."""

import shutil

from ursa import storage
from ursa.artifacts import SCHEMA_VERSION, CheckpointRef, ExportedModel, StageRequest
from ursa.config import STAGES, fingerprint
from ursa.training.merging import ADAPTER_FOLDER
from ursa.training.trained import trained_pipeline

_LAYOUT_VERSION = 3
"""Of the model directory; a directory of another layout is written again, not taken for done."""


def export_model(
    request: StageRequest, checkpoint: CheckpointRef, *, output_uri: str
) -> ExportedModel:
    """Write the averaged weights, the path and both tokenizers as one model directory.

    Where the stage has trained adapters they are merged into the weights, and in `adapter/` as peft
    writes them.

    Args:
        request: The stage that made the checkpoint.
        checkpoint: A committed checkpoint.
        output_uri: Root of all data of the run.

    Returns:
        The committed directory with the sha256 of every file.

    Raises:
        CheckpointError: If the checkpoint is not committed or damaged.
        DataExhaustedError: If there is no training video sample.
        ShardFormatError: If a shard is missing or damaged.
        ConfigError: If a tokenizer directory is damaged.
        StorageError: If the store refuses or does not answer.
    """
    sampling = request.config.evaluation.sampling
    print_ = fingerprint("model", SCHEMA_VERSION, _LAYOUT_VERSION, checkpoint.fingerprint, sampling)
    folder_uri = storage.join(output_uri, "models", print_[:32])
    manifest_uri = storage.join(folder_uri, "manifest.json")
    done = storage.load_record(manifest_uri, ExportedModel)
    if done is not None:
        return done
    pipeline = trained_pipeline(request, checkpoint)
    with storage.scratch_directory("export") as scratch:
        pipeline.save_pretrained(scratch, codebook_file=False)
        if checkpoint.merged_uri is not None:
            adapter_uri = storage.join(checkpoint.merged_uri, ADAPTER_FOLDER)
            with storage.local_directory(adapter_uri) as adapter:
                shutil.copytree(adapter, scratch / ADAPTER_FOLDER)
        directory_uri = storage.unique_place(folder_uri, "model")
        hashes = storage.upload_directory(scratch, directory_uri)
    return storage.commit_record(
        manifest_uri,
        ExportedModel(
            manifest_uri=manifest_uri,
            directory_uri=directory_uri,
            checkpoint=checkpoint,
            tokens_uri=request.datasets.manifest_uri,
            started_from_uri=_started_from_uri(request),
            sha256=hashes,
            fingerprint=print_,
        ),
    )


def _started_from_uri(request: StageRequest) -> str | None:
    """Return where the weights lie that the stages up to this one began with; None were drawn."""
    stages = STAGES[: STAGES.index(request.stage) + 1]
    starts = [getattr(request.config.stages, name).init_from for name in stages]
    # stages before the last start of its own decide nothing
    uri = next((uri for uri in reversed(starts) if uri is not None), None)
    return None if uri is None else storage.absolute_uri(uri)
