"""Public benchmarks: samples laid out as they expect them, and their result files read.

The benchmarks themselves are installed elsewhere, each in an environment of its own; nothing of
them is imported here. What they expect is in docs/evaluation.md.

References:
    VBench: arXiv 2311.17982, github.com/Vchitect/VBench. VBench-I2V: arXiv 2411.13503, the same
    repository. GenEval: arXiv 2310.11513, github.com/djghosh13/geneval. DPG-Bench: arXiv
    2403.05135, github.com/TencentQQGYLab/ELLA.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, TypeAdapter, ValidationError

from ursa import storage
from ursa.artifacts import Measure, Measurements
from ursa.config import FrozenModel
from ursa.data.addresses import address_seed
from ursa.errors import ConfigError
from ursa.evaluation.measures import group_cases, mean_measure, plain_measure, statistic_measure
from ursa.generation import UrsaPipeline
from ursa.generation.limits import open_picture
from ursa.texts import is_file_name
from ursa.video.encode import write_video

Layout = Literal["vbench", "vbench-i2v", "geneval", "dpg"]
SAMPLES_PER_PROMPT: Mapping[Layout, int] = {"vbench": 5, "vbench-i2v": 5, "geneval": 4, "dpg": 4}
"""As the benchmarks ask for them."""
FLICKERING = "temporal_flickering"
"""VBench's dimension that is measured on clips without motion alone, which a filter picks out."""
FLICKERING_SAMPLES = 25
"""Of its prompts, so that enough are left after the filter (VBench's prompts/README.md)."""
SEEDS_FILE = "seeds.jsonl"
RECORD_FILE = "draw.json"
"""What the samples are of; a draw that would mix them with others is refused."""
SAMPLES_FOLDER = "samples"
"""The benchmarks read every file of a folder, so nothing else lies there."""

_PICTURES = frozenset({"geneval", "dpg"})
_MAX_NAME_BYTES = 240
_DPG_SIDE = 2
_DPG_LINE = re.compile(r"(.+\.png), (?:[\d.e-]+, )+([\d.e-]+)")
"""Picture, score of each of its parts, their mean."""
_SAME_SCORE = 1e-6


class Asked(NamedTuple):
    """What a benchmark asks for.

    Attributes:
        name: Beginning of the file names, or name of the folder.
        prompt: Prompt.
        image: First frame, if it is given.
        metadata: Line that goes beside the samples.
        samples: How many of them the list asks for; None is what the benchmark asks for.
    """

    name: str
    prompt: str
    image: Path | None = None
    metadata: str | None = None
    samples: int | None = None


class NamedModel(NamedTuple):
    """A model as it was named, and what it is.

    Attributes:
        name: Directory or URI.
        sha256: Of its files, see `hash_model`.
    """

    name: str
    sha256: str


class DrawRecord(FrozenModel):
    """What the samples of a folder are of.

    Attributes:
        model: As it was named; the same files may have other names.
        model_sha256: Of the files of the model, see `hash_model`.
        layout: The benchmark.
        prompts_sha256: Of the prompts that were read, with their first frames.
        seed: Decides the seeds of all samples.
        height: Pixels.
        width: Pixels.
        num_frames: Frames of a sample.
        num_inference_steps: Steps of the sampler.
        guidance_scale: Of the sampler.
    """

    model: str
    model_sha256: str
    layout: Layout
    prompts_sha256: str
    seed: int
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float


class _VBenchPrompt(BaseModel):
    """What is read of an entry of VBench's lists; they hold more."""

    prompt_en: str
    dimension: tuple[str, ...] = ()
    image_name: str = ""


class _GenevalPrompt(BaseModel):
    prompt: str


class _DpgPrompt(BaseModel):
    id: str | int
    prompt: str


class _GenevalRow(BaseModel):
    """What is read of a line of GenEval's results."""

    filename: str
    tag: str
    correct: bool
    metadata: str


