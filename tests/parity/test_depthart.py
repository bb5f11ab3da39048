"""DepthART computes what its official implementation computes, and the replay notices when it does not."""

from functools import cache
from pathlib import Path

import pytest

from nextscale.parity.case import read_case
from nextscale.parity.replay import operations_of, replay

CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.stem for path in CASES.glob("depthart_*.npz"))


@cache
def computed(name: str):
    """A case, and the outputs its errors are taken of."""
    case = read_case(CASES / f"{name}.npz")
    return case, operations_of("depthart")[case.operation](case)


def test_the_networks_operations_have_a_case():
    assert {read_case(CASES / f"{n}.npz").operation for n in NAMES} == {
        "teacher_forcing",
        "train_step",
        "sample",
        "normalize",
    }


@pytest.mark.parametrize("name", NAMES)
def test_case(name):
    case, outputs = computed(name)
    assert not [error for error in case.errors(outputs) if not error.passed] and not case.unused()


@pytest.mark.parametrize("name", NAMES)
def test_one_altered_value_of_any_output_fails(name):
    case, outputs = computed(name)
    for output, expected in case.expected.items():
        spec, altered = case.outputs[output], expected.copy()
        last = altered.reshape(-1)[-1:]
        last += 1 if expected.dtype.kind in "iub" else 3 * (spec["atol"] + spec["rtol"] * abs(last))
        case.expected[output] = altered
        assert {error.output for error in case.errors(outputs) if not error.passed} == {output}
        case.expected[output] = expected


@pytest.mark.parametrize(
    ("name", "part", "argument", "value"),
    [
        ("depthart_mean5", "options", "draws", 4),
        ("depthart_refine_step_noise", "options", "gumbel_seed", 78),
        ("depthart_refine_step_noise", "options", "label_smoothing", 0.1),
        ("depthart_normalize", "normalizer", "quant", 0.9),
        ("depthart_mean5", "BlockConfig", "tau", 2),
    ],
)
def test_options_and_configuration_come_from_the_case(changed, name, part, argument, value):
    def change(meta, arrays):
        places = {"options": meta["options"], "normalizer": meta["config"].get("normalizer")}
        place = places[part] if part in places else meta["config"]["model"][part]
        place[argument] = value

    result = replay(changed(name, change))
    assert not result.passed and not result.problems


def test_what_is_drawn_at_random_is_said(changed):
    def change(meta, arrays):
        meta["config"]["model"]["drop_path_rate"] = 0.1

    result = replay(changed("depthart_refine_step_noise", change))
    assert not result.passed and "drop_path_rate" in result.problems[0]
