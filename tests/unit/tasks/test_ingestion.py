import pytest

from tasks.ingestion import describe_tokenizer
from ursa.artifacts import TokenizerRef

PCA = {"psnr_pca_train": 20.0, "psnr_pca_validation": 19.0}
USE = {"codes_used": 312.0, "code_perplexity": 80.5}


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (
            {**PCA, **USE, "psnr_train": 24.26, "psnr_validation": 22.0, "kept_pca": 0.0},
            "visual tokenizer fitted: PSNR 24.3 dB on training clips, 22.0 dB on held-out clips; "
            "312 of 4096 codes used",
        ),
        (
            {"psnr_pca_train": 20.0, **USE, "psnr_train": 20.0, "kept_pca": 1.0},
            "visual tokenizer kept from its PCA start: PSNR 20.0 dB on training clips; "
            "312 of 4096 codes used",
        ),
        ({}, "visual tokenizer of 4096 codes, taken as it is"),
    ],
)
def test_tokenizer_is_described_in_a_sentence(metrics: dict[str, float], expected: str) -> None:
    tokenizer = TokenizerRef(
        manifest_uri="m", directory_uri="d", kind="visual", vocab_size=4096, metrics=metrics,
        fingerprint="f",
    )  # fmt: skip
    assert describe_tokenizer(tokenizer) == expected
