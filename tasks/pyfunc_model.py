"""The model as MLflow serves it: prompts in, MP4 files out, as base64 text.

MLflow stores this file with the model and runs it when the model is loaded (models from code).
It needs the package `ursa` only, whose source is stored beside it.

    import mlflow
    model = mlflow.pyfunc.load_model("models:/ursa@champion")
    clips = model.predict([{"prompt": "a rabbit in a meadow"}], params={"seed": 1})
    pathlib.Path("clip.mp4").write_bytes(base64.b64decode(clips[0]))
"""

import base64
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
from mlflow.models import ModelSignature
from mlflow.pyfunc.model import PythonModel
from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

INPUT_EXAMPLE = [{"prompt": "a rabbit in a meadow"}]
REQUIREMENTS = (
    *("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "pydantic"),
    *("pyyaml", "av", "opencv-python-headless", "tqdm", "huggingface_hub"),
)
NOT_GIVEN = -1
MAX_PROMPTS = 64
"""Of a call: its clips are held until the last one is made."""


def signature() -> ModelSignature:
    """Return the schema of inputs, outputs and parameters; -1 means the model's own value."""
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt")]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(
            [
                ParamSpec("num_frames", DataType.long, NOT_GIVEN),
                ParamSpec("seed", DataType.long, 0),
                ParamSpec("num_inference_steps", DataType.long, NOT_GIVEN),
                ParamSpec("guidance_scale", DataType.double, float(NOT_GIVEN)),
                ParamSpec("temperature", DataType.double, float(NOT_GIVEN)),
                ParamSpec("motion_score", DataType.double, float(NOT_GIVEN)),
            ]
        ),
    )


def pip_requirements() -> list[str]:
    """Return the packages that the model needs, in the versions at hand."""
    return [f"{name}=={metadata.version(name).split('+')[0]}" for name in REQUIREMENTS]


class UrsaModel(PythonModel):
    """Generates one clip a prompt; clip number i uses seed + i."""

    def load_context(self, context: Any) -> None:
        """Load the exported model.

        Args:
            context: MLflow's; `artifacts["model"]` is the local model directory.

        Raises:
            ConfigError: If it is no such directory, or its parts do not fit together.
        """
        from ursa.generation import UrsaPipeline  # noqa: PLC0415

        self._pipeline = UrsaPipeline.from_pretrained(context.artifacts["model"])

    # no type hints on `predict`: MLflow would take the schema from them and lose the parameters
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, ARG002
        """Generate one clip a prompt, one after another.

        Args:
            context: MLflow's; not read.
            model_input: Data frame with the column "prompt", texts.
            params: Those of `signature`; -1 or None means the model's own value, for `seed` 0.

        Returns:
            MP4 files as base64 texts, one a prompt.

        Raises:
            ConfigError: If a parameter does not fit, a prompt is no text or too long, or there are
                too many.
        """
        import torch  # noqa: PLC0415

        from ursa.errors import ConfigError  # noqa: PLC0415
        from ursa.generation.limits import check_texts  # noqa: PLC0415
        from ursa.video.encode import write_video  # noqa: PLC0415

        given = {k: v for k, v in (params or {}).items() if v is not None and v != NOT_GIVEN}
        seed = int(given.pop("seed", 0))
        prompts = list(model_input["prompt"])
        for number, prompt in enumerate(prompts, 1):
            # MLflow lets null pass for a text, as None or as a number that is none
            if not isinstance(prompt, str):
                raise ConfigError(
                    f"prompt {number} of {len(prompts)} is null or no text ({prompt!r}); "
                    'give a text, "" for none'
                )
        prompts = [str(prompt) for prompt in prompts]  # of numpy's kind, if they are of an array
        if len(prompts) > MAX_PROMPTS:
            raise ConfigError(
                f"expected at most {MAX_PROMPTS} prompts a call, got {len(prompts):,}"
            )
        check_texts("prompt", prompts)
        clips = []
        with tempfile.TemporaryDirectory() as folder:
            for number, prompt in enumerate(prompts):
                generator = torch.Generator().manual_seed(seed + number)
                output = self._pipeline(prompt, generator=generator, output_type="np", **given)
                path = Path(folder) / f"{number}.mp4"
                write_video(path, output.frames[0], self._pipeline.defaults.fps)
                clips.append(base64.b64encode(path.read_bytes()).decode("ascii"))
        return clips


mlflow.models.set_model(UrsaModel())
