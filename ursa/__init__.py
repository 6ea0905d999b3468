"""ursa: from a folder or bucket of videos to a registered video-generation model.

The small public API is here and loaded lazily; everything else has one import path.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ursa.config import load_config
    from ursa.generation import UrsaPipeline

__all__ = ["UrsaPipeline", "__version__", "load_config"]
__version__ = "0.1.0"

# Arrow looks once, at its import: its own pools keep several times the size of a table
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

_HOME = {"UrsaPipeline": "ursa.generation", "load_config": "ursa.config"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'ursa' has no attribute {name!r}")
