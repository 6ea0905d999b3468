"""Score `area_fraction`: the share of the picture that a text detector finds covered by text.

The detector is that of RapidOCR (PP-OCR, ONNX), whose package brings its weights: nothing is
fetched. Nothing is read, so it does not matter in which language the text is.
"""

from pathlib import Path

import cv2
import numpy as np
import rapidocr

from ursa.annotation.records import Measurement, SeenClip


class TextAreaScorer:
    """Score `area_fraction`: mean over frames of the share of pixels in boxes, in [0, 1]."""

    def __init__(self) -> None:
        """Load the detector."""
        self._detector = rapidocr.RapidOCR(
            params={
                "Global.log_level": "critical",
                "Det.model_path": str(detector_path()),
                # one core an actor, and sums in one order
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def __call__(self, seen: SeenClip) -> Measurement:
        """Measure a clip.

        Args:
            seen: Frames of a clip.
        """
        shares = [self._share(frame) for frame in seen.frames]
        return Measurement(scores={"area_fraction": float(np.mean(shares))})

    def _share(self, frame: np.ndarray) -> float:
        found = self._detector(
            cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), use_det=True, use_cls=False, use_rec=False
        )
        covered = np.zeros(frame.shape[:2], np.uint8)
        if found.boxes is not None:
            for box in found.boxes:
                cv2.fillPoly(covered, [np.round(box).astype(np.int32)], 1)
        return float(covered.mean())


def detector_path() -> Path:
    """Return the weights of the detector, which lie in the package."""
    return sorted((Path(rapidocr.__file__).parent / "models").glob("*det*.onnx"))[0]
