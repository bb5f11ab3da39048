"""LiteVAR computes what its published code computes, and the replay notices when it does not."""

from pathlib import Path

import numpy as np
import pytest

from nextscale.parity.case import read_case
from nextscale.parity.replay import operations_of, replay

CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.stem for path in CASES.glob("litevar_*.npz"))


def test_cases_are_there() -> None:
    assert {read_case(CASES / f"{name}.npz").operation for name in NAMES} == {"sample", "quantize", "quantized_block"}
    assert set(operations_of("litevar")) == {"attention", "sample", "quantize", "quantized_block"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("litevar_block_quant_w4a8", {"bits": {"weight": 5, "activation": 8, "attention": 8}}),
        ("litevar_block_quant_w4a8", {"skip": []}),
        ("litevar_block_quant_w4a8", {"quantize_attention": False}),
        ("litevar_block_quant_w4a8", {"lengths": [1, 13]}),
        ("litevar_block_quant_w4a8", {"block": 1}),
    ],
)
def test_options_come_from_the_case(changed, name, options) -> None:
    result = replay(changed(name, lambda meta, arrays: meta["options"].update(options)))
    assert not result.passed and not result.problems


@pytest.mark.parametrize("name", NAMES)
def test_unknown_options_fail(changed, name) -> None:
    result = replay(changed(name, lambda meta, arrays: meta["options"].update(nosuch=1)))
    assert not result.passed and "options.nosuch" in result.problems[0]


def test_masks_and_modes(changed) -> None:
    def full(meta, arrays):
        arrays["in/masks"] = np.ones_like(arrays["in/masks"])

    def wrong(meta, arrays):
        meta["options"]["mode"] = 3

    assert not replay(changed("litevar_sample_shared", full)).passed
    assert "mode 3 is none of" in replay(changed("litevar_sample_shared", wrong)).problems[0]
