"""Every case that is kept computes what its official implementation computes, and no altered value goes unnoticed."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from nextscale.parity.case import Case, read_case
from nextscale.parity.replay import operations_of

CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.stem for path in CASES.glob("*.npz"))


@cache
def computed(name: str) -> tuple[Case, dict[str, Any]]:
    """A case and what is computed here."""
    case = read_case(CASES / f"{name}.npz")
    return case, operations_of(case.system)[case.operation](case)


@pytest.mark.parametrize("name", NAMES)
def test_case(name: str) -> None:
    case, outputs = computed(name)
    assert [error for error in case.errors(outputs) if not error.passed] == []
    assert case.unused() == []


@pytest.mark.parametrize("name", NAMES)
def test_one_altered_value_of_any_output_fails(name: str) -> None:
    case, outputs = computed(name)
    for output, expected in case.expected.items():
        spec = case.outputs[output]
        altered = expected.copy().reshape(-1)
        place = len(altered) // 2
        whole = expected.dtype.kind in "iub"
        altered[place] += 1 if whole else 3 * (spec["atol"] + spec["rtol"] * abs(altered[place]))
        case.expected[output] = altered.reshape(expected.shape)
        assert {error.output for error in case.errors(outputs) if not error.passed} == {output}
        case.expected[output] = expected
