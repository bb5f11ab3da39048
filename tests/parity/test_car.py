"""CAR computes what its official implementation computes, and the replay notices when it does not."""

from pathlib import Path

import pytest

from nextscale.parity.case import read_case
from nextscale.parity.replay import operations_of, replay

CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.stem for path in CASES.glob("car_*.npz"))


def test_every_operation_but_the_tokenizers_has_a_case():
    assert {read_case(CASES / f"{n}.npz").operation for n in NAMES} == set(operations_of("car")) - {"tokenize"}


@pytest.mark.parametrize(
    ("option", "value", "wrong"),
    [
        ("canny_thresholds", [50, 150], "canny"),
        ("detector_resolution", 256, "detector_size"),
        ("nms_sigma", 1.0, "thin_density"),
        ("sketch_threshold", 60, "sketch_density"),
        ("size", 128, "square"),
    ],
)
def test_options_come_from_the_case(changed, option, value, wrong):
    result = replay(changed("car_preprocess", lambda meta, arrays: meta["options"].update({option: value})))
    assert wrong in {error.output for error in result.errors if not error.passed} and not result.problems


def test_draws_of_stochastic_depth_are_all_asked_for(changed):
    def more(meta, arrays):
        arrays["in/path_keep"] = arrays["in/path_keep"].repeat(2, axis=0)

    (problem,) = replay(changed("car_train_drop", more)).problems
    assert "not all of the 16 draws" in problem
