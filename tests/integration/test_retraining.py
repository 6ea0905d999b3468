"""When a retraining trains, and what it goes on from, with a real registry and real files."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from tasks import model_registry, releases
from tasks.context import list_source, start_run
from tasks.options import ConfigOverrides
from tasks.retraining import NETWORK_TAG, NewData, compare_new_clips, look_for_new_data
from tasks.settings import RuntimeSettings
from tests import factories, media
from ursa import storage
from ursa.artifacts import ClipSelection, VideoInfo
from ursa.config import load_config
from ursa.sources.committed import SourceListing, commit_listing

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # MLflow warns about its own imports


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without runs; making one takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def client(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts
    address = f"sqlite:///{shutil.copy(database, tmp_path)}"
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "URSA_MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(variable, address)
    monkeypatch.setenv("URSA_DATA_URI", str(tmp_path / "data"))
    return MlflowClient(address)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a", "b"):
        add(folder, name)
    return folder


def add(folder: Path, name: str) -> Path:
    frames = media.panning(12, step=2, height=48, width=64, seed=ord(name))
    return media.save_video(folder / f"{name}.mp4", frames, 12.0)


def register(client: MlflowClient, source: Path, **tags: str) -> str:
    """Register a version of what is at the source now; return its number."""
    settings = RuntimeSettings.from_env()
    listing: SourceListing = list_source(str(source), load_config("tiny"), settings)
    commit_listing(listing)
    if not client.search_registered_models():
        client.create_registered_model("ursa")
    values = {
        "ursa.aliased": "true",
        "ursa.source_uri": listing.source_uri,
        "ursa.source_fingerprint": listing.fingerprint,
        "ursa.model_directory": "/models/one",
        "ursa.tokens": "/tokens/one.json",
        NETWORK_TAG: "n",
        **tags,
    }
    version = client.create_model_version("ursa", "/models/one", tags=values)
    return str(version.version)


def look(source: Path, **retraining: Any) -> NewData:
    overrides = ConfigOverrides.model_validate({"retraining": retraining}) if retraining else None
    found: NewData = look_for_new_data.fn(str(source), "tiny", overrides)
    return found


def test_without_a_version_all_stages_are_trained(client, source):
    assert look(source) == NewData()


def test_the_same_files_are_nothing_new(client, source):
    register(client, source)
    assert look(source).refusal == f"no new data at {source}"


def test_files_that_could_not_be_read_the_last_time_are_looked_at_again(client, source):
    register(client, source, **{model_registry.FINGERPRINT_TAG: model_registry.UNFINISHED})
    assert look(source).refusal is None


def test_sources_that_feed_one_model_do_not_make_each_other_new(client, source, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    add(other, "x")
    for folder in (source, other):
        register(client, folder)
    for folder in (source, other):
        assert "no new data at" in (look(folder).refusal or "")
    add(other, "z")
    assert look(other).refusal is None


def test_content_counts_not_names(client, source):
    register(client, source)
    (source / "a.mp4").rename(source / "z.mp4")
    assert look(source).refusal.startswith(
        f"0 files of new content at {source}, retraining.min_new"
    )
    (source / "b.mp4").unlink()
    assert look(source).refusal.startswith("0 files of new content")
    add(source, "c")
    assert look(source).refusal is None


def test_too_few_new_files_wait_for_more(client, source):
    register(client, source)
    add(source, "c")
    assert look(source, min_new_files=2).refusal == (
        f"1 files of new content at {source}, retraining.min_new_files is 2"
    )
    add(source, "d")
    assert look(source, min_new_files=2).refusal is None


def test_it_goes_on_from_the_champion_not_the_newest(client, source):
    number = register(client, source)
    client.set_registered_model_alias("ursa", "champion", number)
    register(client, source, **{"ursa.model_directory": "/models/two"})
    add(source, "c")
    start = look(source).start
    assert start is not None
    assert (start.model_uri, start.directory_uri) == ("models:/ursa/1", "/models/one")
    assert look(source, start="scratch") == NewData()


def test_it_goes_on_from_the_one_before_a_champion_that_was_deleted(client, source, tmp_path):
    registry = releases.Registry(client, "ursa", str(tmp_path / "data"), "a test")
    for directory in ("/models/one", "/models/two"):
        number = register(client, source, **{"ursa.model_directory": directory})
        releases.promote(registry, number, "a reason")
    client.delete_model_version("ursa", number)
    assert look(source).refusal  # nothing new: nothing is touched
    assert releases.lost_champion(registry) == ("2", "1")
    add(source, "c")
    start = look(source).start
    assert start is not None
    assert start.directory_uri == "/models/one"
    assert releases.aliases(client, "ursa")["champion"] == "1"


def test_it_does_not_go_on_from_what_is_taken_down(client, source, tmp_path):
    registry = releases.Registry(client, "ursa", str(tmp_path / "data"), "a test")
    started = {releases.STARTED_FROM_TAG: "models:/ursa/1"}
    for tags in ({}, started):  # the second began with the weights of the first
        releases.promote(registry, register(client, source, **tags), "a reason")
    add(source, "c")
    assert look(source).start is not None
    client.set_model_version_tag("ursa", "1", releases.TAKEDOWN_TAG, "a.mp4: on request")
    assert look(source) == NewData()


def test_without_a_champion_that_can_be_gone_on_from_all_stages_are_trained(client, source):
    number = register(client, source)
    add(source, "c")
    assert look(source) == NewData()
    client.set_registered_model_alias("ursa", "champion", number)
    client.delete_model_version_tag("ursa", number, NETWORK_TAG)
    assert look(source) == NewData()


INFO = VideoInfo(width_px=64, height_px=48, fps=12.0, num_frames=18, duration_s=1.5, codec="h264")


def select(folder: Path, *files: tuple[str, float]) -> ClipSelection:
    """Commit a selection of one clip a file, of that name and sharpness."""
    folder.mkdir()
    clips = []
    for name, sharpness in files:
        path = folder / name
        path.write_text(name)
        clip = factories.clip_of(path, caption="a tree", info=INFO)
        scores = clip.scores.model_copy(update={"sharpness": sharpness})
        clips.append(clip.model_copy(update={"scores": scores}))
    selection = factories.commit_selection(str(folder), clips)
    return storage.commit_record(selection.manifest_uri, selection)


def numbered(begin: str, *values: float) -> list[tuple[str, float]]:
    return [(f"{begin}{i}", value) for i, value in enumerate(values)]


KNOWN = numbered("known", *range(20))


@pytest.mark.parametrize(
    ("new", "min_drift", "refusal"),
    [
        (numbered("new", *[50.0] * 20), 0.2, None),
        (numbered("new", *range(20)), None, None),
        (
            numbered("new", *range(20)),
            0.2,
            "20 new clips of 20 files at SOURCE are like those of the champion: no score differs, "
            "retraining.min_drift is 0.2",
        ),
        (
            numbered("new", *[50.0] * 20),
            1.0,
            "20 new clips of 20 files at SOURCE are like those of the champion: what differs most "
            "is sharpness: 0.793, retraining.min_drift is 1",
        ),
        ([], None, "no clip of the new files at SOURCE is kept"),
    ],
)
def test_clips_like_those_of_the_champion_are_no_new_data(
    client, source, tmp_path, new, min_drift, refusal
):
    reference = select(tmp_path / "reference", *KNOWN)
    number = register(client, source, **{"ursa.selection": reference.manifest_uri})
    client.set_registered_model_alias("ursa", "champion", number)
    add(source, "c")
    overrides = ConfigOverrides.model_validate({"retraining": {"min_drift": min_drift}})
    found = look(source, min_drift=min_drift)
    assert (found.refusal, found.reference_uri) == (None, reference.manifest_uri)

    context = start_run.fn(str(source), "tiny", overrides, found.start)
    selection = select(tmp_path / "selection", *KNOWN, *new)
    answer = compare_new_clips.fn(context, selection, found.reference_uri)
    # the same files again: nothing has to be measured to know it
    again = look(source, min_drift=min_drift)
    assert again.refusal == answer
    if refusal is None:
        assert answer is None
    else:
        assert answer == refusal.replace("SOURCE", str(source))
        run = client.get_run(context.run.run_id)
        assert run.data.tags["mlflow.note.content"] == answer
    (child,) = client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{context.run.run_id}'")
    assert {key for key in child.data.metrics if key.startswith("drift/")} >= (
        {"drift/sharpness", "drift/caption_words"} if new else set()
    )


def test_the_threshold_decides_anew_on_what_was_measured(client, source, tmp_path):
    reference = select(tmp_path / "reference", *KNOWN)
    number = register(client, source, **{"ursa.selection": reference.manifest_uri})
    client.set_registered_model_alias("ursa", "champion", number)
    add(source, "c")
    context = start_run.fn(str(source), "tiny", None, None)
    selection = select(tmp_path / "selection", *KNOWN, *numbered("new", *[50.0] * 20))
    assert compare_new_clips.fn(context, selection, reference.manifest_uri) is None
    assert look(source, min_drift=0.5).refusal is None
    assert look(source).refusal is None
    assert look(source, min_drift=1.0).refusal is not None
    add(source, "d")
    assert look(source, min_drift=1.0).refusal is None, "more came: it has to be looked at"


def test_a_reference_that_is_gone_refuses_nothing(client, source, tmp_path):
    context = start_run.fn(str(source), "tiny", None, None)
    selection = select(tmp_path / "selection", *KNOWN)
    assert compare_new_clips.fn(context, selection, str(tmp_path / "gone.json")) is None
