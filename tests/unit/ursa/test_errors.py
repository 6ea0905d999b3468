import inspect
import pickle

import pytest

from ursa import errors

CLASSES = [
    item
    for _, item in inspect.getmembers(errors, inspect.isclass)
    if issubclass(item, errors.UrsaError)
]


@pytest.mark.parametrize("kind", CLASSES)
def test_errors_survive_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("steps must be > 0, got -1")))
    assert type(error) is kind
    assert str(error) == "steps must be > 0, got -1"
    assert error.transient is kind.transient


def test_only_services_stores_and_clips_may_be_tried_again():
    transient = {kind.__name__ for kind in CLASSES if kind.transient}
    assert transient == {"StorageError", "ServiceError", "ClipUnavailableError"}


def test_config_error_is_a_value_error():
    with pytest.raises(ValueError, match="steps"):
        raise errors.ConfigError("steps")
