"""`map_units` on Ray: actors and nodes that are lost, clips that kill their decoder.

A cluster of two nodes on this machine; the second one is taken away.
"""

import functools
import hashlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from tasks import cluster
from tasks.settings import RuntimeSettings
from tests import factories, media
from ursa.artifacts import Clip, ClipSelection, SourceVideo, TokenDatasets, TokenizerRef
from ursa.config import RunConfig
from ursa.data.dataset import TokenSamples
from ursa.data.units import TokenizationUnit, TokenizedUnit
from ursa.errors import FailureBudgetExceeded, UrsaError
from ursa.tokenization import ClipTokenizer, TokenizationPlan, commit_tokens, plan_tokenization
from ursa.video.decode import video_info

logger = logging.getLogger(__name__)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_CLIPS = 64
RECOVERY_LIMIT_S = 30.0
CONFIG = factories.tiny_config({"tokenization": {"image_variants": 1, "clips_per_shard": 1}})


class Nodes:
    """A head node without room for units, and nodes with room for one each."""

    def __init__(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self._ray = ray
        os.environ.update(cluster.QUIET)
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20},
        )
        self._nodes: list[Any] = []
        self.fill()
        ray.init(address=self._cluster.address, logging_level="ERROR", log_to_driver=False)

    def fill(self) -> None:
        while len(self._nodes) < 2:
            self._nodes.append(self._cluster.add_node(num_cpus=1, object_store_memory=100 << 20))
        self._cluster.wait_for_nodes()

    def lose_one(self) -> None:
        """As if its power had gone."""
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)

    def kill_an_actor(self) -> None:
        for node in self._nodes:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            for process in raylet.children(recursive=True):
                if "".join(process.cmdline()).startswith("ray::_Unit"):
                    process.kill()
                    return
        raise AssertionError("no actor found")

    def stop(self) -> None:
        self._ray.shutdown()
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    found = Nodes()
    yield found
    found.stop()


class Data(NamedTuple):
    clips: list[Clip]
    selection: ClipSelection
    tokenizer: TokenizerRef
    bomb: Clip

    def plan(self, uri: str, config: RunConfig = CONFIG) -> TokenizationPlan:
        return plan_tokenization(self.selection, self.tokenizer, config, output_uri=uri)

    def commit(self, plan: TokenizationPlan, units: list[TokenizedUnit], uri: str) -> TokenDatasets:
        return commit_tokens(plan, units, self.tokenizer, CONFIG, output_uri=uri)

    def make_unit(self) -> Callable[[], Callable[[TokenizationUnit], TokenizedUnit]]:
        return functools.partial(ClipTokenizer, self.tokenizer, CONFIG)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("clips")
    clips = []
    for index in range(NUM_CLIPS):
        frames = media.panning(240, step=1, height=96, width=128, seed=index)
        path = media.save_video(folder / f"clip{index}.mp4", frames, 12.0)
        clips.append(
            factories.clip_of(path, caption=f"clip {index}", info=video_info(path), index=index)
        )
    path = media.save_bomb(folder / "bomb.mp4", side=8192, num_frames=60)
    bomb = factories.clip_of(path, caption="bomb", info=video_info(path), index=NUM_CLIPS)
    root = str(tmp_path_factory.mktemp("data"))
    selection = factories.commit_selection(root, clips, num_validation=8)
    return Data(clips, selection, factories.write_visual_tokenizer(root), bomb)


