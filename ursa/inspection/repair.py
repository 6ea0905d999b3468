"""Make damaged clips and token shards again, and prove by their hashes that they are the same.

What is whole is never touched. A file is written at once and only with the bytes that its manifest
names, so two repairs at the same time write the same. Records that every run can make again are
removed if they are damaged (`ursa.inspection.repair_records`).
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from ursa import storage
from ursa.artifacts import Clip, ClipSet, FailureReason, ShardInfo, SourceVideo, TokenDatasets
from ursa.config import (
    FrozenModel,
    IngestionConfig,
    RunConfig,
    TokenizationConfig,
    fingerprint,
)
from ursa.data.clips import clips_of, read_clip_table
from ursa.data.units import (
    TokenizationRecipe,
    TokenizationUnit,
    TokenizedUnit,
    iter_units,
)
from ursa.errors import DataError, ShardFormatError, StorageError, UrsaError
from ursa.ingestion import ingest_video
from ursa.inspection.problems import (
    OTHER_BYTES,
    ProblemKind,
    Repair,
    Verification,
    done,
    not_done,
)
from ursa.inspection.repair_records import remake_tables, remove_records
from ursa.inspection.root import CLIP_SETS, TOKENS, find_recipe, good_records, known_configs
from ursa.inspection.verify import verify_root
from ursa.inspection.verify_tokens import KEY_DIGITS, load_unit_record, shard_key
from ursa.sources.listing import look_up_video
from ursa.tokenization import ClipTokenizer

_OUTSIDE = "it lies outside of the data root, where nothing is written; look at who has named it"
_MENDED = frozenset(
    {ProblemKind.MEDIA, ProblemKind.SHARD, ProblemKind.VERSION_TABLE, ProblemKind.RECORD}
)


class RepairReport(FrozenModel):
    """What was wrong with a data root and what became of it."""

    found: Verification
    repairs: tuple[Repair, ...]

    @property
    def num_left(self) -> int:
        """Number of problems that are left."""
        return sum(not repair.is_repaired for repair in self.repairs)


class _Wanted(NamedTuple):
    """A damaged shard and the data sets that name it."""

    shard: ShardInfo
    datasets: TokenDatasets


def repair_root(root_uri: str, *, config: RunConfig | None = None) -> RepairReport:
    """Verify a data root, clips included, and mend what can be made again.

    Args:
        root_uri: The data root.
        config: The run that made it, for data sets without a recipe; None tries the presets.

    Returns:
        Every problem and what became of it.

    Raises:
        DataError: If nothing is committed there.
        StorageError: If the store refuses or does not answer.
    """
    found = verify_root(root_uri, with_media=True, config=config)
    damaged: dict[ProblemKind, list[str]] = defaultdict(list)
    outside = []
    for problem in found.problems:
        if problem.kind in _MENDED and not storage.is_below(problem.uri, root_uri):
            outside.append(not_done(problem.uri, _OUTSIDE))
        else:
            damaged[problem.kind].append(problem.uri)
    repairs = list(_repair_media(root_uri, damaged[ProblemKind.MEDIA]))
    lost = {repair.uri for repair in repairs if not repair.is_repaired}
    settings = [item.tokenization for item in known_configs(config)]
    repairs += _repair_shards(root_uri, damaged[ProblemKind.SHARD], settings, lost)
    repairs += remake_tables(root_uri, damaged[ProblemKind.VERSION_TABLE])
    repairs += remove_records(damaged[ProblemKind.RECORD])
    repairs += [
        Repair(uri=item.uri, is_repaired=False, detail=f"{item.detail}; {item.repair}")
        for item in found.problems
        if item.kind not in _MENDED
    ]
    return RepairReport(found=found, repairs=(*repairs, *outside))


def _repair_media(root_uri: str, uris: Sequence[str]) -> Iterator[Repair]:
    """Make clips again from their sources, a source and configuration at a time."""
    wanted_of: dict[tuple[str, str, str], dict[str, Clip]] = defaultdict(dict)
    configs: dict[str, IngestionConfig] = {}
    for clip, config in _clips_at(root_uri, uris):
        key = fingerprint(config)
        configs[key] = config
        wanted_of[clip.source_sha256, clip.source_uri, key][clip.media_uri] = clip
    left = dict.fromkeys(uris, "no table of clips names it any more")
    for (_, source_uri, key), clips in sorted(wanted_of.items()):
        wanted = {uri: clip for uri, clip in clips.items() if uri in left}
        if not wanted:  # another file with the same bytes has given them
            continue
        why = _remake_clips(source_uri, wanted, configs[key])
        for uri, reason in why.items():
            if reason is None:
                del left[uri]
                yield done(uri, f"made again from {source_uri}")
            else:
                left[uri] = reason
    for uri, reason in left.items():
        yield not_done(uri, reason)


def _clips_at(root_uri: str, uris: Sequence[str]) -> Iterator[tuple[Clip, IngestionConfig]]:
    """Yield the clips whose files are at the given places, with what made them."""
    for clip_set in good_records(root_uri, CLIP_SETS, ClipSet) if uris else ():
        try:
            table = read_clip_table(clip_set)
        except ShardFormatError:
            continue  # it is a problem of its own
        for clip in clips_of(table.filter(pc.is_in(table["media_uri"], pa.array(uris)))):
            yield clip, clip_set.config


def _remake_clips(
    source_uri: str, wanted: Mapping[str, Clip], config: IngestionConfig
) -> dict[str, str | None]:
    """Ingest a source again, beside the data; return by clip why it was not made, or None."""
    why: dict[str, str | None]
    why = dict.fromkeys(wanted, f"its source {source_uri} is gone; put it back and try again")
    try:
        found = look_up_video(source_uri, allow_https=config.allow_https)
    except DataError as error:
        return dict.fromkeys(wanted, str(error))
    for source in found:
        left = {uri: clip for uri, clip in wanted.items() if why[uri] is not None}
        if left and source.problem != FailureReason.MISSING:
            why |= _remake_from(source, left, config)
    return why


def _remake_from(
    source: SourceVideo, wanted: Mapping[str, Clip], config: IngestionConfig
) -> dict[str, str | None]:
    clip = next(iter(wanted.values()))
    why: dict[str, str | None] = {}
    with storage.scratch_directory("repair") as folder:
        video = ingest_video(source, str(folder), config)
        if video.failure is not None or video.source_sha256 != clip.source_sha256:
            detail = video.detail or "it has changed"
            return dict.fromkeys(wanted, f"its source {source.uri} does not give it: {detail}")
        made = {(item.clip_id, item.media_sha256): item.media_uri for item in video.clips}
        for uri, lost in wanted.items():
            found_uri = made.get((lost.clip_id, lost.media_sha256))
            if found_uri is not None:
                storage.write_bytes(uri, storage.read_bytes(found_uri))
                why[uri] = None
            elif any(item.clip_id == lost.clip_id for item in video.clips):
                why[uri] = OTHER_BYTES
            else:
                why[uri] = (
                    f"its source {source.uri} gives other clips: another version of this program "
                    "has made it; run the pipeline again"
                )
    return why


def _repair_shards(
    root_uri: str, uris: Sequence[str], settings: Sequence[TokenizationConfig], lost: set[str]
) -> Iterator[Repair]:
    """Tokenize the units of damaged shards again, a data set at a time."""
    wanted = _wanted_shards(root_uri, uris)
    for datasets in {item.datasets.fingerprint: item.datasets for item in wanted.values()}.values():
        shards = [
            item.shard
            for item in wanted.values()
            if item.datasets.fingerprint == datasets.fingerprint
        ]
        recipe = find_recipe(root_uri, datasets, settings)
        if recipe is None:
            detail = "the settings that made it are not known; name them with --preset and --set"
            yield from (not_done(shard.uri, detail) for shard in shards)
        else:
            yield from _remake_shards(root_uri, shards, recipe, lost)


def _wanted_shards(root_uri: str, uris: Sequence[str]) -> dict[str, _Wanted]:
    """Return the damaged shards by URI."""
    return {
        shard.uri: _Wanted(shard, datasets)
        for datasets in (good_records(root_uri, TOKENS, TokenDatasets) if uris else ())
        for part in datasets.parts()
        for shard in part.shards
        if shard.uri in set(uris)
    }


def _remake_shards(
    root_uri: str, shards: Sequence[ShardInfo], recipe: TokenizationRecipe, lost: set[str]
) -> Iterator[Repair]:
    by_key: dict[str, list[ShardInfo]] = defaultdict(list)
    for shard in shards:
        by_key[shard_key(shard)].append(shard)
    try:
        tokenizer = ClipTokenizer(recipe.visual_tokenizer, recipe.settings)
        for unit in iter_units(recipe, root_uri):
            parts = by_key.pop(unit.key[:KEY_DIGITS], [])
            if parts:
                yield from _remake_unit(unit, parts, recipe, tokenizer, lost)
    except StorageError:
        raise
    except UrsaError as error:  # the clips or the tokenizer cannot be read
        left = [shard for parts in by_key.values() for shard in parts]
        yield from (not_done(shard.uri, str(error)) for shard in left)
        return
    for parts in by_key.values():
        detail = "no unit of its data set has made it"
        yield from (not_done(shard.uri, detail) for shard in parts)


def _remake_unit(
    unit: TokenizationUnit,
    shards: Sequence[ShardInfo],
    recipe: TokenizationRecipe,
    tokenizer: ClipTokenizer,
    lost: set[str],
) -> Iterator[Repair]:
    missing = sorted(lost & {clip.media_uri for clip in unit.clips})
    record = load_unit_record(unit, recipe)
    known = record if isinstance(record, TokenizedUnit) else None
    failed = {clip.clip_id for clip in known.failed} if known else set()
    if any(clip.media_uri in missing and clip.clip_id not in failed for clip in unit.clips):
        detail = f"its clip {missing[0]} is damaged and cannot be repaired"
        yield from (not_done(shard.uri, detail) for shard in shards)
        return
    try:
        made = tokenizer.remake(unit, known)
    except StorageError:
        raise
    except UrsaError as error:
        yield from (not_done(shard.uri, f"its clips cannot be read: {error}") for shard in shards)
        return
    found = {hashlib.sha256(data).hexdigest(): data for data in made.values()}
    for shard in shards:
        if shard.sha256 in found:
            storage.write_bytes(shard.uri, found[shard.sha256])
            yield done(shard.uri, f"its {len(unit.clips)} clips were tokenized again")
        else:
            yield not_done(
                shard.uri,
                f"{OTHER_BYTES}; repair it where it was made, or delete the manifest of the data "
                f"set, {unit.record_uri} and its shards and run the pipeline again",
            )
