"""VarFormer computes what its official implementation computes, and the replay notices when it does not."""

from functools import cache
from pathlib import Path

import pytest

from nextscale.parity.case import read_case
from nextscale.parity.replay import operations_of, replay

CASES = Path(__file__).parent / "cases"
NAMES = ("varformer_restore_batch2_adjust", "varformer_stage1_shared", "varformer_train_stage1")


@cache
def computed(name: str):
    """A case, and the outputs its errors are taken of."""
    case = read_case(CASES / f"{name}.npz")
    return case, operations_of("varformer")[case.operation](case)


def test_operations():
    named = {"tokenize", "restore", "reconstruct", "train_step", "modules", "metrics", "layout"}
    assert set(operations_of("varformer")) == named


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


def test_options_come_from_the_case(changed):
    result = replay(changed("varformer_stage1_shared", lambda meta, arrays: meta["options"].update(guidance=0.5)))
    assert {"logits", "alone.logits"} <= {error.output for error in result.errors if not error.passed}


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("patch_nums", [1, 2, 3, 4], "are not the tokenizer's"),
        ("type", "VarFormer3", "unknown network"),
        ("div_part", 1, "loading state_dict"),
        ("fix_modules", ["encoder", "decoder"], "is trained there, not here"),
    ],
)
def test_contradictions_are_told(changed, name, value, told):
    def change(meta, arrays):
        meta["config"]["model"][name] = value

    case = "varformer_train_stage1" if name == "fix_modules" else "varformer_stage1_shared"
    (problem,) = replay(changed(case, change)).problems
    assert told in problem
