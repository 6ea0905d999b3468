"""A captioner on this machine: an image-text-to-text model of transformers, clip by clip."""

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ursa.annotation.networks import (
    Device,
    choose_device,
    deterministic,
    load_model,
    load_part,
    model_files,
)
from ursa.annotation.records import Measurement, SeenClip
from ursa.config import ModelCaptionerConfig
from ursa.errors import ConfigError


class ModelCaptioner:
    """Writes a short and, if wanted, a long caption, each by its own prompt, without sampling."""

    def __init__(self, where: str, config: ModelCaptionerConfig, device: Device) -> None:
        """Load the model.

        Args:
            where: Key of the configuration, for errors.
            config: Model and prompts.
            device: Where it runs.

        Raises:
            ConfigError: If it cannot be loaded or has no chat template.
            StorageError: If the store refuses or does not answer.
        """
        self._config = config
        with model_files(where, config) as folder:
            self._processor = load_part(AutoProcessor, folder, backend="pil")
            if not getattr(self._processor, "chat_template", None):
                raise ConfigError(
                    f"{where}: {config.model!r} has no chat template; take a model that was "
                    "trained to answer, or add chat_template.jinja"
                )
            self._model = load_model(
                AutoModelForImageTextToText, where, folder, config, choose_device(device)
            )

    def __call__(self, seen: SeenClip) -> Measurement:
        """Return the captions of a clip.

        Args:
            seen: Frames of a clip.

        Raises:
            AnnotationError: If the model says nothing.
        """
        pictures = [Image.fromarray(frame) for frame in seen.frames]
        long_prompt = self._config.long_prompt
        return Measurement(
            caption=self._answer(pictures, self._config.prompt),
            caption_long=None if long_prompt is None else self._answer(pictures, long_prompt),
        )

    def _answer(self, pictures: list[Image.Image], prompt: str) -> str:
        content = [
            *({"type": "image", "image": picture} for picture in pictures),
            {"type": "text", "text": prompt},
        ]
        inputs = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._model.device, self._model.dtype)
        with deterministic():
            ids = self._model.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=self._config.max_tokens
            )
        new = ids[:, inputs["input_ids"].shape[1] :]
        return str(self._processor.batch_decode(new, skip_special_tokens=True)[0])
