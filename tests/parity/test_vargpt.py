"""VARGPT computes what its official implementations compute, and the replay notices when it does not."""

from pathlib import Path

import pytest

from nextscale.parity.case import read_case
from nextscale.parity.replay import operations_of, replay

CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.stem for path in CASES.glob("vargpt_*.npz"))


def test_every_operation_has_a_case():
    assert {read_case(CASES / f"{name}.npz").operation for name in NAMES} == set(operations_of("vargpt"))


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("vargpt_v1_generate_noise", "top_p", 0.3),
        ("vargpt_v11_generate", "cross_attention", "bfloat16"),
        ("vargpt_v11_generate", "guidance", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_options_come_from_the_case(changed, name, option, value):
    result = replay(changed(name, lambda meta, arrays: meta["options"].update({option: value})))
    assert not result.passed and not result.problems


@pytest.mark.parametrize(
    ("part", "argument", "value"), [("decoder", "num_heads", 4), ("tokenizer", "v_patch_nums", [1, 2, 4])]
)
def test_configuration_that_contradicts_the_weights(changed, part, argument, value):
    alter = {argument: value}
    result = replay(changed("vargpt_v1_generate_noise", lambda meta, arrays: meta["config"][part].update(alter)))
    assert not result.passed and result.problems


def test_unknown_values_fail(changed):
    result = replay(changed("vargpt_v1_understand", lambda meta, arrays: meta["options"].update(nosuch=1)))
    assert not result.passed
    [problem] = result.problems
    assert "options.nosuch" in problem
