import importlib.util

import cv2
import numpy as np
import pytest

from ursa.annotation.records import SeenClip
from ursa.annotation.scorers import check_scorers, load_scorer, resolve_scorers
from ursa.config import AnnotationConfig
from ursa.errors import ConfigError

HAS_OCR = all(importlib.util.find_spec(name) for name in ("rapidocr", "onnxruntime"))
CONFIG = AnnotationConfig.model_validate(
    {
        "captioner": None,
        "scorers": {"ocr": {"kind": "text_area"}},
        "device": "cpu",
        "clips_per_unit": 2,
        "max_failed_fraction": 0.0,
    }
)


@pytest.mark.skipif(not HAS_OCR, reason="needs the extra `ocr`")
def test_text_is_found_where_it_is():
    (scorer,) = resolve_scorers(CONFIG)
    measure = load_scorer(scorer, CONFIG)
    plain = np.full((1, 160, 320, 3), 90, np.uint8)
    lettered = plain.copy()
    (width, height), _ = cv2.getTextSize("HELLO WORLD", cv2.FONT_HERSHEY_SIMPLEX, 1.2, 3)
    cv2.putText(
        lettered[0], "HELLO WORLD", (20, 90), cv2.FONT_HERSHEY_SIMPLEX, 1.2, (255, 255, 255), 3
    )
    share = width * height / (160 * 320)
    assert measure(SeenClip(plain, None)).scores == {"area_fraction": 0.0}
    both = measure(SeenClip(np.concatenate([plain, lettered]), None)).scores["area_fraction"]
    assert 0.7 * share / 2 < both < 2.5 * share / 2
    assert scorer.model_name.startswith("rapidocr@")


@pytest.mark.skipif(HAS_OCR, reason="the extra `ocr` is installed")
def test_the_extra_is_named():
    with pytest.raises(ConfigError, match=r"pip install 'ursa-pipeline\[ocr\]'"):
        check_scorers(CONFIG)
