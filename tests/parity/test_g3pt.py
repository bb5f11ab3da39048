"""3D metrics are what occupancy_networks and 3DShape2VecSet compute, and the replay notices when they are not."""

from pathlib import Path

import pytest

from nextscale.parity.case import read_case
from nextscale.parity.replay import operations_of, replay

CASE = Path(__file__).parent / "cases" / "g3pt_metrics.npz"


def test_the_case_passes():
    assert replay(CASE).passed


def test_one_altered_value_of_any_output_fails():
    case = read_case(CASE)
    outputs = operations_of("g3pt")["metrics"](case)
    for output, expected in case.expected.items():
        spec, altered = case.outputs[output], expected.copy()
        last = altered.reshape(-1)[-1:]
        last += 3 * (spec["atol"] + spec["rtol"] * abs(last)) + 1e-12
        case.expected[output] = altered
        assert {error.output for error in case.errors(outputs) if not error.passed} == {output}
        case.expected[output] = expected


@pytest.mark.parametrize("thresholds", [[0.1], [0.001, 0.002, 0.005, 0.01]])
def test_options_come_from_the_case(changed, thresholds):
    result = replay(changed("g3pt_metrics", lambda meta, arrays: meta["options"].update({"thresholds": thresholds})))
    wrong = {error.output for error in result.errors if not error.passed}
    assert not result.passed
    assert not wrong - {"precision", "recall", "f_score"}
