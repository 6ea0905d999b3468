"""Verify token data sets: shards, their rows, and that no sample is missing or twice.

Shards are read one by one.
"""

import math
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from ursa import storage
from ursa.artifacts import (
    SCHEMA_VERSION,
    Modality,
    ShardInfo,
    TokenDataset,
    TokenDatasets,
)
from ursa.config import TokenizationConfig, fingerprint
from ursa.data.buckets import bucket_settings
from ursa.data.shards import read_shard
from ursa.data.units import (
    MODALITIES,
    TokenizationRecipe,
    TokenizationUnit,
    TokenizedUnit,
    expected_sample_ids,
    iter_units,
    sample_id,
)
from ursa.errors import ManifestError, ShardFormatError
from ursa.inspection.problems import ProblemKind, Tally, remake_hint, repair_hint
from ursa.inspection.root import (
    TOKENS,
    find_recipe,
    iter_records,
    list_below,
    missing_parts,
    read_recipe,
    recipe_difference,
    recipe_uri,
)

KEY_DIGITS = 16
"""How much of a unit's key is in the name of its shards."""
_LOST_PART = (
    "put it back from a copy, or run the pipeline again, which makes it again; the token data set "
    "and its recipe are whole, leave them"
)


def verify_token_sets(tally: Tally, settings: Sequence[TokenizationConfig]) -> None:
    """Verify all token data sets below a data root, and the units of unfinished ones.

    Args:
        tally: Collects counts and problems.
        settings: What to try where no recipe lies beside a manifest.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    committed: set[str] = set()
    for uri, record in iter_records(tally.root_uri, TOKENS, TokenDatasets):
        tally.num_token_sets += 1
        if isinstance(record, ManifestError):
            tally.add(ProblemKind.MANIFEST, uri, str(record), remake_hint(uri))
        elif tally.is_at(uri, record.manifest_uri, record.fingerprint):
            recipe = find_recipe(tally.root_uri, record, settings)
            committed |= _TokenSet(tally, record, recipe).verify()
    _verify_unfinished(tally, committed)


def shard_key(shard: ShardInfo) -> str:
    """Return the first digits of the key of the unit that a shard belongs to.

    Args:
        shard: A shard, named `<modality>-<key>-<sha256>.parquet`.
    """
    return shard.uri.rpartition("/")[2].split("-")[1]


def load_unit_record(unit: TokenizationUnit, recipe: TokenizationRecipe) -> TokenizedUnit | str:
    """Return the record of a unit, or what is wrong with it.

    Args:
        unit: The unit.
        recipe: The recipe of its data set, which holds the records of partial units.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    partial = {record.key: record for record in recipe.partial_units}
    try:
        record = partial.get(unit.key) or storage.load_record(unit.record_uri, TokenizedUnit)
    except ManifestError as error:
        return str(error)
    if record is None:
        return "the record of the unit is missing"
    if record.key != unit.key or record.num_clips != len(unit.clips):
        return f"is of unit {record.key} with {record.num_clips} clips, expected {unit.key}"
    return record


