"""STAR computes what its official implementation computes, and the replay notices when it does not."""

from pathlib import Path

import pytest

from nextscale.parity.case import read_case
from nextscale.parity.replay import operations_of, replay

CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.stem for path in CASES.glob("star_*.npz"))


def test_every_operation_has_a_case():
    assert {read_case(CASES / f"{name}.npz").operation for name in NAMES} == set(operations_of("star"))


@pytest.mark.parametrize(
    ("name", "section", "value"),
    [
        ("star_sample_stable", "options", {"cfg": 1.0}),
        ("star_sample_stable", "options", {"sample_version": "new"}),
        ("star_train_sampler", "options", {"label_smoothing": 0.5}),
        ("star_forward_plain", "config", {"enable_logit_norm": True}),
        ("star_train_drop", "config", {"rope_theta": 2.0}),
    ],
)
def test_options_come_from_the_case(changed, name, section, value):
    def alter(meta, arrays):
        (meta["options"] if section == "options" else meta["config"]["transformer"]).update(value)

    result = replay(changed(name, alter))
    assert not result.passed and not result.problems


@pytest.mark.parametrize(
    ("part", "argument", "value"),
    [
        ("transformer", "num_heads", 5),
        ("transformer", "rotary_pos_emb", True),
        ("transformer", "noise_sampling", True),
        ("transformer", "in_dim_cross", 8),
    ],
)
def test_configuration_that_contradicts_the_weights(changed, part, argument, value):
    result = replay(changed("star_forward_plain", lambda meta, arrays: meta["config"][part].update({argument: value})))
    assert not result.passed and result.problems


@pytest.mark.parametrize("name", ["star_forward_plain", "star_tables_256"])
def test_unknown_values_fail(name, changed):
    result = replay(changed(name, lambda meta, arrays: meta["options"].update({"nosuch": 1})))
    assert not result.passed
    [problem] = result.problems
    assert "options.nosuch" in problem
