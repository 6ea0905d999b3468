import json
import re
import time
from pathlib import Path

import numpy as np
import pytest

from tests import data_roots, factories
from ursa import storage
from ursa.artifacts import SCHEMA_VERSION, ClipSet, TokenDataset, TokenDatasets
from ursa.config import fingerprint
from ursa.data.clips import CLIP_SCHEMA, FAILURE_SCHEMA, put_table
from ursa.data.shards import write_shard
from ursa.errors import DataError
from ursa.inspection.verify import verify_root

NOT_READ = "the bytes of 1 tokenizers (--media reads them)"


def problems(root, **options):
    return verify_root(root.uri, **options).problems


def edit_manifest(path, change):
    """Change a record as code that is wrong would have written it."""
    values = json.loads(path.read_text("utf-8"))
    del values["sha256"]
    change(values["record"])
    path.write_text(json.dumps(values), "utf-8")


def replace_shard(root, rows_of):
    """Write another video shard for training and name it wherever the old one is named."""
    old = root.datasets.video_train.shards[0]
    table = data_roots.read_rows(old)
    new = write_shard(rows_of(table), f"{old.uri.rsplit('-', 1)[0]}", codebook_size=60)
    for path in (Path(root.datasets.manifest_uri), *(Path(root.uri) / "tokens/units").iterdir()):
        text = path.read_text("utf-8")
        text = text.replace(old.sha256, new.sha256).replace(old.uri, new.uri)
        text = text.replace(f'"num_bytes": {old.num_bytes}', f'"num_bytes": {new.num_bytes}')
        path.write_text(text, "utf-8")
        edit_manifest(path, lambda _: None)
    return new


def test_a_whole_root_has_no_problem(root):
    found = verify_root(root.uri, with_media=True)
    assert found.problems == ()
    assert found.not_checked == ()
    assert (found.num_clips, found.num_clip_sets, found.num_token_sets) == (5, 1, 1)
    parts = (root.datasets.get(m, s) for m in ("image", "video") for s in ("train", "validation"))
    assert found.num_samples == sum(part.num_samples for part in parts) > 0


def test_a_place_without_data_is_named(tmp_path):
    with pytest.raises(DataError, match=r"holds no committed clips .*give the data root"):
        verify_root(str(tmp_path))


@pytest.mark.parametrize("damage", ["missing", "flipped"])
@pytest.mark.parametrize("name", ["shards", "media", "clips", "failures", "selection"])
def test_every_kind_of_file_is_looked_at(root, name, damage):
    (path, *_) = {
        "shards": root.shards(),
        "media": root.media(),
        "clips": sorted(Path(root.uri).glob("clips/sets/*/clips-*")),
        "failures": sorted(Path(root.uri).glob("clips/sets/*/failures-*")),
        "selection": sorted(Path(root.uri).glob("selections/*/selection-*")),
    }[name]
    if damage == "missing":
        path.unlink()
    else:
        data_roots.flip_bit(path, path.stat().st_size // 2, 3)
    (problem,) = problems(root, with_media=True)
    assert path.name in problem.uri + problem.detail or name == "failures"
    command = f"ursa data repair {root.uri}"
    assert problem.repair == command if name in ("shards", "media") else "delete" in problem.repair


def test_a_missing_clip_is_found_without_reading_clips(root):
    root.media()[0].unlink()
    data_roots.flip_bit(root.media()[1], 100, 0)
    found = verify_root(root.uri)
    assert len(found.problems) == 1
    assert found.not_checked == ("the bytes of 5 clips (--media reads them)", NOT_READ)


def damage_sample_missing(rows):
    return [*rows[:2], rows[0], *rows[3:]]


def damage_two_swapped(rows):
    return [rows[1], rows[0], *rows[2:]]


def damage_id(rows):
    return [rows[0] | {"visual_ids": [*rows[0]["visual_ids"][:-1], 60]}, *rows[1:]]


def damage_shape(rows):
    return [rows[0] | {"visual_ids": rows[0]["visual_ids"][:-1]}, *rows[1:]]


def damage_stated_shape(rows):
    return [rows[0] | {"num_rows": 3}, *rows[1:]]


def damage_name(rows):
    return [rows[0] | {"start_s": 0.9}, *rows[1:]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_sample_missing, r"1 sample ids are there twice\|1 samples are missing, such as"),
        (damage_two_swapped, "in another order"),
        (damage_id, "holds the id 60, expected less than 60"),
        (damage_shape, r"has 11 ids of shape \(2, 2, 3\), expected \(2, 2, 3\)"),
        (damage_stated_shape, r"has 12 ids of shape \(2, 3, 3\), expected \(2, 2, 3\)"),
        (damage_name, r"is the name of another sample than of clip .* at 0\.9 s"),
    ],
)
def test_rows_that_were_written_wrong_are_found(root, damage, message):
    """The file is whole, its hash is right, but its rows are not those of the clips."""
    shard = replace_shard(root, damage)
    found = problems(root)
    assert {problem.uri for problem in found} == {shard.uri}
    assert re.search(message, "|".join(problem.detail for problem in found))


def test_counts_of_manifests_are_compared(root):
    edit_manifest(Path(root.selection.manifest_uri), lambda r: r.update(num_train=99))
    edit_manifest(Path(root.datasets.manifest_uri), lambda r: r.update(num_failed_clips=2))
    details = " ".join(problem.detail for problem in problems(root))
    assert "'train': 99" in details
    assert "says that 2 clips failed, its units 0" in details
    Path(root.selection.manifest_uri).write_text("{", "utf-8")
    assert "not a manifest" in " ".join(problem.detail for problem in problems(root))


