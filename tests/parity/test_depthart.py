"""DepthART computes what its official implementation computes, and the replay notices when it does not."""

from pathlib import Path

import pytest

from nextscale.parity.case import read_case
from nextscale.parity.replay import replay

CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.stem for path in CASES.glob("depthart_*.npz"))


def test_the_networks_operations_have_a_case():
    assert {read_case(CASES / f"{n}.npz").operation for n in NAMES} == {
        "teacher_forcing",
        "train_step",
        "sample",
        "normalize",
    }


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
