"""CoDe computes what its official implementation computes, and the replay notices when it does not."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nextscale.core.schedule import ScaleSchedule
from nextscale.parity.case import read_case
from nextscale.parity.code import first_positions
from nextscale.parity.replay import operations_of, replay

CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.stem for path in CASES.glob("code_*.npz"))


def test_every_operation_has_a_case():
    assert {read_case(CASES / f"{name}.npz").operation for name in NAMES} == set(operations_of("code"))


@pytest.mark.parametrize("name", NAMES)
def test_values_that_nothing_reads_fail(name, changed):
    def add(meta, arrays):
        meta["options"]["nosuch"] = 1
        for part in meta["config"].values():
            part["nosuch"] = 1

    result = replay(changed(name, add))
    assert not result.passed and "options.nosuch" in result.problems[0]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("draft_steps", 5),
        ("cfg", 2.0),
        ("top_k", [5] * 10),
        ("temperature", [1.0] * 10),
        ("seed", 1),
        ("more_smooth", True),
    ],
)
def test_options_come_from_the_case(changed, option, value):
    result = replay(changed("code_seeded_9", lambda meta, arrays: meta["options"].update({option: value})))
    assert not result.passed and not result.problems


@pytest.mark.parametrize("count", [1, 2, 5, 11, 30])
def test_the_first_positions_see_what_they_see_in_the_whole_but_for_what_is_cut(count):
    """Of a scale that is cut, what is left sees itself and all earlier scales."""
    schedule = ScaleSchedule.squares(1, 2, 3, 4)
    kept = first_positions(schedule, count)
    assert kept.length == count
    assert torch.equal(kept.levels(), schedule.levels()[:count])
    assert torch.equal(kept.mask(), schedule.mask()[:count, :count])
    seen = np.concatenate([np.full(s.stop - s.start, s.visible) for s in kept.segments])
    assert seen.tolist() == kept.mask().sum(1).tolist()
