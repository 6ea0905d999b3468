import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests import media
from ursa.cli import main
from ursa.data.addresses import address_seed
from ursa.errors import ConfigError
from ursa.evaluation.benchmarks import (
    SEEDS_FILE,
    Asked,
    NamedModel,
    draw_layout,
    hash_model,
    read_prompts,
    read_results,
)
from ursa.generation import UrsaPipeline
from ursa.video.decode import video_info

PROMPTS = ("In a still frame, a stop sign", "a toilet, frozen in time")


@pytest.fixture(scope="module")
def pipeline(exported_model):
    found = UrsaPipeline.from_pretrained(exported_model.directory_uri)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def vbench_prompts(tmp_path):
    path = tmp_path / "all_dimension.txt"
    path.write_text(f"{PROMPTS[0]}\n{PROMPTS[1]}\n\n{PROMPTS[0]}\n")
    return path


def draw(*arguments, model_sha256="m", **options):
    return draw_layout(*arguments, model=NamedModel("models:/m/1", model_sha256), **options)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_vbench_finds_five_clips_of_each_prompt(pipeline, vbench_prompts, tmp_path):
    asked = read_prompts("vbench", vbench_prompts)
    out = tmp_path / "out"
    assert len(list(draw(pipeline, "vbench", asked, out))) == 2
    names = [f"{prompt}-{index}.mp4" for prompt in PROMPTS for index in range(5)]
    assert files(out / "samples") == sorted(names)
    info = video_info(out / "samples" / names[0])
    assert (info.num_frames, info.fps) == (5, pipeline.defaults.fps)
    lines = (out / SEEDS_FILE).read_text().splitlines()
    assert len({json.loads(line)["seed"] for line in lines}) == 10


def test_a_stopped_run_goes_on_and_ends_the_same(pipeline, vbench_prompts, tmp_path):
    asked = read_prompts("vbench", vbench_prompts)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    list(draw(pipeline, "vbench", asked, whole, count=2))
    next(draw(pipeline, "vbench", asked, stopped, count=2))
    first = stopped / "samples" / f"{PROMPTS[0]}-0.mp4"
    written = first.stat().st_mtime_ns
    list(draw(pipeline, "vbench", asked, stopped, count=2))
    assert first.stat().st_mtime_ns == written
    assert files(stopped) == files(whole)
    for name in files(whole):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "model_sha256", "said"),
    [
        ({"seed": 1}, "m", "seed (0, now 1);"),
        ({"size": (16, 24)}, "m", "height (48, now 16), width (64, now 24);"),
        ({}, "n", "in the model;"),
        ({"asked": (Asked("a hen", "a hen"),)}, "m", "in the prompts or first frames;"),
        ({"steps": 3}, "m", "num_inference_steps (2, now 3);"),
    ],
)
def test_samples_of_two_draws_are_not_mixed(
    exported_model, pipeline, tmp_path, changes, model_sha256, said
):
    changes = dict(changes)
    steps, asked = changes.pop("steps", 2), changes.pop("asked", (Asked("a boat", "a boat"),))
    other = UrsaPipeline.from_pretrained(exported_model.directory_uri)
    other.set_progress_bar_config(disable=True)
    out = tmp_path / "out"
    first = {"count": 1, "size": (48, 64)}
    other.defaults = pipeline.defaults.model_copy(update={"num_inference_steps": 2})
    list(draw(other, "vbench", (Asked("a boat", "a boat"),), out, **first))
    before = {name: (out / name).read_bytes() for name in files(out)}
    assert set(before) == {"draw.json", "samples/a boat-0.mp4", "seeds.jsonl"}
    other.defaults = pipeline.defaults.model_copy(update={"num_inference_steps": steps})
    with pytest.raises(ConfigError) as refused:
        list(draw(other, "vbench", asked, out, model_sha256=model_sha256, **(first | changes)))
    assert said in str(refused.value)
    assert "give another --out" in str(refused.value)
    assert {name: (out / name).read_bytes() for name in files(out)} == before