_VBENCH_PROMPTS = TypeAdapter(tuple[_VBenchPrompt, ...])
_DPG_PROMPTS = TypeAdapter(tuple[_DpgPrompt, ...])
_VBENCH_SCORES = TypeAdapter(dict[str, list[Any]])
"""By dimension the score, and mostly a list of the videos."""
_SAID_AS = {"model_sha256": "the model", "prompts_sha256": "the prompts or first frames"}


def read_prompts(layout: Layout, prompts: Path, images: Path | None = None) -> list[Asked]:
    """Read the prompts of a benchmark, as its own repository has them.

    Args:
        layout: The benchmark.
        prompts: "vbench": a text file of one prompt a line, or VBench_full_info.json; "vbench-i2v":
            vbench2_i2v_full_info.json; "geneval": evaluation_metadata.jsonl; "dpg": the folder of
            text files, or a JSON list of {"id", "prompt"}.
        images: Of "vbench-i2v", the folder of the images in one aspect ratio.

    Returns:
        Prompts in the order of the file, each once.

    Raises:
        ConfigError: If a file cannot be read, is of another kind, or an image is missing.
    """
    if (images is None) == (layout == "vbench-i2v"):
        raise ConfigError(f"--images is for vbench-i2v, which needs it; the layout is {layout}")
    try:
        found = list(_iter_prompts(layout, prompts, images))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: {prompts} cannot be read ({error})") from error
    except ValidationError as error:
        raise ConfigError(
            f"--prompts: {prompts} does not hold the prompts of {layout} ({_first(error)}); "
            "docs/evaluation.md says which file is meant"
        ) from error
    if not found:
        raise ConfigError(f"--prompts: {prompts} holds no prompt")
    known: dict[str, Asked] = {}
    for asked in found:
        _check_name(asked)
        known.setdefault(asked.name, asked)
        if asked.samples is not None:  # in VBench's list a prompt may stand for two dimensions
            known[asked.name] = known[asked.name]._replace(samples=asked.samples)
    return list(known.values())


def _iter_prompts(layout: Layout, prompts: Path, images: Path | None) -> Iterator[Asked]:
    if layout == "dpg" and prompts.is_dir():
        for path in sorted(prompts.glob("*.txt")):
            yield Asked(path.stem, path.read_text("utf-8").strip())
        return
    text = prompts.read_text("utf-8")
    if layout == "vbench" and prompts.suffix != ".json":
        number = FLICKERING_SAMPLES if prompts.stem == FLICKERING else None
        for line in filter(None, map(str.strip, text.splitlines())):
            yield Asked(line, line, samples=number)
    elif layout == "geneval":
        lines = [line for line in text.splitlines() if line.strip()]
        for number, line in enumerate(lines):
            found = _GenevalPrompt.model_validate_json(line)
            yield Asked(f"{number:05d}", found.prompt, metadata=line)
    elif layout == "dpg":
        yield from (Asked(str(item.id), item.prompt) for item in _DPG_PROMPTS.validate_json(text))
    else:
        for item in _VBENCH_PROMPTS.validate_json(text):
            if images is not None and not is_file_name(item.image_name):
                raise ConfigError(f"--prompts: {item.image_name!r} is no name of an image")
            image = None if images is None else images / item.image_name
            flickers = layout == "vbench" and FLICKERING in item.dimension
            number = FLICKERING_SAMPLES if flickers else None
            yield Asked(item.prompt_en, item.prompt_en, image, samples=number)


def _first(error: ValidationError) -> str:
    """Return the first of what is wrong: a list of another kind has as much wrong as entries."""
    item = error.errors(include_input=False, include_url=False)[0]
    return f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}"


