"""Re-encode the demo videos; argument: the folder of source files (videos/ATTRIBUTION.md)."""

import sys
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import av
from av.filter import Graph


class Cut(NamedTuple):
    """Frames [first, end) of a source file; play_fps replaces the times of a sparse recording."""

    source: str
    first: int
    end: int
    play_fps: int | None = None


CUTS = {
    "bbb_trailer.mp4": Cut("trailer_bbb.mp4", 12, 1236),
    "bbb_stretch.mp4": Cut("bigbuckbunny.mp4", 0, 132),
    "city_night.mp4": Cut("cityCC0.mpg", 0, 190),
    "cardboard_box.mp4": Cut("box.mp4", 78, 250),
    "black_bottle.mp4": Cut("cup.mp4", 28, 217),
    "tree_hand.mp4": Cut("tree.avi", 16, 68, play_fps=12),
    "screencast_displays.mp4": Cut("display-dual-monitors.webm", 247, 347),
}


def encode(cut: Cut, source_path: Path, target_path: Path) -> None:
    """Write a cut as silent H.264, 320x180, 24 fps, cropped at the centre to 16:9."""
    steps = [
        ("setpts", f"N/{cut.play_fps}/TB" if cut.play_fps else "PTS-STARTPTS"),
        ("fps", "24"),
        ("crop", r"min(iw\,ih*16/9):min(ih\,iw*9/16)"),
        ("scale", "320:180:flags=area"),
        ("format", "yuv420p"),
        ("buffersink", ""),
    ]
    with av.open(str(source_path)) as source, av.open(str(target_path), "w") as target:
        graph = Graph()
        buffer = graph.add_buffer(template=source.streams.video[0])
        graph.link_nodes(buffer, *(graph.add(*step) for step in steps)).configure()
        stream = target.add_stream("libx264", rate=24, options={"crf": "23", "threads": "1"})
        stream.width, stream.height = 320, 180
        for frame in (*islice(source.decode(video=0), cut.first, cut.end), None):
            graph.vpush(frame)
            with suppress(av.BlockingIOError, av.EOFError):
                while True:
                    target.mux(stream.encode(graph.vpull()))
        target.mux(stream.encode(None))


if __name__ == "__main__":
    for name, cut in CUTS.items():
        encode(cut, Path(sys.argv[1]) / cut.source, Path(__file__).parent / "videos" / name)
