import json
from pathlib import Path

import pytest

from tests import data_roots
from ursa import storage
from ursa.cli import main
from ursa.data.versions import commit_version
from ursa.ingestion import select_clips
from ursa.video.decode import video_info


@pytest.fixture
def ursa(capsys):
    """Run `ursa data`; return exit status and what it printed."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["data", *map(str, arguments)])
        printed = capsys.readouterr()
        return stopped.value.code or 0, printed.out, printed.err

    return run


def test_damage_is_named_and_repaired(root, ursa, monkeypatch):
    status, out, _ = ursa("verify", root.uri, "--media")
    assert status == 0
    assert out.endswith("all is whole\n")
    shard = root.shards()[0]
    data_roots.flip_bit(shard, 40, 6)
    status, out, _ = ursa("verify", root.uri, "--json")
    assert status == 1
    assert [problem["uri"] for problem in json.loads(out)["problems"]] == [str(shard)]
    monkeypatch.setenv("URSA_DATA_URI", root.uri)
    status, out, _ = ursa("verify")
    assert status == 1
    assert f"\n{shard}\n" in out
    assert f"to do: ursa data repair {root.uri}\n\n1 problems" in out
    status, out, _ = ursa("repair", root.uri)
    assert (status, out.splitlines()[-1]) == (0, "1 repaired, 0 left")
    assert f"repaired  {shard}\n" in out
    assert ursa("verify", root.uri)[0] == 0


def test_what_cannot_be_repaired_is_said(root, ursa):
    table = storage.local_path(root.selection.selection_uri)
    table.unlink()
    status, out, _ = ursa("repair", root.uri)
    assert (status, out.splitlines()[-1]) == (1, "0 repaired, 1 left")
    assert f"LEFT  {table}\n" in out
    assert "run the pipeline again" in out


def test_data_are_counted(root, ursa):
    assert json.loads(ursa("stats", root.uri, "--json")[1])["num_kept"] == 4
    out = ursa("stats", root.uri)[1]
    for part in ("rejected: too_dark", "128x96", "video train", "sidecar", "luminance, kept"):
        assert part in out


def test_source_and_version_are_named_and_chosen(records, ursa):
    root, version = records.root, records.versions[1]
    config = data_roots.root_config(selection={"validation_fraction": 0.0})
    clips = root.selection.clips.model_copy(update={"source_uri": "/else", "fingerprint": "e" * 64})
    other = select_clips(clips, config.selection, output_uri=root.uri)
    tokenizers = (version.visual_tokenizer, version.text_tokenizer)
    commit_version(root.uri, config, other, tokenizers, root.datasets, code={})
    sources = {str(root.source): version.number, "/else": 1}
    for command in ("stats", "what-if"):
        for source, number in sources.items():
            lines = ursa(command, root.uri, "--source", source)[1].splitlines()
            assert lines[:2] == [f"source     {source}", f"version    {number}"]
        lines = ursa(command, root.uri, "--selection", other.manifest_uri)[1].splitlines()
        assert lines[:2] == ["source     /else", "version    1"]
        status, _, err = ursa(command, root.uri, "--source", "/gone")
        assert (status, "no version of /gone; there are: /else, " in err) == (1, True)
        status, _, err = ursa(command, root.uri, "--source", "/else", "--selection", "x")
        assert (status, "leave out --source or --selection" in err) == (1, True)
    assert json.loads(ursa("stats", root.uri, "--source", "/else", "--json")[1])["version"] == 1


def test_data_without_a_version_say_so(root, ursa):
    assert "version    none has this selection\n" in ursa("stats", root.uri)[1]


def test_other_thresholds_are_tried(root, ursa):
    off = ("min_luminance", "min_sharpness", "min_motion_px_per_s", "max_black_border_fraction")
    changes = [part for name in off for part in ("--set", f"selection.{name}=null")]
    out = ursa("what-if", root.uri, "--list", *changes)[1]
    assert "1 clips more, 0 clips less" in out
    assert "too_dark file://" in out
    out = ursa("what-if", root.uri, "--set", "selection.min_sharpness=1e9")[1]
    assert "0 clips more, 4 clips less" in out
    assert "file://" not in out


def test_recipes_are_listed_and_tried(root, ursa):
    out = ursa("recipes")[1]
    for part in ("opensora: ", "needs   laion_aesthetic_v2, unimatch_flow", "issues/353"):
        assert part in out
    assert {item["name"] for item in json.loads(ursa("recipes", "--json")[1])} >= {"ursa-basic"}
    out = ursa("what-if", root.uri, "--recipe", "ursa-basic")[1]
    assert "rejected: too_low:clip-file/duration_s" in out
    status, _, err = ursa("what-if", root.uri, "--recipe", "opensora")
    assert status == 1
    assert "unimatch_flow/motion for opensora.1 (there is " in err
    assert "dis-flow-256px/motion_px_per_s" in err


def test_thresholds_that_are_not_set_are_those_of_the_selection(root, ursa):
    """The root was not made by a preset as it is."""
    assert "0 clips more, 0 clips less" in ursa("what-if", root.uri)[1]
    out = ursa("what-if", root.uri, "--set", "selection.split_seed=3")[1]
    assert "0 clips more, 0 clips less" in out


def test_examples_and_a_card_are_written(root, ursa, tmp_path):
    out = ursa("sample", root.uri, "--rejected", "--out", tmp_path / "look")[1]
    assert video_info(Path(out.strip())).num_frames > 0
    assert (tmp_path / "look" / "examples.json").is_file()
    status, out, _ = ursa("card", root.uri, "--out", tmp_path / "card.html")
    assert (status, out) == (0, f"{tmp_path / 'card.html'}\n")
    assert (tmp_path / "card.html").read_text("utf-8").endswith("</html>\n")
    assert ursa("sample", root.uri, "--reason", "blurred", "--out", tmp_path / "none")[1] == (
        "no clip of this kind\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "nowhere"), "nowhere holds no committed clips"),
        (("stats", "nowhere"), "no committed selection at "),
        (("sample", "--out", "x", "--kept", "--reason", "blurred"), "kept clips have no reason"),
        (("card", "--out", "x.txt"), "--out must be a .html in a directory that exists, got x.txt"),
        (("what-if", "--set", "min_sharpness"), "--set takes section.name=value, got"),
        (("what-if", "--set", "selection.sharpness=3"), "did you mean 'min_sharpness'?"),
        (("what-if", "--recipe", "open-sora"), "selection.recipe: Input should be 'cosmos', "),
        (("what-if", "--set", "seed=1", "--set", "seed.x=1"), "seed has a value already"),
        (("verify", "--set", "selection.min_sharpness=[1"), "'[1' is no value"),
    ],
)
def test_a_mistake_is_one_line(ursa, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = ursa(*arguments)
    assert status == 1
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []
