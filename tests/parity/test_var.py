"""VAR computes what its official implementation computes, and the replay notices when it does not."""

from pathlib import Path

import numpy as np
import pytest

from nextscale.parity.case import read_case
from nextscale.parity.replay import operations_of, replay

CASES = Path(__file__).parent / "cases"
OF_EACH_OPERATION = {
    "tokenize": "var_tok_nonsquare",
    "detokenize": "var_tok_znorm_nonshared_decode",
    "tokenizer_train_step": "var_tok_znorm_nonshared_train",
    "teacher_forcing": "var_forward_shared_aln",
    "sample": "var_sample_seeded",
    "edit": "var_edit",
    "train_step": "var_train_progressive",
    "filter_logits": "var_filter",
    "tables": "var_tables",
    "init_weights": "var_init",
}


def test_every_operation_has_a_case():
    assert set(operations_of("var")) == set(OF_EACH_OPERATION)


@pytest.mark.parametrize("operation", OF_EACH_OPERATION)
def test_altered_file_fails(operation, changed):
    """The same, all the way from the file: the last expected output of the operation's case."""

    def alter(meta, arrays):
        assert meta["operation"] == operation
        name = [key for key in arrays if key.startswith("out/")][-1]
        value = np.nan_to_num(arrays[name].reshape(-1)[-1])
        arrays[name].reshape(-1)[-1] = value + (1 if arrays[name].dtype.kind in "iub" else 1 + abs(value))

    result = replay(changed(OF_EACH_OPERATION[operation], alter))
    assert not result.passed and not result.problems
    assert [error.passed for error in result.errors].count(False) == 1


@pytest.mark.parametrize("operation", OF_EACH_OPERATION)
def test_unknown_values_fail(operation, changed):
    """An option and arguments of the official constructors that this library does not know."""

    def add(meta, arrays):
        meta["options"]["nosuch"] = 1
        for part in meta["config"].values():
            part["nosuch"] = 1

    result = replay(changed(OF_EACH_OPERATION[operation], add))
    assert not result.passed
    [problem] = result.problems
    assert "options.nosuch" in problem
    parts = read_case(CASES / f"{OF_EACH_OPERATION[operation]}.npz").config
    assert all(f"config.{part}.nosuch" in problem for part in parts)


@pytest.mark.parametrize(("option", "value"), [("cfg", 2.0), ("top_k", 3), ("seed", 1), ("more_smooth", True)])
def test_options_come_from_the_case(changed, option, value):
    result = replay(changed("var_sample_seeded", lambda meta, arrays: meta["options"].update({option: value})))
    assert not result.passed and not result.problems


@pytest.mark.parametrize(
    ("name", "part", "argument", "value"),
    [
        ("var_tok_nonsquare", "vae", "vocab_size", 65),
        ("var_tok_nonsquare", "vae", "share_quant_resi", 1),
        ("var_tok_znorm_nonshared_train", "vae", "dropout", 0.1),
    ],
)
def test_configuration_that_contradicts_the_weights(changed, name, part, argument, value):
    result = replay(changed(name, lambda meta, arrays: meta["config"][part].update({argument: value})))
    assert not result.passed and result.problems