@pytest.fixture(scope="module")
def undisturbed(data: Data, nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names and hashes of the shards of a run that nobody disturbs."""
    uri = str(tmp_path_factory.mktemp("undisturbed"))
    plan = data.plan(uri)
    units = list(cluster.map_units(data.make_unit(), plan.todo, TokenizedUnit, settings()))
    data.commit(plan, units, uri)
    return shard_hashes(uri)


def settings() -> RuntimeSettings:
    return RuntimeSettings(launcher="ray", num_workers=2, data_uri="/nowhere")


def shard_hashes(uri: str) -> set[str]:
    return {
        f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in (Path(uri) / "tokens" / "shards").iterdir()
    }


def check_every_clip_once(data: Data, datasets: TokenDatasets) -> None:
    clip_ids: list[str] = []
    for split in ("train", "validation"):
        samples = TokenSamples(datasets.get("image", split))
        assert len(set(samples.sample_ids)) == len(samples)
        clip_ids += set(samples.clip_ids)
    assert sorted(clip_ids) == sorted(clip.clip_id for clip in data.clips)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("what", ["node", "actor"])
def test_lost_node_or_actor_costs_no_clip(
    data: Data,
    nodes: Nodes,
    undisturbed: set[str],
    tmp_path: Path,
    what: str,
    fraction: float,
) -> None:
    nodes.fill()
    uri = str(tmp_path)
    plan = data.plan(uri)
    lost_at_s: list[float] = []

    def watch(done: int, total: int) -> None:
        if done < fraction * total or lost_at_s:
            return
        lost_at_s.append(time.monotonic())
        if what == "node":
            nodes.lose_one()
        else:
            nodes.kill_an_actor()

    units = list(
        cluster.map_units(data.make_unit(), plan.todo, TokenizedUnit, settings(), on_progress=watch)
    )
    took_s = time.monotonic() - lost_at_s[0]
    logger.warning("%s lost at %d %%: done %.1f s later", what, 100 * fraction, took_s)
    assert len({unit.key for unit in units}) == len(units) == len(plan.todo)
    check_every_clip_once(data, data.commit(plan, units, uri))
    assert shard_hashes(uri) == undisturbed
    assert took_s < RECOVERY_LIMIT_S


@pytest.mark.parametrize("launcher", ["ray", "local"])
def test_clip_that_kills_decoders_is_named_and_the_others_are_done(
    data: Data, nodes: Nodes, tmp_path: Path, launcher: str
) -> None:
    nodes.fill()
    clips = [*data.clips[:7], data.bomb]
    selection = factories.commit_selection(str(tmp_path / "s"), clips)
    poisoned = data._replace(selection=selection)
    uri = str(tmp_path / "out")
    config = factories.tiny_config(
        {"tokenization": {"image_variants": 1, "clips_per_shard": 4, "max_failed_fraction": 0.2}}
    )
    plan = poisoned.plan(uri, config)
    make_unit = functools.partial(ClipTokenizer, data.tokenizer, config)
    units = list(
        cluster.map_units(
            make_unit,
            plan.todo,
            TokenizedUnit,
            settings().model_copy(update={"launcher": launcher}),
        )
    )
    (failed,) = [clip for unit in units for clip in unit.failed]
    assert failed.clip_id == data.bomb.clip_id
    assert failed.source_uri == data.bomb.source_uri
    assert "the decoder died with SIG" in failed.detail
    assert "in each of 3 attempts" in failed.detail
    strict = config.model_copy(
        update={"tokenization": config.tokenization.model_copy(update={"max_failed_fraction": 0})}
    )
    with pytest.raises(FailureBudgetExceeded, match=r"1 of 8 clips .*bomb\.mp4: .*died with SIG"):
        commit_tokens(plan, units, data.tokenizer, strict, output_uri=uri)
    datasets = commit_tokens(plan, units, data.tokenizer, config, output_uri=uri)
    assert datasets.num_failed_clips == 1
    assert set(TokenSamples(datasets.video_train).clip_ids) == {c.clip_id for c in data.clips[:7]}


class Killer:
    """A unit that kills its process on some items, as often as told."""

    def __init__(self, folder: Path, times: dict[str, int]) -> None:
        self.folder = folder
        self.times = times

    def __call__(self, item: SourceVideo) -> SourceVideo:
        note = self.folder / item.etag
        calls = int(note.read_text()) if note.exists() else 0
        note.write_text(str(calls + 1))
        if calls < self.times.get(item.etag, 0):
            os.kill(os.getpid(), signal.SIGSEGV)
        return item.model_copy(update={"num_bytes": item.num_bytes * 2})


ITEMS = [SourceVideo(uri=f"/videos/{i}.mp4", num_bytes=i, etag=str(i)) for i in range(10)]


def test_unit_that_loses_two_actors_is_done(nodes: Nodes, tmp_path: Path) -> None:
    nodes.fill()
    make_unit = functools.partial(Killer, tmp_path, {"2": 2})
    found = list(cluster.map_units(make_unit, ITEMS, SourceVideo, settings()))
    assert sorted(item.num_bytes for item in found) == list(range(0, 20, 2))
    assert (tmp_path / "2").read_text() == "3"


def test_unit_that_always_kills_is_given_up_after_the_others(nodes: Nodes, tmp_path: Path) -> None:
    nodes.fill()
    make_unit = functools.partial(Killer, tmp_path, {"2": 99})
    with pytest.raises(UrsaError, match=r"worked on SourceVideo /videos/2\.mp4 died 3 times"):
        list(cluster.map_units(make_unit, ITEMS, SourceVideo, settings()))
    assert (tmp_path / "2").read_text() == "3"
    assert {path.name for path in tmp_path.iterdir()} == {item.etag for item in ITEMS}
