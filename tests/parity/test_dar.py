"""DAR computes what its official implementation computes, and the replay notices when it does not."""

from pathlib import Path

import pytest

from nextscale.parity.replay import replay

CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.stem for path in CASES.glob("dar_*.npz"))


def test_there_are_cases():
    assert len(NAMES) >= 3


def test_the_depth_range_comes_from_the_case(changed):
    result = replay(changed("dar_decoder_80m", lambda meta, arrays: meta["config"]["decoder"].update(max_depth=40.0)))
    assert not result.problems and any(not error.passed for error in result.errors)


def test_unknown_values_fail(changed):
    def add(meta, arrays):
        meta["options"]["nosuch"] = 1
        meta["config"]["decoder"]["nosuch"] = 1

    [problem] = replay(changed("dar_decoder_80m", add)).problems
    assert "options.nosuch" in problem and "config.decoder.nosuch" in problem


@pytest.mark.parametrize(
    ("part", "argument", "value"),
    [("decoder", "q_dim", 16), ("transformer", "mid_dim", 20), ("fixed", "query_tokens", 6), ("fixed", "bins", 8)],
)
def test_configuration_that_contradicts_the_weights(changed, part, argument, value):
    change = lambda meta, arrays: meta["config"][part].update({argument: value})  # noqa: E731
    result = replay(changed("dar_decoder_80m", change))
    assert not result.passed and result.problems


def test_random_draws_of_train_form_are_refused(changed):
    change = lambda meta, arrays: meta["config"]["transformer"].update(mid_drop_rate=0.1)  # noqa: E731
    [problem] = replay(changed("dar_train_step", change)).problems
    assert "mid_drop_rate" in problem
