import re

import numpy as np
import pytest
import torch

from tests import media
from tests.bench import ablation, ablation_runs
from tests.bench.ablation_runs import UnitResult
from ursa.diffusion.path import MaskedPath, MixturePath


def test_clips_are_divided_into_folds_of_about_as_many_windows():
    counts = {"a": 138, "b": 122, "c": 98, "d": 82, "e": 58, "f": 52, "g": 44, "h": 8}
    folds = ablation_runs.divide_clips(counts, 3)
    assert sorted(clip for fold in folds for clip in fold) == sorted(counts)
    sizes = [sum(counts[clip] for clip in fold) for fold in folds]
    assert max(sizes) - min(sizes) < 60
    assert ablation_runs.divide_clips(dict(reversed(counts.items())), 3) == folds


def test_the_first_weights_are_the_same_whatever_the_path(make_request):
    request = make_request()
    size = request.visual_tokenizer.vocab_size
    plain = ablation_runs.first_model(request, MixturePath(size))
    masked = ablation_runs.first_model(request, MaskedPath(size))
    names = {name for name, _ in plain.named_parameters()}
    for name, value in masked.named_parameters():
        names.discard(name)
        known = dict(plain.named_parameters())[name]
        if name == "model.embed_tokens.weight":
            assert len(value) == len(known) + 1
            assert value.requires_grad
        assert torch.equal(value[: len(known)], known), name
    assert not names
    text = torch.zeros(1, 4, dtype=torch.int64)
    codes = torch.full((1, 2, 2, 3), size)
    assert masked(text, codes).shape[-1] == size


def unit(model, seed, values, clips=None):
    return UnitResult(
        arm="metric",
        seed=seed,
        values={f"{model}/{key}": value for key, value in values.items()},
        by_clip={f"{model}/{key}": found for key, found in (clips or {}).items()},
        seconds={},
    )


def test_differences_are_paired_by_clip_or_else_by_seed():
    results = ablation.Results(
        [
            unit("one", 0, {"energy": 5.0, "x": 0.5}, {"x": {"a": 0.2, "b": 0.8}}),
            unit("one", 1, {"energy": 9.0, "x": 0.5}, {"x": {"c": 0.5}}),
            # another seed holds out the same clip
            unit("one", 2, {"energy": 1.0, "x": 0.4}, {"x": {"a": 0.4}}),
            unit("two", 0, {"energy": 4.0, "x": 0.4}, {"x": {"a": 0.1, "b": 0.7}}),
            unit("two", 1, {"energy": 7.0, "x": 0.6}, {"x": {"c": 0.6}}),
        ]
    )
    mean, error, count = results.difference("one", "two", "x")
    changes = [0.3 - 0.1, 0.8 - 0.7, 0.5 - 0.6]
    assert (mean, count) == (pytest.approx(np.mean(changes)), 3)
    assert error == pytest.approx(np.std(changes, ddof=1) / 3**0.5)
    mean, error, count = results.difference("one", "two", "energy")
    assert (mean, error, count) == (1.5, pytest.approx(0.5), 2)
    assert results.difference("one", "two", "missing") is None
    assert results.difference_cell("one", "two", "energy", 1) == "**+1.5 ± 0.5**"
    assert results.difference_cell("one", "two", "x", 2).startswith("+0.07")
    assert results.cell("one/energy", 1) == "5.0 ± 4.0"


@pytest.mark.parametrize(
    ("asynchronous", "verdict"),
    [((0.6, 0.71, 0.5), "better"), ((0.1, 0.22, 0.0), "worse"), ((0.4, 0.4, 0.4), "no different")],
)
def test_the_verdict_needs_two_standard_errors(asynchronous, verdict):
    clips = ("a", "b", "c")
    parts = {"synchronous": (0.4, 0.5, 0.3), "asynchronous": asynchronous}
    results = ablation.Results(
        unit(name, 0, {}, {"grid_i2v_accuracy": dict(zip(clips, values, strict=True))})
        for name, values in parts.items()
    )
    (line,) = ablation.verdicts(results)
    assert line.endswith(f"over 3 clips: {verdict}")


def test_the_report_replaces_what_stood_between_its_marks(tmp_path):
    docs, folder = tmp_path / "docs", tmp_path / "report"
    (docs / "images").mkdir(parents=True)
    folder.mkdir()
    (folder / "ablation-x.png").write_bytes(b"new")
    page = docs / "results.md"
    page.write_text(f"# Before\n{ablation.BEGIN}\nold\n{ablation.END}\nAfter\n")
    for text in ("first", "second"):
        ablation.write_docs(text, folder, docs)
    assert page.read_text() == (f"# Before\n{ablation.BEGIN}\n\nsecond\n\n{ablation.END}\nAfter\n")
    assert (docs / "images" / "ablation-x.png").read_bytes() == b"new"


@pytest.mark.slow
def test_a_quick_ablation_from_videos_to_a_report(tmp_path, capsys, monkeypatch):
    source = tmp_path / "videos"
    source.mkdir()
    for number in range(4):
        frames = media.panning(48, step=2, height=96, width=128, seed=number)
        media.save_video(source / f"{number}.mp4", frames, 24.0)
    monkeypatch.delenv("URSA_MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    arguments = ["--quick", "--source", str(source), "--data", str(tmp_path / "data")]
    arguments += ["--seeds", "1", "--workers", "2"]
    with pytest.raises(SystemExit, match="no unit is done"):
        ablation.main([*arguments, "--arms", "masked", "--minutes", "0"])
    assert "1 of 1 units are left" in capsys.readouterr().out
    ablation.main([*arguments, "--arms", "metric"])
    assert "metric, seed 0: " in capsys.readouterr().out
    ablation.main([*arguments, "--arms", "long", "metric", "masked"])
    second = capsys.readouterr().out
    for name in ("masked", "long", *ablation_runs.TUNINGS):
        assert f"{name}, seed 0: " in second
    assert "metric, seed 0: " not in second
    folder = tmp_path / "data" / "ablation" / "report"
    text = (folder / "report.md").read_text("utf-8")
    assert text in second
    rows = [line for line in text.splitlines() if line.startswith("| masked | ")]
    assert [row.split(" | ")[1] for row in rows] == ["2", "4"]
    numbers = [float(cell) for row in rows for cell in re.findall(r"-?\d+\.\d+", row)]
    assert np.isfinite(numbers).all()
    for name in ("paths", "tuning"):
        assert (folder / f"ablation-{name}.png").stat().st_size > 10_000
