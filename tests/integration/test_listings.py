"""What a source held when a run listed it, and what it holds when the run commits."""

import pytest

from tasks import versions as version_task
from tasks.context import RunContext, list_source
from tasks.settings import RuntimeSettings
from tasks.tracking import TrackedRun
from tests import data_roots, factories, media
from ursa.data import versions
from ursa.errors import ConfigError, DataError

CONFIG = data_roots.root_config(tokenization={"clips_per_shard": 4})


def save(folder, seed):
    frames = media.panning(36, step=2, height=96, width=128, seed=seed)
    return media.save_video(folder / f"v{seed}.mp4", frames, 24.0)


@pytest.fixture
def source(tmp_path, monkeypatch):
    folder = tmp_path / "videos"
    folder.mkdir()
    for seed in range(3):
        save(folder, seed)
    monkeypatch.setenv("URSA_DATA_URI", str(tmp_path / "data"))
    return folder


def begin(source, data_uri):
    """What a run knows from its start on."""
    newest = versions.newest_version(data_uri, str(source))
    listing = list_source(str(source), CONFIG, RuntimeSettings.from_env())
    return RunContext(
        source_uri=listing.source_uri,
        data_uri=data_uri,
        preset="tiny",
        config=CONFIG,
        sources_uri=listing.manifest_uri,
        source_fingerprint=listing.fingerprint,
        newest_version=0 if newest is None else newest.number,
        start=None,
        fingerprint="f" * 64,
        run=TrackedRun(tracking_uri="", experiment_id="1", run_id="r", spool_uri=""),
    )


def test_a_slow_run_does_not_bring_back_what_was_removed(source, tmp_path):
    data_uri = str(tmp_path / "data")
    tokenizer = factories.write_visual_tokenizer(str(tmp_path / "tokenizer"))
    slow = begin(source, data_uri)
    version_task._refuse_old_listing(slow)
    other = begin(source, data_uri)
    (source / "v2.mp4").unlink()
    root = data_roots.prepare(source, data_uri, CONFIG, tokenizer)
    datasets = root.datasets
    versions.commit_version(
        data_uri, CONFIG, root.selection, (tokenizer, tokenizer), datasets, code={}
    )
    with pytest.raises(DataError, match=r"another run has committed version 1 .* run again"):
        version_task._refuse_old_listing(slow)
    # the file is back: what that run has listed is what there is
    save(source, 2)
    version_task._refuse_old_listing(other)
    # and a change alone, which no other run has seen, is left to the next run
    (source / "v1.mp4").unlink()
    version_task._refuse_old_listing(slow.model_copy(update={"newest_version": 1}))


@pytest.mark.parametrize("name", ["", "data", "a/data"])
def test_a_data_root_inside_the_source_is_refused(source, monkeypatch, name):
    monkeypatch.setenv("URSA_DATA_URI", str(source / name))
    with pytest.raises(ConfigError, match="is inside the source"):
        list_source(str(source), CONFIG, RuntimeSettings.from_env())


@pytest.mark.parametrize("name", [".ursa/data", "../data", "../videos-data"])
def test_a_hidden_data_root_and_one_beside_the_source_are_not(source, monkeypatch, name):
    monkeypatch.setenv("URSA_DATA_URI", str(source / name))
    assert len(list_source(str(source), CONFIG, RuntimeSettings.from_env()).sources) == 3