def test_a_changed_letter_of_a_manifest_is_found(root):
    """Records repeat each other, so that one that was changed differs from the other."""
    random = np.random.default_rng(0)
    for pattern in ("clips/sets", "selections", "tokens"):
        for path in Path(root.uri).glob(f"{pattern}/*/*.json"):
            for place in random.integers(path.stat().st_size, size=20):
                data_roots.flip_bit(path, int(place), 1)
                found = verify_root(root.uri, config=root.config).problems
                data_roots.flip_bit(path, int(place), 1)
                data = path.read_bytes()
                is_space = data[int(place)] in b" \n" and data[int(place)] ^ 2 in b" \n\t\r"
                assert found or is_space, (path.name, data[max(0, place - 30) : place + 10])


def test_a_unit_that_is_not_in_the_data_set_is_found(root):
    def without_shard(record):
        record["image_train"]["shards"] = []
        record["image_train"].update(num_samples=0, num_tokens=0)

    edit_manifest(Path(root.datasets.manifest_uri), without_shard)
    assert "samples are missing" in " ".join(problem.detail for problem in problems(root))


def test_without_a_recipe_the_configuration_can_be_named(root):
    Path(root.datasets.manifest_uri).with_name("recipe.json").unlink()
    found = verify_root(root.uri, with_media=True)
    assert found.problems == ()
    assert "give them with --preset and --set" in found.not_checked[0]
    assert verify_root(root.uri, with_media=True, config=root.config).not_checked == ()


@pytest.mark.parametrize("folder", ["tokenizers/visual", "selections"])
def test_a_lost_part_of_a_recipe_is_named_and_not_the_recipe(root, folder):
    (path,) = Path(root.uri).glob(f"{folder}/*/manifest.json")
    path.unlink()
    (problem,) = problems(root)
    assert storage.local_path(problem.uri) == path
    assert problem.detail.startswith("it is missing; ")
    assert "put it back" in problem.repair
    assert "delete" not in problem.repair


def test_a_copied_root_is_not_taken_for_the_first(root, tmp_path):
    storage.upload_directory(Path(root.uri), str(tmp_path / "copy"))
    found = verify_root(str(tmp_path / "copy"))
    assert {"was copied or moved" in problem.detail for problem in found.problems} == {True}


def test_shards_of_a_run_that_is_not_finished_are_looked_at(root):
    Path(root.datasets.manifest_uri).unlink()
    assert problems(root) == ()
    shard = root.shards()[0]
    data_roots.flip_bit(shard, 50, 1)
    (problem,) = problems(root)
    assert problem.uri == str(shard)
    assert re.fullmatch(r"delete .*/tokens/units/\w+\.json; .*", problem.repair)


def write_large_root(folder):
    """A root whose only shard has about 1 MB."""
    uri, codes, shape = str(folder), 1 << 16, (4, 52, 80)
    print_ = fingerprint("large")
    set_uri = storage.join(uri, "clips", "sets", print_[:16])
    put_table(set_uri, "failures", FAILURE_SCHEMA, [])
    manifest_uri = storage.join(set_uri, "manifest.json")
    clips = ClipSet(
        manifest_uri=manifest_uri,
        clips_uri=put_table(set_uri, "clips", CLIP_SCHEMA, []),
        source_uri=uri,
        num_videos=0,
        num_failed=0,
        num_clips=0,
        num_dropped_shots=0,
        failures={},
        config=factories.tiny_config().ingestion,
        fingerprint=print_,
    )
    storage.commit_record(manifest_uri, clips)
    ids = np.random.default_rng(0).integers(codes, size=(30, int(np.prod(shape))))
    rows = [
        factories.token_rows("video", 1)[0]
        | {"clip_id": f"clip{i}", "sample_id": f"clip{i}-video-0000000-0"}
        | dict(zip(("num_latent_frames", "num_rows", "num_columns"), shape, strict=True))
        | {"visual_ids": part.tolist()}
        for i, part in enumerate(ids)
    ]
    place = storage.join(uri, "tokens", "shards", f"video-{'a' * 16}")
    shard = write_shard(rows, place, codebook_size=codes)
    manifest_uri = storage.join(uri, "tokens", print_[:32], "manifest.json")
    sets = {
        f"{modality}_{split}": TokenDataset(
            manifest_uri=manifest_uri,
            modality=modality,
            split=split,
            bucket=0,
            num_samples=len(shards) * len(rows),
            num_tokens=len(shards) * ids.size,
            codebook_size=codes,
            visual_tokenizer_fingerprint="v",
            latent_shape=shape,
            shards=shards,
            schema_version=SCHEMA_VERSION,
            fingerprint=fingerprint(print_, modality, split, 0),
        )
        for modality in ("image", "video")
        for split in ("train", "validation")
        for shards in ((shard,) if (modality, split) == ("video", "train") else (),)
    }
    record = TokenDatasets(
        manifest_uri=manifest_uri,
        extra_buckets=(),
        num_failed_clips=0,
        num_short_clips=0,
        fingerprint=print_,
        **sets,
    )
    storage.commit_record(manifest_uri, record)
    return uri, Path(shard.uri)


def test_every_one_of_200_flipped_bits_is_found(tmp_path):
    uri, path = write_large_root(tmp_path)
    assert verify_root(uri).problems == ()
    assert 0.9e6 < path.stat().st_size < 1.3e6
    random = np.random.default_rng(1)
    started = time.process_time()
    for place in random.integers(path.stat().st_size, size=200):
        bit = int(random.integers(8))
        data_roots.flip_bit(path, int(place), bit)
        (problem,) = verify_root(uri).problems
        assert (problem.uri, problem.repair) == (str(path), f"ursa data repair {uri}")
        data_roots.flip_bit(path, int(place), bit)
    assert time.process_time() - started < 10
    assert verify_root(uri).problems == ()
