"""FlexVAR computes what its official implementation computes, and the replay notices when it does not."""

from pathlib import Path

import pytest

from nextscale.parity.case import read_case
from nextscale.parity.replay import operations_of, replay

CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.stem for path in CASES.glob("flexvar_*.npz"))


def test_every_operation_has_a_case():
    assert {read_case(CASES / f"{name}.npz").operation for name in NAMES} == set(operations_of("flexvar"))


@pytest.mark.parametrize(
    ("option", "value"),
    [("cfg", 2.0), ("guidance", "var"), ("invalid_ids", None), ("top_k", 3)],
)
def test_options_come_from_the_case(changed, option, value):
    result = replay(changed("flexvar_sample_llamagen", lambda meta, arrays: meta["options"].update({option: value})))
    # What is drawn is always the likeliest here, so a wider filter shows in what was asked for alone.
    assert not result.problems and any(not error.passed for error in result.errors)


def test_unknown_values_fail(changed):
    def add(meta, arrays):
        meta["options"]["nosuch"] = 1
        for part in meta["config"].values():
            part["nosuch"] = 1

    [problem] = replay(changed("flexvar_forward_shared_aln", add)).problems
    assert all(name in problem for name in ("options.nosuch", "config.tokenizer.nosuch", "config.transformer.nosuch"))


@pytest.mark.parametrize(
    ("name", "part", "argument", "value"),
    [
        ("flexvar_tokenizer_upscaled", "tokenizer", "codebook_size", 64),
        ("flexvar_tokenizer_upscaled", "tokenizer", "decoder_ch_mult", [1, 1, 2, 2, 2]),
        ("flexvar_forward_shared_aln", "transformer", "embed_dim", 32),
    ],
)
def test_configuration_that_contradicts_the_weights(changed, name, part, argument, value):
    result = replay(changed(name, lambda meta, arrays: meta["config"][part].update({argument: value})))
    assert not result.passed and result.problems
