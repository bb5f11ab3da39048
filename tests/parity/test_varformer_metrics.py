"""PSNR and SSIM are those of the published code, and an altered picture is noticed."""

from pathlib import Path

import numpy as np

from nextscale.parity.case import read_case
from nextscale.parity.varformer_metrics import metrics

CASE = Path(__file__).parent / "cases" / "varformer_metrics.npz"


def test_figures_are_equal_to_a_millionth() -> None:
    case = read_case(CASE)
    outputs = metrics(case)
    for name in ("psnr", "ssim"):
        np.testing.assert_allclose(outputs[name], case.expected[name], rtol=0, atol=1e-6)
    assert all(error.passed for error in case.errors(outputs)) and not case.unused()


def test_an_altered_value_fails(changed) -> None:
    def alter(meta, arrays):
        arrays["in/image"][30, 30, 1] ^= 64

    case = read_case(changed("varformer_metrics", alter))
    assert not any(error.passed for error in case.errors(metrics(case)))

    def crop(meta, arrays):
        meta["options"]["settings"][0][0] = 1

    case = read_case(changed("varformer_metrics", crop))
    assert not all(error.passed for error in case.errors(metrics(case)))
