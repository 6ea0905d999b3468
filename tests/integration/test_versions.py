"""A source changes between runs: the versions say in what, and only that is worked on."""

import json
from pathlib import Path

import pytest

from tests import data_roots, factories, media
from ursa import storage
from ursa.artifacts import TokenizerRef
from ursa.cli import main
from ursa.config import RunConfig
from ursa.data.versions import (
    Change,
    DatasetVersion,
    FileChange,
    commit_version,
    find_uses,
    list_versions,
    read_changes,
)
from ursa.inspection.card import data_card

pytestmark = pytest.mark.integration
CODE = {"ursa": "test"}
CONFIG = data_roots.root_config(tokenization={"clips_per_shard": 2})


def save(folder: Path, name: str, seed: int) -> str:
    """Write a video whose content the seed decides; return its sha256."""
    frames = media.panning(40, step=2, height=96, width=128, seed=seed)
    return storage.sha256_file(media.save_video(folder / f"{name}.mp4", frames, 24.0))


def run(
    source: Path, uri: str, tokenizer: TokenizerRef, config: RunConfig = CONFIG
) -> tuple[data_roots.DataRoot, DatasetVersion]:
    root = data_roots.prepare(source, uri, config, tokenizer)
    version = commit_version(
        uri, config, root.selection, (tokenizer, tokenizer), root.datasets, code=CODE
    )
    return root, version


