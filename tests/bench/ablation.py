"""The paper in a box: paths, schedules, timestep shifts and clocks of frames, on a tiny model.

    make ablation                                    # minutes on two cores
    make ablation SOURCE=videos ARGS="--seeds 6"     # other clips, more seeds
    python tests/bench/ablation.py --minutes 5       # a part; the next call goes on after it

Every arm trains the same network for equal steps on the same tokens, which the project's own
ingestion and tokenizers make once: the linear metric path, the mixture path and masked diffusion;
the default schedule of the official code; timestep shifts 2 and 3; and, from the weights of a
longer training on the linear metric path, last stages with one t a sample and with one t a latent
frame. The clips are divided into folds; a seed holds out one. Losses of different paths are never
compared: their x_t hide different things; nor are bounds of the likelihood, whose slack is another
on every path (none with a mask). What is compared is what is drawn. Results are kept below the data
of the run (`ablation/`), so that an interrupted ablation goes on; a change of the code that decides
them makes new ones.
"""

import argparse
import contextlib
import os
import platform
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch

from tasks import metric_sink, tracking
from tasks.settings import RuntimeSettings
from tests.bench.ablation_runs import (
    ARMS,
    QUICK,
    TUNINGS,
    Prepared,
    Settings,
    Unit,
    UnitResult,
    code_digest,
    prepare,
    run_unit,
)
from ursa.config import fingerprint

PATHS = ("metric", "mixture", "masked")
OTHERS = (
    "metric",
    "official schedule",
    "shift 2",
    "shift 3",
    "metric, drawn with shift 2",
    "metric, drawn with shift 3",
)
NAMES = {
    "metric": "metric, linear",
    "mixture": "mixture",
    "masked": "masked",
    "official schedule": "metric, default (0.9, 3)",
    "shift 2": "metric, trained and drawn with shift 2",
    "shift 3": "metric, trained and drawn with shift 3",
    "long": "before",
    "synchronous": "one t a sample",
    "asynchronous": "one t a frame, a share of samples one",
    "asynchronous alone": "one t a frame",
    "copy": "first frame repeated",
    "real": "real windows",
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#777777")
PATHS_PICTURE, TUNING_PICTURE = "ablation-paths.png", "ablation-tuning.png"
BEGIN, END = "<!-- ablation: written by make ablation -->", "<!-- ablation: end -->"


class Results:
    """The results of all units, by model and measure."""

    def __init__(self, units: Iterable[UnitResult]) -> None:
        self.values: dict[str, dict[int, float]] = defaultdict(dict)
        clips: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for unit in units:
            for key, value in unit.values.items():
                self.values[key][unit.seed] = value
            for key, by_clip in unit.by_clip.items():
                for clip, value in by_clip.items():
                    clips[key][clip].append(value)
        self.by_clip = {
            key: {clip: float(np.mean(each)) for clip, each in found.items()}
            for key, found in clips.items()
        }

    def has(self, model: str) -> bool:
        """Whether anything of a model has been measured."""
        return any(key.startswith(f"{model}/") for key in self.values)

    def cell(self, key: str, digits: int) -> str:
        """Return mean and deviation over the seeds; nothing if it was not measured."""
        found = list(self.values.get(key, {}).values())
        if not found:
            return ""
        spread = f" ± {np.std(found, ddof=1):.{digits}f}" if len(found) > 1 else ""
        return f"{np.mean(found):.{digits}f}{spread}"

    def difference(self, model: str, base: str, measure: str) -> tuple[float, float, int] | None:
        """Return mean, standard error and number of differences: of clips, else of seeds."""
        one, other = (
            self.by_clip.get(f"{name}/{measure}") or self.values.get(f"{name}/{measure}", {})
            for name in (model, base)
        )
        both = [one[place] - other[place] for place in one if place in other]  # type: ignore[index]
        if len(both) < 2:
            return None
        return float(np.mean(both)), float(np.std(both, ddof=1) / len(both) ** 0.5), len(both)

    def difference_cell(self, model: str, base: str, measure: str, digits: int) -> str:
        """Return a difference with its standard error; bold beyond two of them."""
        found = self.difference(model, base, measure)
        if found is None:
            return ""
        mean, error, _ = found
        text = f"{mean:+.{digits}f} ± {error:.{digits}f}"
        return f"**{text}**" if abs(mean) > 2 * error else text


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _name(model: str) -> str:
    return NAMES.get(model, model)


DRAWN = (
    ("i2v_accuracy", "equal tokens", 3),
    ("i2v_distance", "distance of codes", 3),
    ("i2v_psnr", "PSNR, dB", 1),
    ("unigram", "TV of codes", 3),
    ("pairs", "TV of pairs", 3),
    ("energy", "energy distance x 1000", 0),
)


def paths_table(results: Results, settings: Settings) -> str:
    """Return what the three paths draw, by number of steps."""
    rows = [
        [
            _name(model),
            "",
            *(results.cell(f"{model}/{measure}", digits) for measure, _, digits in DRAWN),
        ]
        for model in ("copy", "real")
    ]
    for model in PATHS:
        for steps in settings.inference_steps:
            cells = [
                results.cell(f"{model}/{measure}@{steps}", digits) for measure, _, digits in DRAWN
            ]
            rows.append([_name(model), str(steps), *cells])
    return _table(["", "steps", *(title for _, title, _ in DRAWN)], rows)


def path_differences(results: Results, settings: Settings) -> str:
    """Return how far the baselines are from the metric path, clip by clip or seed by seed."""
    rows = []
    for model in PATHS[1:]:
        for steps in settings.inference_steps:
            cells = [
                results.difference_cell(model, "metric", f"{measure}@{steps}", digits)
                for measure, _, digits in DRAWN
            ]
            rows.append([f"{_name(model)} less {_name('metric')}", str(steps), *cells])
    return _table(["", "steps", *(title for _, title, _ in DRAWN)], rows)


def _measures(settings: Settings) -> list[tuple[str, str, int]]:
    """Return measure, title and digits of the tables of schedules, shifts and last stages."""
    few = settings.few_steps
    return [
        ("grid_sync_loss", "loss", 3),
        ("grid_i2v_loss", "loss, frame given", 3),
        ("grid_i2v_accuracy", "accuracy, frame given", 4),
        *((f"i2v_accuracy@{n}", f"equal tokens, {n} steps", 3) for n in few),
        *((f"i2v_distance@{n}", f"distance of codes, {n} steps", 3) for n in few),
        *((f"pairs@{n}", f"TV of pairs, {n} steps", 3) for n in few),
    ]


def models_table(results: Results, models: Sequence[str], settings: Settings) -> str:
    """Return means of models of the metric path, then differences from the first of them."""
    measures = _measures(settings)
    rows = [
        [_name(model), *(results.cell(f"{model}/{key}", digits) for key, _, digits in measures)]
        for model in models
    ]
    for model in models[1:]:
        cells = [
            results.difference_cell(model, models[0], key, digits) for key, _, digits in measures
        ]
        rows.append([f"{_name(model)}, less {_name(models[0])}", *cells])
    return _table(["", *(title for _, title, _ in measures)], rows)


def tuning_table(results: Results, settings: Settings) -> str:
    """Return the last stages, and the differences of the asynchronous ones from the synchronous."""
    measures = [*_measures(settings), ("grid_sync_loss_t0", "loss at t = 0", 3)]
    rows = []
    for model in ("long", *TUNINGS):
        cells = (results.cell(f"{model}/{key}", digits) for key, _, digits in measures)
        rows.append([_name(model), *cells])
    for model in ("long", *(name for name in TUNINGS if name != "synchronous")):
        cells = (
            results.difference_cell(model, "synchronous", key, digits)
            for key, _, digits in measures
        )
        rows.append([f"{_name(model)}, less one t a sample", *cells])
    return _table(["", *(title for _, title, _ in measures)], rows)


def verdicts(results: Results) -> list[str]:
    """Say whether asynchronous tuning beats synchronous tuning in image to video."""
    lines = []
    for model in TUNINGS:
        found = results.difference(model, "synchronous", "grid_i2v_accuracy")
        if model == "synchronous" or found is None:
            continue
        mean, error, count = found
        sign = "better" if mean > 2 * error else "worse" if mean < -2 * error else "no different"
        lines.append(
            f"- {_name(model)} against one t a sample, accuracy of image to video: "
            f"{100 * mean:+.2f} ± {100 * error:.2f} points over {count} clips: {sign}"
        )
    return lines


def report(
    results: Results, settings: Settings, prepared: Prepared, command: str, num_seeds: int
) -> str:
    """Return the Markdown between the markers of docs/results.md."""
    training = prepared.datasets.video_train
    counts = [
        f"{len(clips)} ({fold.video_train.num_samples} windows to train on)"
        for clips, fold in zip(prepared.clips_by_fold, prepared.folds, strict=True)
    ]
    parts = [
        f"`{command}` on {machine()}. {num_seeds} seeds; data "
        f"`{prepared.datasets.fingerprint[:16]}`, visual tokenizer of {training.codebook_size} "
        f"codes `{prepared.visual_tokenizer.fingerprint[:16]}`, clips of "
        f"{' x '.join(map(str, training.latent_shape))} tokens; {settings.num_steps} steps an "
        f"arm, {settings.num_long_steps} before a last stage, {settings.num_tuning_steps} in it. "
        f"Held-out clips by seed: {', '.join(counts)}.",
        "**Paths by number of steps**",
        paths_table(results, settings),
        f"![Paths against steps](images/{PATHS_PICTURE})",
        "Differences, standard errors over held-out clips (continuations) and seeds (clips "
        "drawn for captions):",
        path_differences(results, settings),
        "**Schedule and timestep shift of the metric path**",
        models_table(results, OTHERS, settings),
    ]
    if results.has("synchronous"):
        parts += [
            "**Last stage**",
            tuning_table(results, settings),
            "\n".join(verdicts(results)),
            f"![Last stage by t](images/{TUNING_PICTURE})",
        ]
    return "\n\n".join(parts)


def machine() -> str:
    """Return what the numbers were made on."""
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*: (.*)$", info.read_text("utf-8"), re.MULTILINE)
        model = found.group(1).strip() if found else model
    return f"{os.cpu_count()} cores of {model}, torch {torch.__version__}"


def plot_paths(results: Results, settings: Settings, file: Path) -> None:
    """Draw six measures against the number of steps."""
    figure, all_axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for axes, (measure, title, _) in zip(all_axes.flat, DRAWN, strict=True):
        for model, colour in zip(PATHS, COLOURS, strict=False):
            if not results.has(model):
                continue
            steps = [
                n for n in settings.inference_steps if f"{model}/{measure}@{n}" in results.values
            ]
            seeds = [list(results.values[f"{model}/{measure}@{n}"].values()) for n in steps]
            axes.errorbar(
                steps,
                [np.mean(each) for each in seeds],
                [np.std(each, ddof=1) if len(each) > 1 else 0 for each in seeds],
                label=_name(model),
                color=colour,
                marker="o",
                capsize=3,
            )
        for floor in ("copy", "real"):
            found = results.values.get(f"{floor}/{measure}")
            if found:
                axes.axhline(
                    np.mean(list(found.values())), color=COLOURS[3], ls="--", label=_name(floor)
                )
        axes.set(xscale="log", title=title, xlabel="steps")
        axes.set_xticks(settings.inference_steps, [str(n) for n in settings.inference_steps])
        axes.set_xticks([], minor=True)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def plot_tuning(results: Results, times: Sequence[float], file: Path) -> None:
    """Draw how a last stage changes image to video by t, and the loss with one t for all."""
    figure, all_axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    shown = (
        ("grid_i2v_accuracy", "accuracy, first frame given"),
        ("grid_i2v_loss", "loss, first frame given"),
        ("grid_sync_loss", "loss, one t for all"),
    )
    for axes, (measure, title) in zip(all_axes, shown, strict=True):
        for model, colour in zip(TUNINGS, COLOURS, strict=False):
            base = [results.values.get(f"long/{measure}_t{t:g}", {}) for t in times]
            found = [results.values.get(f"{model}/{measure}_t{t:g}", {}) for t in times]
            changes = [
                [one[seed] - other[seed] for seed in one if seed in other]
                for one, other in zip(found, base, strict=True)
            ]
            if not all(changes):
                continue
            axes.errorbar(
                times,
                [np.mean(each) for each in changes],
                [np.std(each, ddof=1) if len(each) > 1 else 0 for each in changes],
                label=_name(model),
                color=colour,
                marker="o",
                capsize=3,
            )
        axes.axhline(0, color=COLOURS[3], linewidth=0.8)
        axes.set(title=f"{title}: change", xlabel="t")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def log_to_mlflow(
    units: Sequence[UnitResult], text: str, prepared: Prepared, settings: Settings, folder: Path
) -> str:
    """Log a run a model and seed below one of the ablation; return the address of the server.

    Without an address in the environment it is a file below the data.
    """
    default = f"sqlite:///{folder / 'mlflow.db'}"
    address = RuntimeSettings.from_env().mlflow_tracking_uri
    if "URSA_MLFLOW_TRACKING_URI" not in os.environ:
        address = os.environ.get("MLFLOW_TRACKING_URI") or default
    name = fingerprint("ablation", settings, prepared.datasets.fingerprint, code_digest())
    # artifacts of a file of SQLite lie where the process stands
    with contextlib.chdir(folder):
        run = tracking.open_run(
            address,
            "ablation",
            name,
            {"ursa.data_fingerprint": prepared.datasets.fingerprint, **tracking.source_version()},
            spool_uri=str(folder / "spool"),
        )
        for unit in units:
            for model, measures in _by_model(unit.values).items():
                with tracking.child_run(run, f"{model}, seed {unit.seed}", {}) as child:
                    for steps, values in sorted(measures.items()):
                        metric_sink.log_metrics(child, values, step=steps)
        tracking.log_text(run, text, "report.md")
        names = [path.name for path in folder.glob("*.png")]
        tracking.log_files(run, str(folder), names, "plots")
        tracking.close_run(run, "FINISHED")
    return address


def _by_model(values: Mapping[str, float]) -> dict[str, dict[int, dict[str, float]]]:
    """Return measures of each model by the number of steps of the sampler, 0 for none."""
    found: dict[str, dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for key, value in values.items():
        model, _, measure = key.rpartition("/")
        bare, _, steps = measure.partition("@")
        found[model][int(steps or 0)][f"ablation/{bare}"] = value
    return found


def run_units(
    units: Sequence[Unit], pool: ProcessPoolExecutor, num_workers: int, minutes: float
) -> list[UnitResult]:
    """Run what is not done yet; after some minutes nothing new is begun."""
    done = {unit.result_uri: result for unit in units if (result := unit.find()) is not None}
    todo = [unit for unit in units if unit.result_uri not in done]
    deadline = time.monotonic() + 60 * minutes
    running: dict[Future[UnitResult], Unit] = {}
    while todo or running:
        ready = [unit for unit in todo if unit.start is None or unit.start.result_uri in done]
        while ready and len(running) < num_workers and time.monotonic() < deadline:
            unit = ready.pop(0)
            todo.remove(unit)
            running[pool.submit(run_unit, unit)] = unit
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            unit, result = running.pop(future), future.result()
            done[unit.result_uri] = result
            spent = ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items())
            say(f"{unit.name}, seed {unit.seed}: {spent}")
    if todo:
        say(f"{len(todo)} of {len(units)} units are left: run again")
    return [done[unit.result_uri] for unit in units if unit.result_uri in done]


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def write_docs(text: str, folder: Path, docs: Path) -> None:
    """Put the report between its markers in results.md, and the pictures into images."""
    page = docs / "results.md"
    before, rest = page.read_text("utf-8").split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", "utf-8")
    for picture in folder.glob("*.png"):
        (docs / "images" / picture.name).write_bytes(picture.read_bytes())


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add: Callable[..., object] = parser.add_argument
    add("--source", default="tests/data/videos", help="directory, manifest or s3://...")
    add("--preset", default="tiny")
    add("--data", type=Path, help="where all of it is kept; the data of `make run` by default")
    add("--seeds", type=int, default=3)
    add("--steps", type=int, help="optimizer steps of every arm")
    add("--long-steps", type=int, help="optimizer steps before a last stage")
    add("--tuning-steps", type=int, help="optimizer steps of a last stage")
    add("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    add("--workers", type=int, default=max(1, len(os.sched_getaffinity(0))))
    add("--minutes", type=float, default=float("inf"), help="then begin nothing new")
    add("--docs", type=Path, help="write the report into results.md of this directory")
    add("--quick", action="store_true", help="whether it works: the numbers mean nothing")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, print, plot and log."""
    chosen = _arguments(arguments)
    began = time.monotonic()
    settings = QUICK if chosen.quick else Settings()
    changes = {
        "preset": chosen.preset,
        "num_steps": chosen.steps or settings.num_steps,
        "num_long_steps": chosen.long_steps or settings.num_long_steps,
        "num_tuning_steps": chosen.tuning_steps or settings.num_tuning_steps,
    }
    settings = settings.model_copy(update=changes)
    uri = str(chosen.data.absolute()) if chosen.data else RuntimeSettings.from_env().data_uri
    mpl.use("agg")
    with ProcessPoolExecutor(chosen.workers, mp_context=get_context("spawn")) as pool:
        prepared = prepare(chosen.source, uri, settings, pool)
        say(f"data {prepared.datasets.fingerprint}, {machine()}")
        code = code_digest()
        units = [
            Unit(
                arm=arm,
                tuning=tuning,
                seed=seed,
                settings=settings,
                prepared=prepared,
                uri=uri,
                code=code,
            )
            for seed in range(chosen.seeds)
            for arm in chosen.arms
            for tuning in (None, *(TUNINGS if ARMS[arm].is_long else ()))
        ]
        found = run_units(units, pool, chosen.workers, chosen.minutes)
    if not found:
        sys.exit("no unit is done")
    results = Results(found)
    folder = Path(uri) / "ablation" / "report"
    folder.mkdir(parents=True, exist_ok=True)
    plot_paths(results, settings, folder / PATHS_PICTURE)
    if results.has("synchronous"):
        times = settings.config().evaluation.timesteps
        plot_tuning(results, times, folder / TUNING_PICTURE)
    command = (
        f"make ablation{f' SOURCE={chosen.source}' if chosen.source != 'tests/data/videos' else ''}"
    )
    text = report(results, settings, prepared, command, chosen.seeds)
    (folder / "report.md").write_text(text + "\n", "utf-8")
    say("\n" + text)
    address = log_to_mlflow(found, text, prepared, settings, folder)
    say(f"\n{folder}/report.md and pictures beside it; MLflow: {address}")
    if chosen.docs:
        write_docs(text, folder, chosen.docs)
    say(f"{(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
