"""ControlVAR computes what its official implementation computes, and the replay notices when it does not."""

from pathlib import Path

import pytest

from nextscale.parity.case import read_case
from nextscale.parity.replay import operations_of, replay

CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.stem for path in CASES.glob("controlvar_*.npz"))


def test_every_operation_but_the_tokenizers_has_a_case():
    assert {read_case(CASES / f"{n}.npz").operation for n in NAMES} == set(operations_of("controlvar")) - {"tokenize"}


@pytest.mark.parametrize(
    ("option", "value"), [("given", "control"), ("cfg", [2.0, 2.0, 2.0]), ("more_smooth", True), ("top_k", 3)]
)
def test_options_come_from_the_case(changed, option, value):
    result = replay(changed("controlvar_sample_image", lambda meta, arrays: meta["options"].update({option: value})))
    assert not result.passed and not result.problems


@pytest.mark.parametrize(
    ("argument", "value"), [("multi_cond", True), ("separate_decoding", False), ("type_pos", False), ("tau", 2)]
)
def test_configuration_comes_from_the_case(changed, argument, value):
    def change(meta, arrays):
        meta["config"]["var"][argument] = value

    assert not replay(changed("controlvar_forward_options", change)).passed


def test_what_is_not_understood_is_said(changed):
    def change(meta, arrays):
        meta["config"]["var"]["separator"] = True

    result = replay(changed("controlvar_forward_options", change))
    assert not result.passed and "separators" in result.problems[0]
