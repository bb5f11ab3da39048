"""Infinity computes what its official implementation computes, and the replay notices when it does not."""

from pathlib import Path

import pytest

from nextscale.parity.case import read_case
from nextscale.parity.replay import operations_of, replay

CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.stem for path in CASES.glob("infinity_*.npz"))


def test_every_operation_has_a_case():
    assert {read_case(CASES / f"{name}.npz").operation for name in NAMES} == set(operations_of("infinity"))


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("infinity_sample_drawn", "top_p", 0.6),
        ("infinity_sample_drawn", "seed", 1),
        ("infinity_sample_drawn", "cfg", [1.0, 1.0, 1.0, 1.0]),
        ("infinity_sample_drawn", "cfg_insertion_layer", [-2]),
        ("infinity_forward", "cross_attention", "bfloat16"),
        ("infinity_forward", "rope_grid", [8, 8]),
        ("infinity_train_step_truncated", "reweight", True),
        ("infinity_train_step_truncated", "bitloss_type", "mean"),
    ],
)
def test_options_come_from_the_case(changed, name, option, value):
    result = replay(changed(name, lambda meta, arrays: meta["options"].update({option: value})))
    assert not result.passed and not result.problems


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("rope2d_normalized_by_hw", 1),
        ("rope2d_normalized_by_hw", 0),
        ("add_lvl_embeding_only_first_block", 0),
    ],
)
def test_arguments_come_from_the_case(changed, argument, value):
    alter = {argument: value}
    result = replay(changed("infinity_forward", lambda meta, arrays: meta["config"]["transformer"].update(alter)))
    assert not result.passed and not result.problems


@pytest.mark.parametrize(
    ("part", "argument", "value"),
    [
        ("transformer", "num_heads", 8),
        ("transformer", "swiglu", True),
        ("tokenizer", "codebook_dim", 4),
        ("tokenizer", "use_out_phi", True),
    ],
)
def test_configuration_that_contradicts_the_weights(changed, part, argument, value):
    result = replay(
        changed("infinity_sample_drawn", lambda meta, arrays: meta["config"][part].update({argument: value}))
    )
    assert not result.passed and result.problems


@pytest.mark.parametrize("name", ["infinity_forward", "infinity_sample_drawn", "infinity_schedules", "infinity_rope"])
def test_unknown_values_fail(name, changed):
    def add(meta, arrays):
        meta["options"]["nosuch"] = 1

    result = replay(changed(name, add))
    assert not result.passed
    [problem] = result.problems
    assert "options.nosuch" in problem
