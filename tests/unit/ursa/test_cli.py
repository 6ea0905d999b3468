import os
import signal
import subprocess
import sys

import pytest
import torch

from ursa import storage
from ursa.cli import main
from ursa.config import LoraConfig
from ursa.generation import UrsaPipeline
from ursa.model.adapters import add_adapters, merged_weights, save_adapter
from ursa.model.pretrained import load_transformer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.avi"], "must end in .mp4, .gif or .png, got 'x.avi'"),
        (["--out", "gone/x.mp4"], "there is no directory gone"),
        (["--image", "gone.png"], "there is no file gone.png"),
        (["--num-frames", "6"], "error: --num-frames must be 1 + 4k, got 6"),
        (["--height", "20"], "--height must be divisible by 8, got 20; the nearest are 16 and 24"),
        (["--model", "gone"], "no model at gone: there is no such directory; give one that holds"),
        (["--model", "models:/ursa"], "names no version: give models:/ursa@champion"),
        (["--steps", "0"], "error: --steps must be at least 1; got 0"),
        (["--guidance", "-1"], "error: --guidance must be in [0, 1000]"),
        (["--noise", "0.5"], "--noise is for given frames: give --image or --video"),
        (["--noise", "1", "--image", __file__], "test_cli.py is not an image that can be read"),
        (["--noise", "2", "--window", "5"], "error: --noise must be in [0, 1]; got 2.0"),
        (["--image", __file__, "--out", "x.png"], "a single frame holds what --image gives"),
        (["--image", __file__, "--num-frames", "1"], "a single frame holds what --image gives"),
        (["--given-frames", "5"], "--given-frames is for --video or --window"),
        (["--out", "/"], "--out must end in"),
        (["--guidance", "1e39"], "error: --guidance must be in [0, 1000]"),
        (["--shift", "inf"], "error: --shift must be positive and finite"),
        (["--device", "meta"], "--device meta cannot be used"),
        (["--video", __file__, "--num-frames", "9"], "error: --video: "),
        (["--clock", "entropy", "--steps", "10000"], "error: --clock"),
        (["--motion", "-3"], "error: --motion"),
        (["--given-frames", "3", "--window", "5"], "--given-frames must be 1 + 4k, got 3"),
        (["--num-frames", "0"], "--num-frames must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be from 0 to 2**63 - 1, got -1"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used: "),
        (["--window", "6", "--num-frames", "17"], "--window must be 1 + 4k, got 6; the nearest"),
    ],
)
def test_a_mistake_is_one_line(exported_model, tmp_path, monkeypatch, capsys, arguments, message):
    model = [] if "--model" in arguments else ["--model", exported_model.directory_uri]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "a tree", *model, *arguments])
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert line.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_has_enough_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", "from ursa.cli import main; main(['config'])"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("name", ["x'y", "a/b", "", "a?b", "a@b", "a\\"])
def test_names_that_the_registry_cannot_hold_are_not_asked_for(capsys, name):
    with pytest.raises(SystemExit):
        main(["models", "list", "--name", name])
    assert "MLflow takes no name with / : . % ? @ \\ or quotes" in capsys.readouterr().err


def test_a_directory_cannot_be_written(exported_model, tmp_path, capsys):
    (tmp_path / "x.mp4").mkdir()
    options = ["--model", exported_model.directory_uri, "--out", str(tmp_path / "x.mp4")]
    with pytest.raises(SystemExit):
        main(["generate", "a tree", *options])
    assert "x.mp4 is a directory; name a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "--model", "m", "--steps", "abc"], 'unable to convert "abc" into int'),
        (["generate", "a", "--model", "m", "--bogus", "3"], "Unknown option: --bogus"),
        (["generate", "a", "--model", "m", "--solver", "rk"], "Choose from"),
        (["plan", "--temporal-stride", "0"], "--temporal-stride must be at least 1, got 0"),
        (["plan", "--guidance", "nan"], "--guidance must be at least 0, got nan"),
    ],
)
def test_what_cannot_be_parsed_is_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == (2 if arguments[0] == "generate" else 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert line.startswith("error: ")


def test_an_adapter_is_merged_from_the_command_line(exported_model, tmp_path, capsys):
    base, out = storage.local_path(exported_model.directory_uri), tmp_path / "out"
    network = load_transformer(base / "transformer")
    add_adapters(network, LoraConfig(rank=2), seed=0)
    trained = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    for name, value in trained.items():
        if ".lora_B." in name:
            value.fill_(0.02)
    save_adapter(trained, LoraConfig(rank=2), tmp_path / "adapter", base=None)
    command = ["merge", str(tmp_path / "adapter"), "--model", str(base), "--out", str(out)]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"{out}\n"
    merged = UrsaPipeline.from_pretrained(out).transformer.state_dict()
    for name, value in merged_weights(network.state_dict(), LoraConfig(rank=2)).items():
        torch.testing.assert_close(merged[name], value)
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 1
    assert "out exists; name a directory that does not" in capsys.readouterr().err


def test_a_plan_names_what_adapters_train(capsys):
    options = ["plan", "--preset", "small", "--set", "stages.async_finetune.lora.rank=8"]
    with pytest.raises(SystemExit):
        main([*options, "--stage", "async_finetune"])
    rows = {
        cells[0].strip(): cells[-1].strip()
        for line in capsys.readouterr().out.splitlines()
        if len(cells := line.strip("│").split("│")) > 1
    }
    assert (rows["parameters"], rows["trained"]) == ("1.60 M", "91.14 k")
    with pytest.raises(SystemExit):
        main(options[:3])
    assert "trained" not in capsys.readouterr().out
