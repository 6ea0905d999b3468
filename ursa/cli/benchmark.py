"""`ursa benchmark`: samples as public benchmarks expect them, and what they have found."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from ursa.cli.data import AsJson
from ursa.cli.lines import print_lines
from ursa.cli.models import check_device, model_directory
from ursa.errors import ConfigError

Layout = Literal["vbench", "vbench-i2v", "geneval", "dpg"]

app = App(
    name="benchmark",
    help="Draw samples for VBench, VBench-I2V, GenEval and DPG-Bench; read their results.",
)


@app.command
def draw(
    model: str,
    layout: Layout,
    *,
    prompts: Path,
    out: Path,
    images: Path | None = None,
    count: Annotated[int | None, Parameter(name=("--samples", "--count"))] = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Draw the samples of a benchmark where it looks for them; a stopped run goes on.

    Example: ursa benchmark draw models:/ursa@champion vbench --prompts all_dimension.txt --out vb

    Args:
        model: As in `ursa generate`.
        layout: The benchmark.
        prompts: File of its own repository, see docs/evaluation.md.
        out: Directory; samples go to its `samples`, their seeds to `seeds.jsonl`, what they are of
            to `draw.json`. One that holds samples of another model, seed or size is refused.
        images: First frames, of vbench-i2v.
        count: Of each prompt; what the benchmark asks for if left out: 5 clips (25 of prompts that
            VBench lists for temporal_flickering) or 4 pictures.
        height: Pixels; the model's own if left out.
        width: Pixels.
        seed: Decides the seeds of all samples.
        device: Where to run, such as cpu or cuda.

    Raises:
        UrsaError: If a file cannot be read or an argument does not fit.
    """
    if count is not None and count < 1:
        raise ConfigError(f"--samples must be at least 1, got {count}")
    from ursa.evaluation.benchmarks import NamedModel, draw_layout, hash_model, read_prompts
    from ursa.generation import UrsaPipeline
    from ursa.generation.files import find_directory

    asked = read_prompts(layout, prompts, images)
    check_device(device)
    with model_directory(model) as named:
        directory = find_directory(named)
        identity = NamedModel(model, hash_model(directory))
        pipeline = UrsaPipeline.from_pretrained(directory, device=device)
    pipeline.set_progress_bar_config(disable=True)
    defaults = pipeline.defaults
    size = (height or defaults.height, width or defaults.width)
    done = draw_layout(
        pipeline,
        layout,
        asked,
        out,
        model=identity,
        seed=seed,
        count=count,
        size=size,
    )
    for number, path in enumerate(done, 1):
        print_lines(f"{number} of {len(asked)}  {path}")


@app.command
def read(results: Path, layout: Layout, *, as_json: AsJson = False) -> None:
    """Print the scores of a benchmark, with intervals over prompts where it names single samples.

    Example: ursa benchmark read evaluation_results/ursa_eval_results.json vbench

    Args:
        results: What the benchmark has written.
        layout: The benchmark.
        as_json: Print JSON.

    Raises:
        ConfigError: If the file cannot be read or is of another kind.
    """
    from ursa.cli.evaluate import print_measures
    from ursa.evaluation.benchmarks import read_results

    found = read_results(layout, results)
    if as_json:
        print(found.model_dump_json(indent=1, ensure_ascii=True))
        return
    print_measures(found)