class _TokenSet:
    """The four data sets of one manifest, while they are gone through."""

    def __init__(
        self, tally: Tally, datasets: TokenDatasets, recipe: TokenizationRecipe | None
    ) -> None:
        self._tally = tally
        self._datasets = datasets
        self._recipe = recipe
        self._manifest_uri = datasets.manifest_uri
        self._seen_clips: dict[Modality, set[str]] = {"image": set(), "video": set()}
        self._left = {
            (part.modality, shard_key(shard)): (part, shard)
            for part in datasets.parts()
            for shard in part.shards
        }

    def verify(self) -> set[str]:
        """Go through all shards; return the keys of their units, cut."""
        keys = {key for _, key in self._left}
        self._verify_recipe()
        for part in self._datasets.parts():
            self._verify_header(part)
        are_known = self._recipe is not None and self._verify_units(self._recipe)
        if self._recipe is None:
            self._tally.not_checked.append(
                f"whether {self._manifest_uri} holds every sample: the settings that made it are "
                "not known; give them with --preset and --set"
            )
        for (modality, _), (dataset, shard) in self._left.items():
            if self._read(dataset, shard) is not None and are_known:
                detail = f"{modality} shard of no unit of this data set"
                self._add_content(shard.uri, detail)
        return keys

    def _verify_recipe(self) -> None:
        recipe = read_recipe(self._datasets)
        if recipe is None:
            return
        detail = recipe if isinstance(recipe, str) else recipe_difference(recipe)
        if detail is not None:
            hint = "delete it, and name the settings with --preset and --set; training needs none"
            self._tally.add(ProblemKind.MANIFEST, recipe_uri(self._datasets), detail, hint)
        if isinstance(recipe, str):
            return
        named = {problem.uri for problem in self._tally.problems}
        for uri in missing_parts(recipe):
            if uri not in named:  # another data set was made with it too
                detail = f"it is missing; {self._manifest_uri} was made with what it names"
                self._tally.add(ProblemKind.MANIFEST, uri, detail, _LOST_PART)

    def _verify_header(self, dataset: TokenDataset) -> None:
        """Compare what the manifest says of one data set with what else is known."""
        whole = self._datasets
        modality, split, bucket = dataset.modality, dataset.split, dataset.bucket
        num_samples = sum(shard.num_samples for shard in dataset.shards)
        stated: dict[str, object] = {
            "manifest_uri": whole.manifest_uri,
            "fingerprint": fingerprint(whole.fingerprint, modality, split, bucket),
            "schema_version": SCHEMA_VERSION,
            "num_samples": num_samples,
            "num_tokens": num_samples * math.prod(dataset.latent_shape),
        }
        if self._recipe is not None:
            tokenizer = self._recipe.visual_tokenizer
            stated["visual_tokenizer_fingerprint"] = tokenizer.fingerprint
            stated["codebook_size"] = tokenizer.vocab_size
        for name, expected in stated.items():
            found = getattr(dataset, name)
            if found != expected:
                detail = f"{modality}_{split}: {name} is {found}, expected {expected}"
                self._add_content(self._manifest_uri, detail)

    def _verify_units(self, recipe: TokenizationRecipe) -> bool:
        """Go through the units; return whether all of them are known."""
        num_failed = num_short = 0
        try:
            for unit in iter_units(recipe, self._tally.root_uri):
                record = load_unit_record(unit, recipe)
                if isinstance(record, str):
                    hint = "delete it; a run that needs it makes it again, training does not"
                    self._tally.add(ProblemKind.UNIT_RECORD, unit.record_uri, record, hint)
                else:
                    num_failed += len(record.failed)
                    num_short += record.num_too_short
                    self._verify_too_short(unit, record, recipe.settings)
                for modality in MODALITIES:
                    self._verify_unit(unit, record, modality, recipe.settings)
        except ShardFormatError:  # a table of clips: named where clips are verified
            self._tally.not_checked.append(
                f"whether {self._manifest_uri} holds every sample: the clips cannot be read"
            )
            return False
        if num_failed != self._datasets.num_failed_clips:
            self._add_content(
                self._manifest_uri,
                f"says that {self._datasets.num_failed_clips} clips failed, its units {num_failed}",
            )
        if num_short != self._datasets.num_short_clips:
            self._add_content(
                self._manifest_uri,
                f"says that {self._datasets.num_short_clips} clips are too short, its units "
                f"{num_short}",
            )
        return True

    def _verify_too_short(
        self, unit: TokenizationUnit, record: TokenizedUnit, settings: TokenizationConfig
    ) -> None:
        """Compare how many clips gave no video sample with how many can give none."""
        settings = bucket_settings(settings, unit.bucket)
        failed = {clip.clip_id for clip in record.failed}
        count = sum(
            not expected_sample_ids(clip, "video", unit.split, settings)
            for clip in unit.clips
            if clip.clip_id not in failed
        )
        if count != record.num_too_short:
            self._add_content(
                unit.record_uri,
                f"says that {record.num_too_short} clips are too short, but {count} are",
            )

    def _verify_unit(
        self,
        unit: TokenizationUnit,
        record: TokenizedUnit | str,
        modality: Modality,
        settings: TokenizationConfig,
    ) -> None:
        """Compare the samples of a shard with those that the clips of its unit must give."""
        settings = bucket_settings(settings, unit.bucket)
        dataset, shard = self._left.pop((modality, unit.key[:KEY_DIGITS]), (None, None))
        found: list[str] | None = []
        if dataset is not None and shard is not None:
            found = self._read(dataset, shard)
        if isinstance(record, str) or found is None:
            return
        if record.shard(modality) != shard:
            self._add_content(unit.record_uri, f"names another {modality} shard than the manifest")
        failed = {clip.clip_id for clip in record.failed}
        expected = [
            name
            for clip in unit.clips
            if clip.clip_id not in failed
            for name in expected_sample_ids(clip, modality, unit.split, settings)
        ]
        if found != expected:
            uri = unit.record_uri if shard is None else shard.uri
            self._add_content(uri, _difference(found, expected))

    def _read(self, dataset: TokenDataset, shard: ShardInfo) -> list[str] | None:
        """Read a shard and look at its rows; None if it is damaged."""
        tally = self._tally
        try:
            table = read_shard(shard, codebook_size=dataset.codebook_size)
        except ShardFormatError as error:
            tally.add(ProblemKind.SHARD, shard.uri, str(error), repair_hint(tally.root_uri))
            return None
        tally.num_files += 1
        tally.num_bytes += shard.num_bytes
        tally.num_samples += table.num_rows
        for detail in row_errors(table, dataset):
            self._add_content(shard.uri, detail)
        clip_ids = set(table["clip_id"].unique().to_pylist())
        if both := clip_ids & self._seen_clips[dataset.modality]:
            self._add_content(shard.uri, f"clip {min(both)} is in another shard too")
        self._seen_clips[dataset.modality] |= clip_ids
        names: list[str] = table["sample_id"].to_pylist()
        return names

    def _add_content(self, uri: str, detail: str) -> None:
        """Note what a whole file holds but should not."""
        hint = remake_hint(self._manifest_uri, "the unit record and shards that it names")
        self._tally.add(ProblemKind.CONTENT, uri, detail, hint)


