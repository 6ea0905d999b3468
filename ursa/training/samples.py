"""Samples of fixed prompts and seeds at intervals of a stage: what the averaged weights show."""

import io
import logging
from collections import Counter
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from ursa import storage
from ursa.artifacts import SAMPLES_PICTURE, StageRequest
from ursa.config import RunConfig, StageConfig
from ursa.data.addresses import address_seed
from ursa.data.dataset import TokenSamples
from ursa.generation import SampleDefaults, UrsaPipeline
from ursa.model.transformer import UrsaTransformer
from ursa.tokenizers.visual import AutoencoderTokenizer, load_visual_tokenizer
from ursa.training.checkpoint import not_finite
from ursa.training.merging import plain_average
from ursa.training.schedule import scheduler_config
from ursa.training.trainer import Trainer
from ursa.video.encode import write_video

logger = logging.getLogger(__name__)

_COLUMNS = 5
_ZOOM = 2
_GAP_PX = 4


def sample_defaults(config: RunConfig, **changes: object) -> SampleDefaults:
    """Return how clips of a run are sampled, as `evaluation.sampling` says.

    Args:
        config: The run.
        **changes: Further values of `SampleDefaults`.
    """
    samples, sampling = config.tokenization, config.evaluation.sampling
    values = {
        "height": samples.height_px,
        "width": samples.width_px,
        "num_frames": samples.num_frames,
        "fps": samples.fps,
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "guidance_trunc": sampling.guidance_trunc,
        "temperature": sampling.temperature,
        "flow_shift": sampling.timestep_shift,
        "max_prompt_length": config.text_tokenizer.max_prompt_length,
    }
    return SampleDefaults.model_validate(values | changes)


def step_folder(samples_uri: str, step: int) -> str:
    """Return where the samples of a step are: `samples.png`, and `<i>.mp4` of clips.

    Args:
        samples_uri: Where those of the stage are.
        step: Steps done.
    """
    return storage.join(samples_uri, f"step-{step:08d}")


class StageSamples:
    """Draws the most frequent captions of the training samples, each with a seed of its own.

    The seeds are those of the evaluation, so that a caption that is in both shows one development.
    Nothing that training draws depends on it. Rank 0 draws; where each rank holds a part of the
    weights, or adapters are trained, it makes a copy of the average first, 4 bytes a parameter.
    """

    def __init__(self, request: StageRequest, trainer: Trainer, samples_uri: str) -> None:
        """Keep the parts; nothing is read before the first samples.

        Args:
            request: The stage.
            trainer: Holds the averaged weights.
            samples_uri: Where the samples of the stage go.
        """
        self._request = request
        self._trainer = trainer
        self._samples_uri = samples_uri

    def is_due(self, step: int) -> bool:
        """Whether samples are drawn after a step.

        Args:
            step: Steps done; 0 is what the stage begins with.
        """
        every = self._stage.sample_every
        most = self._stage.max_steps
        return every is not None and every <= most and step % every == 0 and step <= most

    def draw(self, step: int) -> None:
        """Draw, and write picture and clips; all ranks call this.

        Args:
            step: Steps done.

        Raises:
            ConfigError: If there is no visual tokenizer where the request says.
            ShardFormatError: If a shard is missing or damaged.
            StorageError: If the store refuses or does not answer.
        """
        trainer, is_main = self._trainer, self._trainer.group.is_main
        average = trainer.average.module
        if trainer.is_sharded or self._stage.lora is not None:
            state = plain_average(trainer)
            if is_main:
                average = UrsaTransformer(trainer.model.config)
                average.load_state_dict(state)
                average.to(trainer.device)
        if not is_main:
            return
        assert isinstance(average, UrsaTransformer)
        if not_finite(average.state_dict()):
            # the stage goes back when it finds that out; see `ursa.training.guard`
            logger.warning("no samples of step %d: the averaged weights are not finite", step)
            return
        self._write(average, step)

    def _write(self, average: UrsaTransformer, step: int) -> None:
        prompts, config = self._prompts, self._request.config
        is_image = self._stage.modality == "image"
        found = self._pipeline(average)(
            prompts,
            num_frames=1 if is_image else None,
            generator=[
                torch.Generator().manual_seed(address_seed(config.seed, "sample", "t2v", text))
                for text in prompts
            ],
            output_type="np",
        ).frames
        clips = [np.asarray(frames) for frames in found]
        with storage.scratch_directory("samples") as folder:
            if not is_image:
                for number, frames in enumerate(clips):
                    write_video(folder / f"{number}.mp4", frames, config.tokenization.fps)
            (folder / SAMPLES_PICTURE).write_bytes(_picture(clips))
            # in the order of names: the picture comes last and says that all is there
            storage.upload_directory(folder, step_folder(self._samples_uri, step))

    @property
    def _stage(self) -> StageConfig:
        return self._trainer.config

    @cached_property
    def _prompts(self) -> list[str]:
        evaluation = self._request.config.evaluation
        dataset = self._request.datasets.get(self._stage.modality, "train")
        captions = Counter(TokenSamples(dataset, max_samples=evaluation.max_samples).captions)
        ordered = sorted(captions, key=lambda text: (-captions[text], text))
        return ordered[: evaluation.sampling.num_prompts]

    @cached_property
    def _visual_tokenizer(self) -> AutoencoderTokenizer:
        with storage.local_directory(self._request.visual_tokenizer.directory_uri) as folder:
            return load_visual_tokenizer(folder).to(device=self._trainer.device)

    def _pipeline(self, average: UrsaTransformer) -> UrsaPipeline:
        request = self._request
        sampling = request.config.evaluation.sampling
        pipeline = UrsaPipeline(
            transformer=average,
            scheduler=scheduler_config(request, shift=sampling.timestep_shift),
            visual_tokenizer=self._visual_tokenizer,
            text_tokenizer=self._trainer.text_tokenizer,
            defaults=sample_defaults(request.config),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def _picture(clips: list[np.ndarray]) -> bytes:
    """Return a PNG: a row a clip, frames evenly spread from the first to the last."""
    rows = []
    for frames in clips:
        places = np.linspace(0, len(frames) - 1, min(_COLUMNS, len(frames))).round().astype(int)
        rows.append(np.concatenate(list(frames[places]), axis=1))
    gap = np.full((_GAP_PX, rows[0].shape[1], 3), 255, np.uint8)
    parts = [part for row in rows for part in (row, gap)][:-1]
    image = Image.fromarray(np.concatenate(parts).astype(np.uint8))
    buffer = io.BytesIO()
    size = (image.width * _ZOOM, image.height * _ZOOM)
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()
