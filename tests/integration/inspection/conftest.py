import pytest

from tests import data_roots
from ursa import storage


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