def test_a_draw_goes_on_with_more_or_fewer_samples(pipeline, tmp_path):
    out, asked = tmp_path / "out", (Asked("a boat", "a boat"),)
    seeds = []
    for count in (1, 3, 2):
        list(draw(pipeline, "vbench", asked, out, count=count))
        lines = [json.loads(line) for line in (out / SEEDS_FILE).read_text().splitlines()]
        seeds.append([(line["index"], line["seed"]) for line in lines])
    assert len(files(out / "samples")) == 3
    assert seeds[1] == seeds[2]
    assert seeds[1][:1] == seeds[0]


def test_samples_of_which_nothing_is_known_are_left_alone(pipeline, tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "a boat-0.mp4").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"no draw.json beside it says what they are of"):
        list(draw(pipeline, "vbench", (Asked("a boat", "a boat"),), tmp_path, count=1))
    (tmp_path / "draw.json").write_text("{")
    with pytest.raises(ConfigError, match=r"draw.json cannot be read"):
        list(draw(pipeline, "vbench", (Asked("a boat", "a boat"),), tmp_path, count=1))
    assert files(tmp_path) == ["draw.json", "samples/a boat-0.mp4"]


def test_a_model_is_the_same_wherever_it_lies(exported_model, tmp_path):
    from ursa import storage

    copy = tmp_path / "copy"
    shutil.copytree(storage.local_path(exported_model.directory_uri), copy)
    before = hash_model(storage.local_path(exported_model.directory_uri))
    (copy / "README.md").write_text("for readers")
    assert hash_model(copy) == before
    weights = next((copy / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\7")
    assert hash_model(copy) != before


def test_the_full_list_of_vbench_says_what_flickering_is_measured_on(pipeline, tmp_path):
    """25 samples of a prompt, as few are left after its filter; the seeds stay what they are."""
    path = tmp_path / "VBench_full_info.json"
    entries = [
        {"prompt_en": "a red bus", "dimension": ["color"]},
        {"prompt_en": "a stop sign", "dimension": ["temporal_flickering", "color"]},
        {"prompt_en": "a stop sign", "dimension": ["color"]},
    ]
    path.write_text(json.dumps(entries))
    asked = read_prompts("vbench", path)
    assert [(item.prompt, item.samples) for item in asked] == [
        ("a red bus", None),
        ("a stop sign", 25),
    ]
    listed = tmp_path / "temporal_flickering.txt"
    listed.write_text("a stop sign\n")
    assert [item.samples for item in read_prompts("vbench", listed)] == [25]

    list(draw(pipeline, "vbench", asked, tmp_path / "out", size=(16, 16)))
    names = [f"a stop sign-{index}.mp4" for index in range(25)]
    names += [f"a red bus-{index}.mp4" for index in range(5)]
    assert files(tmp_path / "out" / "samples") == sorted(names)
    lines = map(json.loads, (tmp_path / "out" / SEEDS_FILE).read_text().splitlines())
    seeds = {(line["name"], line["index"]): line["seed"] for line in lines}
    assert seeds["a stop sign", 4] == address_seed(0, "vbench", "a stop sign", "4")
    assert len(set(seeds.values())) == 30
    list(draw(pipeline, "vbench", asked, tmp_path / "few", count=1, size=(16, 16)))
    assert files(tmp_path / "few" / "samples") == ["a red bus-0.mp4", "a stop sign-0.mp4"]


def test_vbench_i2v_begins_with_its_images(pipeline, tmp_path):
    images = tmp_path / "16-9"
    images.mkdir()
    Image.fromarray(media.still(1, height=48, width=64)[0]).save(images / "a boat.jpg")
    path = tmp_path / "vbench2_i2v_full_info.json"
    path.write_text(
        json.dumps([{"prompt_en": "a boat, camera pans left", "image_name": "a boat.jpg"}])
    )
    (asked,) = read_prompts("vbench-i2v", path, images)
    assert asked.image == images / "a boat.jpg"
    list(draw(pipeline, "vbench-i2v", [asked], tmp_path / "out", count=1))
    assert files(tmp_path / "out" / "samples") == ["a boat, camera pans left-0.mp4"]
    with pytest.raises(ConfigError, match="--images is for vbench-i2v"):
        read_prompts("vbench-i2v", path)
    (images / "a boat.jpg").unlink()
    with pytest.raises(ConfigError, match="there is no file"):
        read_prompts("vbench-i2v", path, images)


def test_geneval_finds_its_line_beside_four_pictures(pipeline, tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    lines = [json.dumps({"tag": "single_object", "prompt": f"a photo of {x}"}) for x in "ab"]
    path.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    list(draw(pipeline, "geneval", read_prompts("geneval", path), out, size=(16, 24)))
    pictures = [f"samples/{index:04d}.png" for index in range(4)]
    expected = [f"{place:05d}/{name}" for place in (0, 1) for name in ("metadata.jsonl", *pictures)]
    assert files(out / "samples") == expected
    assert (out / "samples" / "00001" / "metadata.jsonl").read_text() == f"{lines[1]}\n"
    with Image.open(out / "samples" / "00000" / "samples" / "0003.png") as picture:
        assert picture.size == (24, 16)


def test_dpg_finds_four_pictures_in_one(pipeline, tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "12.txt").write_text("A long and dense prompt.\n")
    asked = read_prompts("dpg", folder)
    assert [(item.name, item.prompt) for item in asked] == [("12", "A long and dense prompt.")]
    listed = tmp_path / "prompts.json"
    listed.write_text(json.dumps([{"id": "12", "prompt": "A long and dense prompt."}]))
    assert read_prompts("dpg", listed) == asked
    out = tmp_path / "out"
    list(draw(pipeline, "dpg", asked, out, size=(16, 16)))
    assert files(out / "samples") == ["12.png"]
    with Image.open(out / "samples" / "12.png") as picture:
        assert picture.size == (32, 32)
        quarters = np.asarray(picture).reshape(2, 16, 2, 16, 3).transpose(0, 2, 1, 3, 4)
    assert len({quarter.tobytes() for quarter in quarters.reshape(4, -1)}) == 4
    with pytest.raises(ConfigError, match="four square pictures"):
        list(draw(pipeline, "dpg", asked, out, size=(16, 24)))


@pytest.mark.parametrize(
    ("layout", "text", "message"),
    [
        ("vbench", "", "holds no prompt"),
        ("vbench", "a/b\n", "cannot be the name of a file"),
        ("vbench", "a" * 300, "cannot be the name of a file"),
        ("geneval", "no json\n", "does not hold the prompts of geneval"),
        ("dpg", '[{"id": "1"}]', "does not hold the prompts of dpg"),
        ("dpg", '[{"id": "1", "prompt": null}]', "0.prompt: Input should be a valid string"),
        ("geneval", '{"prompt": 1}', "does not hold the prompts of geneval"),
        *(
            ("vbench", text, "does not hold the prompts of vbench")
            for text in ('{"a": 1}', '["a"]', "1", '[{"prompt_en": 1}]', "[" * 3000, "1" * 5000)
        ),
    ],
)
def test_prompts_that_cannot_be_used_are_named(layout, text, message, tmp_path):
    path = tmp_path / ("prompts.json" if text[:1] in {"{", "[", "1"} else "prompts.txt")
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_prompts(layout, path)


def test_scores_of_vbench_have_intervals_over_prompts(tmp_path):
    scores = np.linspace(0.5, 0.9, 20)
    videos = [
        {"video_path": f"/samples/prompt {number // 2}-{number % 2}.mp4", "video_results": score}
        for number, score in enumerate(scores)
    ]
    path = tmp_path / "ursa_eval_results.json"
    found = {
        "motion_smoothness": [float(scores.mean()), videos],
        "imaging_quality": [0.4, [{**videos[0], "video_results": 40.0}]],
        "color": [0.25, []],
    }
    path.write_text(json.dumps(found))
    measures = {item.metric: item for item in read_results("vbench", path).measures}
    assert set(measures) == {f"vbench_{name}" for name in found}
    smooth = measures["vbench_motion_smoothness"]
    assert smooth.value == pytest.approx(0.7)
    assert smooth.low < smooth.value < smooth.high
    # what is no mean of its samples has the benchmark's own value, without an interval
    assert (measures["vbench_imaging_quality"].value, measures["vbench_color"].value) == (0.4, 0.25)
    assert measures["vbench_imaging_quality"].low is None
    (groups,) = {group.name: group for group in read_results("vbench", path).cases}.values()
    assert (groups.unit, len(set(groups.units))) == ("prompt", 10)


def test_score_of_geneval_is_the_mean_over_tasks(tmp_path):
    rows = [
        {
            "filename": f"{tag}/{prompt}/{sample}.png",
            "tag": tag,
            "correct": prompt < right,
            "metadata": json.dumps({"tag": tag, "prompt": prompt}),
        }
        for tag, num_prompts, right in (("counting", 10, 2), ("colors", 20, 10))
        for prompt in range(num_prompts)
        for sample in range(4)
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    measures = {item.metric: item for item in read_results("geneval", path).measures}
    assert measures["geneval_counting"].value == pytest.approx(0.2)
    assert measures["geneval_colors"].value == pytest.approx(0.5)
    overall = measures["geneval_overall"]
    assert overall.value == pytest.approx(0.35)
    assert overall.low < overall.value < overall.high


def test_score_of_dpg_is_the_mean_over_pictures(tmp_path):
    lines = [f"/out/{name}.png, 0.5, 1.0, {score}" for name, score in (("1", 0.75), ("a, b", 0.25))]
    path = tmp_path / "dpg-bench_results.txt"
    path.write_text("\n".join([*lines, "Model: out", "DPG-Bench score: 50.0"]) + "\n")
    (score,) = read_results("dpg", path).measures
    assert (score.metric, score.value) == ("dpg_score", 50.0)


@pytest.mark.parametrize("layout", ["vbench", "geneval", "dpg"])
def test_other_files_are_refused(layout, tmp_path):
    path = tmp_path / "results"
    path.write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match="is no result file"):
        read_results(layout, path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_results(layout, tmp_path / "missing")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"a": [NaN]}',
        "null",
        '{"color": 0.5}',
        '{"color": "0.5"}',
        '{"color": [[1]]}',
        '{"color": [0.5, [{"video_results": 0.5}]]}',
        '{"color": [1' + 400 * "0" + "]}",
        "[" * 3000,
    ],
)
@pytest.mark.parametrize("layout", ["vbench", "vbench-i2v", "geneval"])
def test_results_of_another_shape_are_refused(layout, text, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"is no result file of {layout} "):
        read_results(layout, path)


def test_the_commands_draw_and_read(exported_model, tmp_path, capsys):
    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(["benchmark", *arguments])
        return ended.value.code

    prompts, out = tmp_path / "all_dimension.txt", tmp_path / "out"
    prompts.write_text("a boat\n")
    drawing = ["draw", exported_model.directory_uri, "vbench", "--prompts", str(prompts)]
    assert run(*drawing, "--out", str(out), "--count", "1") == 0
    assert files(out / "samples") == ["a boat-0.mp4"]
    assert run(*drawing, "--out", str(out), "--samples", "1", "--seed", "1") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {out}/samples holds samples of {exported_model.directory_uri} ")
    assert "seed (0, now 1); give another --out" in line
    results = tmp_path / "ursa_eval_results.json"
    results.write_text(json.dumps({"color": [0.25, []]}))
    capsys.readouterr()
    assert run("read", str(results), "vbench") == 0
    assert "vbench_color" in capsys.readouterr().out
    assert run(*drawing, "--out", str(out), "--count", "0") == 1
    assert "--samples must be at least 1" in capsys.readouterr().err