def row_errors(table: pa.Table, dataset: TokenDataset) -> Iterator[str]:
    """Yield what is wrong with the rows of a shard.

    Args:
        table: The shard.
        dataset: The data set that it belongs to.

    Yields:
        A sentence a kind of error; it names the first such row.
    """
    shape = dataset.latent_shape
    names = table["sample_id"].to_pylist()
    lengths = pc.list_value_length(table["visual_ids"]).to_pylist()
    stated = zip(
        *(table[name].to_pylist() for name in ("num_latent_frames", "num_rows", "num_columns")),
        strict=True,
    )
    bad = [
        (name, row_shape, length)
        for name, row_shape, length in zip(names, stated, lengths, strict=True)
        if row_shape != shape or length != math.prod(shape)
    ]
    if bad:
        name, row_shape, length = bad[0]
        yield f"{name} has {length} ids of shape {row_shape}, expected {shape}; {len(bad)} such"
    greatest = pc.max(pc.list_flatten(table["visual_ids"])).as_py()
    if greatest is not None and greatest >= dataset.codebook_size:
        yield f"holds the id {greatest}, expected less than {dataset.codebook_size}"
    if len(set(names)) < len(names):
        yield f"{len(names) - len(set(names))} sample ids are there twice"
    columns = ("sample_id", "clip_id", "start_s", "variant")
    for name, clip_id, start_s, variant in zip(
        *(table[column].to_pylist() for column in columns), strict=True
    ):
        if name != sample_id(clip_id, dataset.modality, start_s, variant):
            yield f"{name} is the name of another sample than of clip {clip_id} at {start_s} s"
            return


def _difference(found: Sequence[str], expected: Sequence[str]) -> str:
    """Say in what two lists of samples differ."""
    missing = sorted(set(expected) - set(found))
    surplus = sorted(set(found) - set(expected))
    parts = [
        f"{len(names)} samples {what}, such as {names[0]}"
        for names, what in ((missing, "are missing"), (surplus, "should not be there"))
        if names
    ]
    return "; ".join(parts) or "its samples are in another order than its clips"


def _verify_unfinished(tally: Tally, committed: set[str]) -> None:
    """Look at the shards of units that no manifest names yet: a run would take them as done."""
    for item in list_below(storage.join(tally.root_uri, *TOKENS, "units")):
        key = item.uri.rpartition("/")[2].removesuffix(".json")
        if key[:KEY_DIGITS] in committed:
            continue
        hint = f"delete {item.uri}; the run that needs it makes it again"
        try:
            record = storage.load_record(item.uri, TokenizedUnit)
        except ManifestError as error:
            tally.add(ProblemKind.UNIT_RECORD, item.uri, str(error), hint)
            continue
        for shard in (record.image, record.video) if record is not None else ():
            detail = None if shard is None else storage.damage_of(shard.uri, shard.sha256)
            if shard is not None and detail is not None:
                tally.add(ProblemKind.UNIT_RECORD, shard.uri, detail, hint)