def _check_name(asked: Asked) -> None:
    name = asked.name
    is_name = is_file_name(name) and not name.startswith(".")
    if not is_name or len(name.encode("utf-8", "replace")) > _MAX_NAME_BYTES:
        raise ConfigError(f"{name[:80]!r} cannot be the name of a file, as the benchmark wants it")
    if asked.image is not None and not asked.image.is_file():
        raise ConfigError(f"--images: there is no file {asked.image}")


def hash_model(directory: Path) -> str:
    """Return a hash of the files of a model, which is the same wherever they lie.

    Args:
        directory: A model directory; hidden files and texts for readers are left out.

    Returns:
        64 hexadecimal digits.

    Raises:
        StorageError: If a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not is_hidden and path.suffix != ".md":
            digest.update(f"{name.as_posix()}\0{storage.sha256_file(path)}\n".encode())
    return digest.hexdigest()


def draw_layout(
    pipeline: UrsaPipeline,
    layout: Layout,
    asked: Sequence[Asked],
    folder: Path,
    *,
    model: NamedModel,
    seed: int = 0,
    count: int | None = None,
    size: tuple[int, int] | None = None,
) -> Iterator[Path]:
    """Draw samples where the benchmark looks for them; those that are there stay.

    Every sample has a seed of its own, from `seed`, prompt and number; all are in `seeds.jsonl`.
    `draw.json` says what the samples are of: a folder that holds others is not touched. Only the
    number of samples may be another one.

    Args:
        pipeline: The model.
        layout: The benchmark.
        asked: Prompts.
        folder: Made if missing; samples go below its `samples`.
        model: What the pipeline was read from.
        seed: Decides all seeds.
        count: Samples of each prompt; None is what the list or the benchmark asks for.
        size: Height and width, pixels; the model's own if None. "dpg" wants squares.

    Yields:
        Files and folders as they are finished: one a prompt.

    Raises:
        ConfigError: If an image cannot be read, a size does not fit, "dpg" is given another
            number than 4, or the folder holds samples of another model, seed or the like.
    """
    defaults = pipeline.defaults
    height, width = size or (defaults.height, defaults.width)
    number = SAMPLES_PER_PROMPT[layout] if count is None else count
    if layout == "dpg" and (number != _DPG_SIDE**2 or height != width):
        raise ConfigError(
            f"DPG-Bench reads four square pictures of a prompt, got {number} of {height} x {width}"
        )
    samples = folder / SAMPLES_FOLDER
    record = DrawRecord(
        model=model.name,
        model_sha256=model.sha256,
        layout=layout,
        prompts_sha256=_hash_asked(asked),
        seed=seed,
        height=height,
        width=width,
        num_frames=1 if layout in _PICTURES else defaults.num_frames,
        num_inference_steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale,
    )
    _commit_record(folder, record)
    samples.mkdir(exist_ok=True)
    numbers = {item.name: count or item.samples or SAMPLES_PER_PROMPT[layout] for item in asked}
    seeds = {
        (item.name, place): address_seed(seed, layout, item.name, str(place))
        for item in asked
        for place in range(numbers[item.name])
    }
    _write_seeds(folder, seeds)
    for item in asked:
        missing = _missing(layout, samples, item, numbers[item.name])
        frames = {
            place: _draw(pipeline, layout, item, seeds[item.name, place], (height, width))
            for place in missing
        }
        yield _write(layout, samples, item, frames, fps=pipeline.defaults.fps)


def _hash_asked(asked: Sequence[Asked]) -> str:
    digest = hashlib.sha256()
    for item in asked:
        image = None if item.image is None else storage.sha256_file(item.image)
        digest.update(f"{json.dumps([item.name, item.prompt, image, item.metadata])}\n".encode())
    return digest.hexdigest()


def _commit_record(folder: Path, record: DrawRecord) -> None:
    """Write what the samples are to be of, or make sure that those that are there are of it.

    Raises:
        ConfigError: If they are not, or nothing says what they are of.
        StorageError: If the folder cannot be written to.
    """
    path, advice = folder / RECORD_FILE, "give another --out, or remove that folder"
    samples = folder / SAMPLES_FOLDER
    if not path.exists() and samples.is_dir() and any(samples.iterdir()):
        raise ConfigError(
            f"{samples} holds samples, but no {RECORD_FILE} beside it says what they are of; "
            f"{advice}"
        )
    text = record.model_dump_json(indent=1, ensure_ascii=True)
    there = storage.put_if_absent(storage.absolute_uri(str(path)), f"{text}\n".encode())
    try:
        known = DrawRecord.model_validate_json(there)
    except ValidationError as error:
        raise ConfigError(f"{path} cannot be read, so nothing is added to it; {advice}") from error
    wanted, found = record.model_dump(exclude={"model"}), known.model_dump(exclude={"model"})
    if wanted == found:
        return
    differing = [
        _SAID_AS.get(name, f"{name} ({found[name]}, now {value})")
        for name, value in wanted.items()
        if value != found[name]
    ]
    raise ConfigError(
        f"{samples} holds samples of {known.model} that differ from these in "
        f"{', '.join(differing)}; {advice}"
    )


def _write_seeds(folder: Path, seeds: Mapping[tuple[str, int], int]) -> None:
    """Write the list of seeds; those of a draw of more samples before stay on it."""
    path = folder / SEEDS_FILE
    before = path.read_text("utf-8").splitlines() if path.exists() else []
    lines = [json.dumps({"name": n, "index": i, "seed": s}) for (n, i), s in seeds.items()]
    content = "".join(f"{line}\n" for line in dict.fromkeys((*lines, *before)))
    storage.write_bytes(storage.absolute_uri(str(path)), content.encode())


def _place(layout: Layout, samples: Path, item: Asked, number: int) -> Path:
    """Return the file of a sample."""
    match layout:
        case "geneval":
            return samples / item.name / "samples" / f"{number:04d}.png"
        case "dpg":
            return samples / f"{item.name}.png"
        case _:
            return samples / f"{item.name}-{number}.mp4"


def _missing(layout: Layout, samples: Path, item: Asked, count: int) -> list[int]:
    return [i for i in range(count) if not _place(layout, samples, item, i).is_file()]


def _draw(
    pipeline: UrsaPipeline, layout: Layout, item: Asked, seed: int, size: tuple[int, int]
) -> np.ndarray:
    image = None
    if item.image is not None:
        image = open_picture(item.image, "--images")
    frames: np.ndarray = pipeline(
        item.prompt,
        image=image,
        height=size[0],
        width=size[1],
        num_frames=1 if layout in _PICTURES else None,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]
    return frames


def _write(
    layout: Layout, samples: Path, item: Asked, frames: Mapping[int, np.ndarray], *, fps: float
) -> Path:
    """Write the samples of a prompt; a file is there whole or not at all."""
    if layout == "dpg":
        path = _place(layout, samples, item, 0)
        if frames:
            pictures = np.stack([frames[place][0] for place in sorted(frames)])
            rows = pictures.reshape(_DPG_SIDE, _DPG_SIDE, *pictures.shape[1:])
            _save(path, np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))
        return path
    for number, clip in frames.items():
        path = _place(layout, samples, item, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        if layout == "geneval":
            _save(path, clip[0])
        else:
            # other names in the folder of samples would be taken for samples
            part = samples.parent / f"part{path.suffix}"
            write_video(part, clip, fps)
            part.replace(path)
    if layout == "geneval":
        (samples / item.name / "metadata.jsonl").write_text(f"{item.metadata}\n", "utf-8")
        return samples / item.name
    return _place(layout, samples, item, 0)


def _save(path: Path, picture: np.ndarray) -> None:
    part = path.with_name(f".{path.name}.part")
    Image.fromarray(picture).save(part, "PNG")
    part.replace(path)


def read_results(layout: Layout, results: Path) -> Measurements:
    """Read what a benchmark has written.

    Args:
        layout: The benchmark.
        results: "vbench", "vbench-i2v": <name>_eval_results.json; "geneval": results.jsonl; "dpg":
            the text file of results.

    Returns:
        `vbench_<dimension>`, `geneval_<task>` and `geneval_overall`, `dpg_score`: the benchmark's
        own numbers, with intervals over prompts where it has written those of single samples and
        their mean is its score.

    Raises:
        ConfigError: If the file cannot be read or is of another kind.
    """
    try:
        text = results.read_text("utf-8")
        match layout:
            case "geneval":
                lines = [line for line in text.splitlines() if line.strip()]
                return _geneval([_GenevalRow.model_validate_json(line) for line in lines])
            case "dpg":
                return _dpg(text)
            case _:
                return _vbench(layout.replace("-", "_"), _VBENCH_SCORES.validate_json(text))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{results} cannot be read ({error})") from error
    except ValidationError as error:
        raise ConfigError(f"{results} is no result file of {layout} ({_first(error)})") from error
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise ConfigError(f"{results} is no result file of {layout} ({error!r})") from error


def _vbench(prefix: str, scores: Mapping[str, Sequence[Any]]) -> Measurements:
    measures: list[Measure] = []
    groups = []
    for dimension, found in scores.items():
        score = float(found[0])
        if not math.isfinite(score):
            raise ValueError(f"{dimension} is {score}")
        videos = found[1] if len(found) > 1 and isinstance(found[1], list) else []
        singles = [
            (Path(item["video_path"]).stem, float(item["video_results"]))
            for item in videos
            if isinstance(item, dict) and isinstance(item.get("video_results"), int | float)
        ]
        name = f"{prefix}_{dimension}"
        is_mean = bool(singles) and len(singles) == len(videos)
        if not is_mean or abs(np.mean([each for _, each in singles]) - score) > _SAME_SCORE:
            measures.append(plain_measure(name, score))
            continue
        cases = [case for case, _ in singles]
        group = group_cases(name, cases, (("prompt", [case.rpartition("-")[0] for case in cases]),))
        groups.append(group)
        measures.append(mean_measure(name, [each for _, each in singles], group))
    if not measures:
        raise ValueError("no dimension")
    return Measurements(measures=tuple(measures), cases=tuple(groups))


def _geneval(rows: Sequence[_GenevalRow]) -> Measurements:
    correct = np.array([float(row.correct) for row in rows])
    tags = np.array([row.tag for row in rows])
    names = [row.filename for row in rows]
    prompts = [row.metadata for row in rows]
    tasks = list(dict.fromkeys(tags.tolist()))
    if not tasks:
        raise ValueError("no picture")
    measures, groups = [], []
    for task in tasks:
        own = np.flatnonzero(tags == task)
        group = group_cases(
            f"geneval_{task}", [names[i] for i in own], (("prompt", [prompts[i] for i in own]),)
        )
        groups.append(group)
        measures.append(mean_measure(f"geneval_{task}", correct[own].tolist(), group))
    every = group_cases("geneval", names, (("prompt", prompts),))

    def overall(weights: np.ndarray) -> float:
        means = [
            weights[tags == task] @ correct[tags == task] / weights[tags == task].sum()
            for task in tasks
            if weights[tags == task].any()
        ]
        return float(np.mean(means))

    measures.append(statistic_measure("geneval_overall", overall, every))
    return Measurements(measures=tuple(measures), cases=(*groups, every))


def _dpg(text: str) -> Measurements:
    names, scores = [], []
    for line in text.splitlines():
        found = _DPG_LINE.fullmatch(line)
        if found is not None:
            names.append(Path(found[1]).stem)
            scores.append(100 * float(found[2]))
    if not names:
        raise ValueError("no picture")
    group = group_cases("dpg", names, (("prompt", names),))
    return Measurements(measures=(mean_measure("dpg_score", scores, group),), cases=(group,))