def shard_hashes(root: data_roots.DataRoot) -> list[str]:
    sets = (root.datasets.get(m, s) for m in ("image", "video") for s in ("train", "validation"))
    return sorted(shard.sha256 for part in sets for shard in part.shards)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return factories.write_visual_tokenizer(str(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def grown(tmp_path_factory, tokenizer):
    """Ten files; then three are added, one is renamed, one edited, one deleted."""
    folder = tmp_path_factory.mktemp("grown")
    source, uri = folder / "videos", str(folder / "data")
    source.mkdir()
    hashes = {f"v{index}": save(source, f"v{index}", index) for index in range(10)}
    (source / "broken.mp4").write_bytes(b"no video")
    first, one = run(source, uri, tokenizer)
    units = set((Path(uri) / "clips" / "units").rglob("*.json"))

    (source / "v2.mp4").rename(source / "a name.mp4")
    hashes |= {name: save(source, name, seed) for name, seed in (("n1", 21), ("n2", 22))}
    hashes |= {"v0a": save(source, "v0a", 23), "new v5": save(source, "v5", 25)}
    (source / "v7.mp4").unlink()
    second, two = run(source, uri, tokenizer)
    new_units = set((Path(uri) / "clips" / "units").rglob("*.json")) - units
    return source, hashes, (first, one), (second, two), new_units


def test_the_version_says_exactly_what_changed(grown):
    source, hashes, (_, one), (_, two), _ = grown

    def uri(name: str) -> str:
        return (source / f"{name}.mp4").as_uri()

    assert (one.number, one.parent_uri) == (1, None)
    none = dict.fromkeys(Change, 0)
    assert one.changes == {**none, "added": 11}
    assert (two.number, two.parent_uri) == (2, one.manifest_uri)
    assert two.changes == {**none, "added": 3, "renamed": 1, "edited": 1, "removed": 1}
    assert (two.num_files, two.num_unchanged) == (13, 8)
    assert read_changes(two) == [
        FileChange(Change.RENAMED, uri("a name"), hashes["v2"], previous_uri=uri("v2")),
        FileChange(Change.ADDED, uri("n1"), hashes["n1"]),
        FileChange(Change.ADDED, uri("n2"), hashes["n2"]),
        FileChange(Change.ADDED, uri("v0a"), hashes["v0a"]),
        FileChange(Change.EDITED, uri("v5"), hashes["new v5"], previous_content=hashes["v5"]),
        FileChange(Change.REMOVED, uri("v7"), hashes["v7"]),
    ]


def test_only_what_is_new_was_decoded(grown):
    _, hashes, _, _, new_units = grown
    new = {hashes[name] for name in ("n1", "n2", "v0a", "new v5")}
    assert {path.stem for path in new_units} == {sha256[:32] for sha256 in new}


def test_shards_are_those_of_a_clean_run_and_most_are_the_old_ones(grown, tokenizer, tmp_path):
    source, _, (first, _), (second, _), _ = grown
    clean, version = run(source, str(tmp_path / "data"), tokenizer)
    assert shard_hashes(second) == shard_hashes(clean)
    assert version.number == 1
    # six files came, went or changed: each touches the shards of one unit, or of two
    made = set(shard_hashes(second)) - set(shard_hashes(first))
    assert 0 < len(made) < len(shard_hashes(second))


def test_a_run_without_changes_makes_no_version(grown, tokenizer):
    source, _, _, (second, two), _ = grown
    again, version = run(source, second.uri, tokenizer)
    assert version == two
    assert again.datasets == second.datasets


def test_other_settings_make_a_version_that_names_them(tmp_path, tokenizer, capsys):
    source, uri = tmp_path / "videos", str(tmp_path / "data")
    source.mkdir()
    for seed in range(2):
        save(source, f"v{seed}", seed)
    run(source, uri, tokenizer)
    run(source, uri, tokenizer, data_roots.root_config(tokenization={"image_stride_s": 0.25}))
    with pytest.raises(SystemExit):
        main(["data", "changes", uri])
    out = capsys.readouterr().out
    assert "setting     tokenization.image_stride_s\n" in out
    assert "version 2: 0 files differ, 2 do not" in out
    with pytest.raises(SystemExit):
        main(["data", "versions", uri, "--json"])
    assert [item["number"] for item in json.loads(capsys.readouterr().out)] == [1, 2]


def test_changed_captions_make_a_version_that_names_the_files(tmp_path, tokenizer, capsys):
    source, uri = tmp_path / "videos", str(tmp_path / "data")
    source.mkdir()
    for seed in range(3):
        save(source, f"v{seed}", seed)
    run(source, uri, tokenizer)
    (source / "v1.txt").write_text("Ground that moves.")
    root, two = run(source, uri, tokenizer)
    assert (two.number, two.changes[Change.RECAPTIONED], two.num_unchanged) == (2, 1, 2)
    with pytest.raises(SystemExit):
        main(["data", "changes", uri, "--source", f"{source}/"])
    assert capsys.readouterr().out.splitlines() == [
        f"recaptioned {(source / 'v1.mp4').as_uri()}",
        "captions changed: 1 files",
        "version 2: 0 files differ, 3 do not",
    ]
    card = data_card(uri, selection_uri=root.selection.manifest_uri, config=CONFIG)
    assert "<tr><td>captions changed</td><td>1 files</td></tr>" in card
    assert "<tr><td>as before</td><td>2 files</td></tr>" in card


def test_a_file_is_found_by_name_old_name_and_content(grown, capsys):
    source, hashes, _, (second, _), _ = grown
    for what in ("v2", "a name"):
        found = find_uses(second.uri, (source / f"{what}.mp4").as_uri())
        assert [(version.number, row["content"]) for version, row in found] == [
            (1, hashes["v2"]),
            (2, hashes["v2"]),
        ]
    gone = find_uses(second.uri, hashes["v7"])
    assert [(version.number, row["status"], row["num_clips"]) for version, row in gone] == [
        (1, "ok", 1)
    ]
    assert find_uses(second.uri, "file:///elsewhere.mp4") == []
    with pytest.raises(SystemExit) as stopped:
        main(["data", "uses", str(source / "v7.mp4"), second.uri])
    assert not stopped.value.code
    assert "version 1 of" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["data", "uses", "f" * 64, second.uri])
    assert stopped.value.code == 1


def test_of_two_runs_at_once_the_second_takes_the_next_number(grown, tokenizer, monkeypatch):
    """The number is taken between the look at the newest version and the commit."""
    source, _, _, (second, two), _ = grown
    config = data_roots.root_config(tokenization={"clips_per_shard": 1})
    root = data_roots.prepare(source, second.uri, config, tokenizer)
    commit = storage.commit_record
    rivals = []

    def late(uri, record):
        if isinstance(record, DatasetVersion) and not rivals:
            rivals.append(commit(uri, record.model_copy(update={"fingerprint": "f" * 64})))
        return commit(uri, record)

    monkeypatch.setattr(storage, "commit_record", late)
    version = commit_version(
        second.uri, config, root.selection, (tokenizer, tokenizer), root.datasets, code=CODE
    )
    assert version.number == rivals[0].number + 1 == two.number + 2
    assert version.parent_uri == rivals[0].manifest_uri
    assert [item.number for item in list_versions(second.uri)] == [1, 2, 3, 4]
