"""Power laws: the published form, its units, and the frontier along training curves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextscale.evaluation.power_law import fit_power_law, frontier


@given(st.floats(-0.5, -0.005), st.floats(1e-3, 1e3))
def test_an_exact_law_is_found(exponent: float, coefficient: float) -> None:
    sizes = [0.0185, 0.1, 0.45, 2.0]
    law = fit_power_law(sizes, [(coefficient * n) ** exponent for n in sizes])
    assert law.coefficient is not None
    assert law.exponent == pytest.approx(exponent, rel=1e-6)
    assert np.log(law.coefficient) == pytest.approx(np.log(coefficient), rel=1e-6, abs=1e-6)
    assert law.correlation == pytest.approx(-1) and law.points == 4
    assert law(0.3) == pytest.approx((coefficient * 0.3) ** exponent)


def test_it_is_least_squares_in_logarithms() -> None:
    sizes, losses = [1e6, 3e6, 9e6, 3e7], [5.2, 4.9, 4.5, 4.3]
    law = fit_power_law(sizes, losses)
    assert law.coefficient is not None
    slope, intercept = np.polyfit(np.log(sizes), np.log(losses), 1)
    assert law.exponent == pytest.approx(slope)
    assert law.coefficient == pytest.approx(np.exp(intercept / slope))
    assert law.correlation == pytest.approx(np.corrcoef(np.log(sizes), np.log(losses))[0, 1])
    # In other units of size, only the coefficient changes.
    other = fit_power_law([n / 1e9 for n in sizes], losses)
    assert other.exponent == pytest.approx(slope)
    assert other.coefficient == pytest.approx(law.coefficient * 1e9)


def test_what_has_no_law_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two different sizes"):
        fit_power_law([2.0, 2.0], [3.0, 4.0])
    with pytest.raises(ValueError, match="not finite"):
        fit_power_law([1.0, 2.0], [3.0, float("nan")])
    with pytest.raises(ValueError, match="1 places were given for 2 losses"):
        fit_power_law([1.0], [3.0, 4.0])
    flat = fit_power_law([1.0, 2.0], [3.0, 3.0])
    assert (flat.exponent, flat.correlation, flat.coefficient) == (0.0, 0.0, None)
    steep = fit_power_law([1e-6, 2e-6], [3.001, 3.0])
    assert steep.coefficient is None and steep(1.5e-6) == pytest.approx(3.0004, abs=1e-4)


def test_the_frontier_is_the_best_of_each_cost() -> None:
    small, large = [(1.0, 5.0), (2.0, 4.0), (3.0, 3.9)], [(2.0, 4.5), (4.0, 3.5), (8.0, 3.6)]
    assert frontier(small + large) == [(1.0, 5.0), (2.0, 4.0), (3.0, 3.9), (4.0, 3.5)]
    assert frontier([]) == []
