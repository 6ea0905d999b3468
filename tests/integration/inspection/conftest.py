from pathlib import Path
from typing import NamedTuple

import pytest

from tests import data_roots
from ursa import storage
from ursa.annotation.records import Annotation, Measurement
from ursa.artifacts import TokenizerRef
from ursa.config import fingerprint
from ursa.data.clips import read_clips
from ursa.data.versions import DatasetVersion, commit_version


@pytest.fixture(scope="session")
def made_root(tmp_path_factory):
    return data_roots.write_data_root(tmp_path_factory.mktemp("root"))


@pytest.fixture
def root(made_root):
    """A whole data root; what a test does to it or to its source is undone."""
    places = (made_root.uri, str(made_root.source))
    before = {
        item.uri: storage.read_bytes(item.uri)
        for place in places
        for item in storage.list_files(place, with_etag=False)
    }
    yield made_root
    for place in places:
        for item in storage.list_files(place, with_etag=False):
            if item.uri not in before:
                storage.remove_file(item.uri)
    for uri, data in before.items():
        if storage.put_if_absent(uri, data) != data:
            storage.write_bytes(uri, data)


class Records(NamedTuple):
    """A data root with annotations and two versions of its data."""

    root: data_roots.DataRoot
    annotations: list[Path]
    versions: list[DatasetVersion]

    def units(self) -> list[Path]:
        return sorted((Path(self.root.uri) / "clips" / "units").rglob("*.json"))

    def all(self) -> list[Path]:
        """All files that `verify_records` has to look at."""
        tables = sorted((Path(self.root.uri) / "datasets").rglob("*.parquet"))
        versions = [Path(version.manifest_uri) for version in self.versions]
        return [*self.units(), *self.annotations, *versions, *tables]


@pytest.fixture
def records(root):
    print_ = fingerprint("scorer")
    annotations = []
    for clip in read_clips(root.selection.clips):
        path = Path(
            root.uri, "annotations", "aesthetic", print_[:32], f"{clip.media_sha256[:32]}.json"
        )
        record = Annotation(
            scorer_fingerprint=print_,
            media_sha256=clip.media_sha256,
            measurement=Measurement(scores={"rating": 5.25}),
        )
        storage.commit_record(str(path), record)
        annotations.append(path)
    tokenizer = storage.load_record(
        f"{root.uri}/tokenizers/visual/{'0' * 32}/manifest.json", TokenizerRef
    )
    versions = []
    for name in ("first", "second"):
        text = tokenizer.model_copy(update={"manifest_uri": "/gone.json", "fingerprint": name})
        versions.append(
            commit_version(
                root.uri, root.config, root.selection, (tokenizer, text), root.datasets, code={}
            )
        )
    return Records(root, annotations, versions)
