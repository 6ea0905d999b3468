"""Checkpoints under a reader and writers that get in each other's way at every operation."""

import contextlib
import random
import shutil
from pathlib import Path

import pytest
import torch

from ursa import storage
from ursa.errors import CheckpointError
from ursa.training.checkpoint import STATE_FILE, _committed, latest_checkpoint, save_checkpoint

PRINT = "f" * 64
OPERATIONS = (
    "list_files",
    "read_bytes",
    "upload_file",
    "commit_record",
    "remove_file",
    "remove_directory",
    "sha256_file",
)


class Interleaving:
    """Lets others act before and after each operation of whoever acts now."""

    def __init__(self, monkeypatch) -> None:
        self.act = lambda: None
        self.inside = False
        for name in OPERATIONS:
            monkeypatch.setattr(storage, name, self.between(getattr(storage, name)))
        # nothing here survives the machine
        monkeypatch.setattr(storage, "_sync_file", lambda _path: None)
        monkeypatch.setattr(storage, "_sync_directory", lambda _path: None)

    def between(self, operation):
        def call(*arguments, **options):
            self.others()
            try:
                return operation(*arguments, **options)
            finally:
                self.others()

        return call

    def others(self) -> None:
        if not self.inside:
            with self.alone():
                self.act()

    @contextlib.contextmanager
    def alone(self):
        self.inside = True
        try:
            yield
        finally:
            self.inside = False


def save(uri, step, keep):
    state = {"weight": torch.full((3,), float(step))}
    return save_checkpoint(
        state, uri, step=step, num_samples_seen=step, fingerprint=PRINT, keep=keep
    )


def contents(root):
    return {
        path: path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.endswith(".tmp")
    }


@pytest.fixture
def interleaving(monkeypatch):
    return Interleaving(monkeypatch)


class Party:
    """Writers and readers of one stage; every reader checks what it finds."""

    def __init__(self, root: Path, draw: random.Random) -> None:
        self.root, self.uri, self.draw = root, str(root), draw
        self.keep = draw.randint(1, 3)
        self.step = 0
        self.begun = 0
        self.known: dict[Path, bytes] = {}

    def write(self) -> None:
        # sometimes two runs commit the same step
        self.begun += self.draw.random() < 0.8 or self.begun == 0
        step = self.begun
        save(self.uri, step, self.keep)
        self.step = max(self.step, step)
        self.known |= contents(self.root)

    def read(self) -> None:
        committed = self.step
        found = latest_checkpoint(self.uri, fingerprint=PRINT)
        assert found is not None
        _, marker, state = found
        assert marker.step >= committed
        assert torch.equal(state["weight"], torch.full((3,), float(marker.step)))
        self.look()

    def look(self) -> None:
        now = contents(self.root)
        assert all(self.known.get(path, data) == data for path, data in now.items()), "overwritten"
        self.known |= now


def play(interleaving: Interleaving, root: Path, seed: int) -> None:
    draw = random.Random(seed)
    party = Party(root, draw)
    with interleaving.alone():
        party.write()
    for _ in range(3):
        outer, inner = draw.choice(
            [(party.read, party.write), (party.write, party.read), (party.write, party.write)]
        )
        times, likely = iter(range(draw.randint(1, 3))), draw.random() / 2

        def act(inner=inner, times=times, likely=likely):
            if draw.random() < likely and next(times, None) is not None:
                inner()

        interleaving.act = act
        outer()
    interleaving.act = lambda: None
    party.write()
    party.look()
    assert len({number for _, number in _committed(party.uri)}) <= party.keep
    shutil.rmtree(root)


@pytest.mark.parametrize(
    "seeds", [range(100), pytest.param(range(100, 1000), marks=pytest.mark.slow)]
)
def test_a_reader_always_finds_the_newest_and_nothing_is_overwritten(interleaving, tmp_path, seeds):
    for seed in seeds:
        play(interleaving, tmp_path / str(seed), seed)


@pytest.mark.parametrize("seed", range(5))
def test_no_whole_checkpoint_goes_before_a_newer_one_was_read_back(tmp_path, monkeypatch, seed):
    """A store that cuts short what it is given never costs the last good one."""
    draw, uri, good = random.Random(seed), str(tmp_path), 1
    save(uri, 1, 1)
    upload, cut = storage.upload_file, False

    def upload_file(path, target):
        upload(path, target)
        if cut:
            place = storage.local_path(target)
            data = place.read_bytes()
            place.write_bytes(data[: draw.randrange(len(data))])

    monkeypatch.setattr(storage, "upload_file", upload_file)
    for step in range(2, 12):
        cut = draw.random() < 0.5
        if cut:
            with pytest.raises(CheckpointError, match=f"{STATE_FILE} was written and read back"):
                save(uri, step, 1)
        else:
            save(uri, step, 1)
            good = step
        found = latest_checkpoint(uri, fingerprint=PRINT)
        assert found is not None
        assert found[1].step == good
