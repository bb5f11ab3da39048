"""VarFormer computes what its official implementation computes, and the replay notices when it does not."""

import pytest

from nextscale.parity.replay import operations_of, replay


def test_operations():
    named = {"tokenize", "restore", "reconstruct", "train_step", "modules", "metrics", "layout"}
    assert set(operations_of("varformer")) == named


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
