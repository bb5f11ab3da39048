"""FlowAR computes what its official implementation computes, and the replay notices when it does not."""

from pathlib import Path

import pytest

from nextscale.parity.case import read_case
from nextscale.parity.replay import operations_of, replay

CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.stem for path in CASES.glob("flowar_*.npz"))


def test_every_operation_has_a_case():
    assert {read_case(CASES / f"{name}.npz").operation for name in NAMES} == set(operations_of("flowar"))


@pytest.mark.parametrize(("option", "value"), [("cfg", 1.5), ("guidance", 0.1), ("num_steps", 6)])
def test_options_come_from_the_case(changed, option, value):
    result = replay(changed("flowar_sample_four", lambda meta, arrays: meta["options"].update({option: value})))
    assert not result.problems and any(not error.passed for error in result.errors)


def test_unknown_values_fail(changed):
    def add(meta, arrays):
        meta["options"]["nosuch"] = 1
        meta["config"]["transformer"]["nosuch"] = 1

    [problem] = replay(changed("flowar_forward_cross", add)).problems
    assert all(name in problem for name in ("options.nosuch", "config.transformer.nosuch"))


@pytest.mark.parametrize(
    ("name", "part", "argument", "value", "why"),
    [
        ("flowar_vae", "tokenizer", "ch_mult", [1, 1, 2, 2, 2], "the arguments say"),
        ("flowar_vae", "tokenizer", "resolution", 128, "the arguments say"),
        ("flowar_forward_cross", "transformer", "diffloss_w", 64, "size mismatch"),
        ("flowar_forward_cross", "transformer", "patch_size", 2, "runs with 1 only"),
        ("flowar_forward_cross", "transformer", "proj_dropout", 0.1, "no case can be met"),
        ("flowar_forward_cross", "transformer", "img_size", 256, "do not end at 16"),
    ],
)
def test_configuration_that_contradicts_the_weights(changed, name, part, argument, value, why):
    result = replay(changed(name, lambda meta, arrays: meta["config"][part].update({argument: value})))
    assert not result.passed and why in result.trace + "".join(result.problems)
