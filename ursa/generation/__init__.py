"""Generation: prompt, and frames if there are any, to frames."""

from ursa.generation.files import SampleDefaults, SchedulerConfig
from ursa.generation.long_video import slide_window
from ursa.generation.pipeline import UrsaOutput, UrsaPipeline

__all__ = ["SampleDefaults", "SchedulerConfig", "UrsaOutput", "UrsaPipeline", "slide_window"]
