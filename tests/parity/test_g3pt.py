"""3D metrics are what occupancy_networks and 3DShape2VecSet compute, and the replay notices when they are not."""

from pathlib import Path

import pytest

from nextscale.parity.replay import replay

CASE = Path(__file__).parent / "cases" / "g3pt_metrics.npz"


def test_the_case_passes():
    assert replay(CASE).passed


@pytest.mark.parametrize("thresholds", [[0.1], [0.001, 0.002, 0.005, 0.01]])
def test_options_come_from_the_case(changed, thresholds):
    result = replay(changed("g3pt_metrics", lambda meta, arrays: meta["options"].update({"thresholds": thresholds})))
    wrong = {error.output for error in result.errors if not error.passed}
    assert not result.passed
    assert not wrong - {"precision", "recall", "f_score"}
