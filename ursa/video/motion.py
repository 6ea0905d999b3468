"""How fast a clip moves: the optical flow, and what of it the camera does.

Motion is measured on pictures of a fixed width, so that its unit, pixels a second, means the same
for every clip. The flow is computed once; the part that one affine motion of the whole picture
explains is called the camera's, the rest that of objects.

References:
    Optical flow by dense inverse search: arXiv 1603.03590. Dominant affine motion by reweighted
    least squares: Odobez and Bouthemy, J. Vis. Commun. Image Represent. 6 (1995).
"""

import functools
from typing import Any, NamedTuple

import cv2
import numpy as np

MOTION_WIDTH_PX = 256
"""Width of the pictures on which motion is measured, pixels."""
MOTION_FPS = 12.0
"""Motion is measured between frames about this rate apart, frames per second."""
FLAT_SLOPE = 0.25
"""Mean slope of luma below which a spot counts as flat, 8-bit levels per pixel."""
MOVING_PX = 0.25
"""Flow from which on a spot counts as moving, pixels between the two pictures."""

_FLAT_WINDOW_PX = (7, 7)
_SOBEL_SUM = 8.0
_GRID_PX = 8
_CELLS = 4
_MIN_CELLS = 8
_MIN_POINTS = 16
_ROUNDS = 3
_MIN_TOLERANCE_PX = 0.3
_TOLERANCE = 2.5


class Displacement(NamedTuple):
    """What moved between two pictures, pixels; flat ground counts as still."""

    total_px: float
    camera_px: float
    object_px: float
    moving_fraction: float
    """Share of the spots that are not flat whose flow is at least `MOVING_PX`, in [0, 1]."""
    length_px: np.ndarray | None
    """Length of the flow at every spot, shape (H, W), float32; None where nothing moves."""


STILL = Displacement(0.0, 0.0, 0.0, 0.0, None)


class FlowMeter:
    """Measures what moves between pairs of pictures."""

    def __init__(self) -> None:
        # its type stub wants a picture to write to, which may be left out
        self._flow: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def measure(self, first: np.ndarray, second: np.ndarray) -> Displacement:
        """Return how far the picture moved, and how far on its own what moved in it.

        Args:
            first: Luma, shape (H, W), uint8.
            second: The same some time later.
        """
        # a repeated frame has moved by nothing; the search would find noise
        if np.array_equal(first, second):
            return STILL
        flow = self._flow.calc(first, second, None)
        length = cv2.magnitude(flow[..., 0], flow[..., 1])
        # the search spreads motion over flat ground, where none can be seen
        gradient_x, gradient_y = cv2.spatialGradient(first)
        slope: Any = cv2.magnitude(gradient_x.astype(np.float32), gradient_y.astype(np.float32))
        is_flat = cv2.blur(slope / _SOBEL_SUM, _FLAT_WINDOW_PX) < FLAT_SLOPE
        length[is_flat] = 0.0
        num_seen = is_flat.size - int(np.count_nonzero(is_flat))
        num_moving = int(np.count_nonzero(length >= MOVING_PX))
        camera_px, object_px = split_motion(flow, ~is_flat)
        return Displacement(
            total_px=float(length.mean()),
            camera_px=camera_px,
            object_px=object_px,
            moving_fraction=num_moving / max(num_seen, 1),
            length_px=length,
        )


def split_motion(flow: np.ndarray, is_seen: np.ndarray) -> tuple[float, float]:
    """Return the mean length of the dominant affine motion, and of what it leaves over.

    The affine motion is fitted to a grid of points that are not flat; points that do not follow
    it lose their say. Where those that follow lie in less than half of a grid of 4 x 4 cells, the
    camera is taken to stand still: what moves there is an object.

    Args:
        flow: Optical flow in pixels, shape (H, W, 2), float32.
        is_seen: Where motion can be seen, shape (H, W), bool.

    Returns:
        Speed of the camera, averaged over the picture, and of objects, averaged over the picture
        with flat ground as still; both in pixels between the two pictures, at least 0.
    """
    half = _GRID_PX // 2
    grid = flow[half::_GRID_PX, half::_GRID_PX].astype(np.float64)
    rows, columns = grid.shape[:2]
    seen = is_seen[half::_GRID_PX, half::_GRID_PX].ravel()
    basis, cell = _grid_basis(rows, columns)
    vectors = grid.reshape(-1, 2)
    camera = basis @ _fit_dominant(basis[seen], vectors[seen])
    residual = _lengths(vectors - camera)
    follows = seen & (residual <= _tolerance(residual[seen]))
    if np.count_nonzero(np.bincount(cell[follows], minlength=_CELLS**2)) < _MIN_CELLS:
        camera = np.zeros_like(camera)
        residual = _lengths(vectors)
    return float(_lengths(camera).mean()), float(np.where(seen, residual, 0.0).mean())


@functools.lru_cache(maxsize=8)
def _grid_basis(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (1, x, y) of every point of a grid, and the cell in which it lies."""
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    basis = np.stack([np.ones(x.size), x.ravel(), y.ravel()], axis=1)
    row, column = np.mgrid[:rows, :columns]
    cell = (row * _CELLS // rows) * _CELLS + column * _CELLS // columns
    return basis, cell.ravel()


def _fit_dominant(basis: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return the affine motion, shape (3, 2), that most points follow."""
    affine = np.zeros((3, 2))
    if len(vectors) < _MIN_POINTS:
        return affine
    affine[0] = np.median(vectors, axis=0)
    for _ in range(_ROUNDS):
        residual = _lengths(vectors - basis @ affine)
        weight = np.maximum(1 - (residual / (2 * _tolerance(residual))) ** 2, 0.0) ** 2
        weighted = basis * weight[:, None]
        # a little of the identity: points on one line do not decide all three numbers
        affine = np.linalg.solve(weighted.T @ basis + 1e-3 * np.eye(3), weighted.T @ vectors)
    return affine


def _lengths(vectors: np.ndarray) -> np.ndarray:
    lengths: np.ndarray = np.hypot(vectors[:, 0], vectors[:, 1])
    return lengths


def _tolerance(residual: np.ndarray) -> float:
    """Return how far a point may be from the dominant motion and still follow it, pixels."""
    if not residual.size:
        return _MIN_TOLERANCE_PX
    return max(_MIN_TOLERANCE_PX, _TOLERANCE * float(np.median(residual)))
