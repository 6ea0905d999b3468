"""Score `probability`: what an image classifier thinks of the worst frame, such as NSFW."""

from transformers import AutoImageProcessor, AutoModelForImageClassification

from ursa.annotation.models import label_places
from ursa.annotation.networks import (
    Device,
    choose_device,
    deterministic,
    load_model,
    load_part,
    model_files,
    pixels,
)
from ursa.annotation.records import Measurement, SeenClip
from ursa.config import ClassifierConfig


class ClassifierScorer:
    """Score `probability`: the largest over frames, of any of the labels, in [0, 1]."""

    def __init__(self, where: str, config: ClassifierConfig, device: Device) -> None:
        """Load the model.

        Args:
            where: Key of the configuration, for errors.
            config: Model and labels.
            device: Where it runs.

        Raises:
            ConfigError: If it cannot be loaded or has no such label.
            StorageError: If the store refuses or does not answer.
        """
        with model_files(where, config) as folder:
            self._model = load_model(
                AutoModelForImageClassification, where, folder, config, choose_device(device)
            )
            self._processor = load_part(AutoImageProcessor, folder, backend="pil")
        settings = self._model.config
        self._places = label_places(where, settings.id2label, config.labels)
        self._is_multi_label = settings.problem_type == "multi_label_classification"

    def __call__(self, seen: SeenClip) -> Measurement:
        """Measure a clip.

        Args:
            seen: Frames of a clip.
        """
        with deterministic():
            logits = self._model(
                pixel_values=pixels(self._processor, seen.frames, self._model)
            ).logits
            if self._is_multi_label:  # labels do not exclude each other
                found = logits.float().sigmoid()[:, self._places].amax(dim=-1)
            else:
                found = logits.float().softmax(dim=-1)[:, self._places].sum(dim=-1).clamp(max=1)
        return Measurement(
            scores={"probability": float(found.max()), "mean_probability": float(found.mean())}
        )
