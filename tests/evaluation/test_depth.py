"""Errors of depth against an independent computation, and what holds for any depths."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nextscale.evaluation.depth import (
    HIGHER_IS_BETTER,
    METRICS,
    STANDARD,
    DepthMetricError,
    EmptyMaskError,
    depth_metrics,
    mean_over_images,
    pooled_rmse,
)
from nextscale.evaluation.depth_alignment import ALIGNMENTS, AlignmentError, align

DEPTHS = arrays(np.float64, st.integers(2, 40), elements=st.floats(0.01, 200))
BELOW = {"d1": 1.25, "d2": 1.25**2, "d3": 1.25**3, "d102": 1.02, "d105": 1.05, "d110": 1.1}


def plain(g: list[float], p: list[float]) -> dict[str, float]:
    """All errors, pixel by pixel with exact sums."""
    n = len(g)

    def mean(values):
        return math.fsum(values) / n

    e = [math.log(b) - math.log(a) for a, b in zip(g, p, strict=True)]
    squares = [(a - b) ** 2 for a, b in zip(g, p, strict=True)]
    inverse = [1000 / b - 1000 / a for a, b in zip(g, p, strict=True)]
    middle = mean(e)
    return {
        "abs_rel": mean(abs(a - b) / a for a, b in zip(g, p, strict=True)),
        "sq_rel": mean(s / a for s, a in zip(squares, g, strict=True)),
        "rmse": math.sqrt(mean(squares)),
        "rmse_log": math.sqrt(mean(v * v for v in e)),
        "silog": 100 * math.sqrt(mean((v - middle) ** 2 for v in e)),
        "log10": mean(abs(math.log10(a) - math.log10(b)) for a, b in zip(g, p, strict=True)),
        "mae": mean(abs(a - b) for a, b in zip(g, p, strict=True)),
        "mse": mean(squares),
        "log10_rmse": math.sqrt(mean((math.log10(a) - math.log10(b)) ** 2 for a, b in zip(g, p, strict=True))),
        "irmse": math.sqrt(mean(v * v for v in inverse)),
        "imae": mean(abs(v) for v in inverse),
        **{name: mean(max(a / b, b / a) < ratio for a, b in zip(g, p, strict=True)) for name, ratio in BELOW.items()},
    }


def maps(seed: int, count: int = 5000) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    truth = draw.uniform(0.5, 80, count)
    return truth, truth * np.exp(draw.normal(0.05, 0.3, count))


def test_every_metric_equals_an_exact_sum() -> None:
    for seed in range(3):
        truth, prediction = maps(seed)
        expected = plain(truth.tolist(), prediction.tolist())
        found = depth_metrics(truth, prediction, list(METRICS))
        assert set(expected) == set(METRICS)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-10, abs=1e-10), name


@given(DEPTHS)
def test_a_perfect_prediction_is_perfect(truth: np.ndarray) -> None:
    for name, value in depth_metrics(truth, truth, list(METRICS)).items():
        assert value == (1 if name in HIGHER_IS_BETTER else 0), name


@given(DEPTHS, st.floats(0.01, 100))
def test_silog_does_not_see_a_scale(truth: np.ndarray, scale: float) -> None:
    prediction = truth[::-1] * scale
    plainly = depth_metrics(truth, truth[::-1].copy(), ["silog"])["silog"]
    assert depth_metrics(truth, prediction, ["silog"])["silog"] == pytest.approx(plainly, rel=1e-6, abs=1e-6)


@given(DEPTHS, st.floats(0.01, 100))
def test_relative_errors_do_not_see_a_unit(truth: np.ndarray, unit: float) -> None:
    """Metres or feet: what has no unit stays."""
    prediction = truth[::-1].copy()
    names = ["abs_rel", "rmse_log", "log10", "silog"]
    before, after = depth_metrics(truth, prediction, names), depth_metrics(truth * unit, prediction * unit, names)
    for name in names:
        assert after[name] == pytest.approx(before[name], rel=1e-9, abs=1e-9)


def test_thresholds_are_strict() -> None:
    assert depth_metrics(np.array([4.0]), np.array([5.0]), ["d1"])["d1"] == 0
    assert depth_metrics(np.array([4.0]), np.array([4.999]), ["d1"])["d1"] == 1


def test_zero_and_infinite_predictions_are_as_wrong_as_can_be() -> None:
    found = depth_metrics(np.array([2.0, 2.0]), np.array([0.0, 2.0]))
    assert found["rmse_log"] == found["log10"] == math.inf and found["d3"] == 0.5 and math.isnan(found["silog"])
    assert depth_metrics(np.array([2.0]), np.array([math.inf]), ["rmse", "d3"]) == {"rmse": math.inf, "d3": 0}


@pytest.mark.parametrize(
    ("truth", "prediction", "message"),
    [
        ([1.0], [math.nan], "1 of 1 predicted depths are negative or NaN"),
        ([1.0, 2.0], [-1.0, 2.0], "1 of 2 predicted depths are negative"),
        ([0.0], [1.0], "true depths are zero"),
        ([math.inf], [1.0], "infinite"),
        ([math.nan], [1.0], "NaN"),
        ([1.0, 2.0], [1.0], "as many"),
    ],
)
def test_what_has_no_error_is_refused(truth: list[float], prediction: list[float], message: str) -> None:
    with pytest.raises(DepthMetricError, match=message):
        depth_metrics(np.array(truth), np.array(prediction))


def test_no_pixels_and_unknown_metrics_are_refused() -> None:
    with pytest.raises(EmptyMaskError, match="no pixel"):
        depth_metrics(np.zeros(0), np.zeros(0))
    with pytest.raises(DepthMetricError, match="unknown metrics d9; known: abs_rel"):
        depth_metrics(np.ones(1), np.ones(1), ["d9"])


def test_means_over_images_and_the_older_pooled_error() -> None:
    assert mean_over_images([{"rmse": 1.0}, {"rmse": 3.0}]) == {"rmse": 2.0}
    assert pooled_rmse([(1.0, 30), (3.0, 10)]) == pytest.approx(math.sqrt(3))
    with pytest.raises(DepthMetricError, match="no image"):
        mean_over_images([])
    with pytest.raises(DepthMetricError, match="different metrics"):
        mean_over_images([{"rmse": 1.0}, {"d1": 1.0}])
    with pytest.raises(EmptyMaskError):
        pooled_rmse([])


# --- alignment ----------------------------------------------------------------------------------------

FITS = {
    # name: prediction made from the truth, which the alignment undoes
    "median": lambda g: g * 0.3,
    "median_of_ratios": lambda g: g * 0.3,
    "scale": lambda g: g * 0.3,
    "scale_shift": lambda g: g * 0.3 + 2,
    "inverse_scale_shift": lambda g: 1 / (0.2 / g + 0.01),
    "log_scale_shift": lambda g: np.exp(0.5 * np.log(g) + 1),
    "log_median": lambda g: g * 0.3,
    "median_shift": lambda g: g + 2,
}


@pytest.mark.parametrize("name", FITS)
def test_an_alignment_undoes_what_it_fits(name: str) -> None:
    truth, _ = maps(1)
    prediction = FITS[name](truth)
    assert np.allclose(align(truth, prediction, name)(prediction), truth, rtol=1e-10)


@pytest.mark.parametrize(
    "name", ["median", "median_of_ratios", "scale", "scale_shift", "log_scale_shift", "log_median"]
)
@settings(max_examples=30)
@given(data=st.data())
def test_aligned_errors_do_not_see_a_scale(name: str, data: st.DataObject) -> None:
    truth = data.draw(DEPTHS)
    scale = data.draw(st.floats(0.05, 20))
    prediction = truth[::-1] * 0.7 + 0.1
    first = align(truth, prediction, name)(prediction)
    second = align(truth, prediction * scale, name)(prediction * scale)
    assert np.allclose(first, second, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["scale", "scale_shift", "log_scale_shift", "inverse_scale_shift"])
def test_least_squares_is_least(name: str) -> None:
    truth, prediction = maps(2, 400)
    fitted = align(truth, prediction, name)
    into = {"depth": lambda x: x, "log": np.log, "inverse": lambda x: 1 / x}[fitted.space]
    x, y = into(prediction), into(truth)
    design = x[:, None] if name == "scale" else np.stack([x, np.ones_like(x)], axis=1)
    solution = np.linalg.lstsq(design, y, rcond=None)[0]
    assert fitted.scale == pytest.approx(solution[0], rel=1e-10)
    assert fitted.shift == pytest.approx(solution[1] if name != "scale" else 0, rel=1e-9, abs=1e-12)


def test_medians_of_an_even_count() -> None:
    truth, prediction = np.array([1.0, 2.0, 4.0, 8.0]), np.array([1.0, 1.0, 1.0, 1.0])
    assert align(truth, prediction, "median").scale == 3
    assert align(truth, prediction, "median_of_ratios").scale == 2


def test_constant_predictions_and_zeros_are_aligned_where_that_has_a_meaning() -> None:
    truth = np.array([1.0, 2.0, 3.0])
    assert align(truth, np.full(3, 5.0), "scale_shift")(np.full(3, 5.0)).tolist() == [2, 2, 2]
    assert align(truth, np.array([0.0, 1.0, 1.0]), "median_of_ratios").scale == 3
    with pytest.raises(AlignmentError, match="median is 0"):
        align(truth, np.zeros(3), "median")
    with pytest.raises(AlignmentError, match="1 of 3 depths are not positive"):
        align(truth, np.array([0.0, 1.0, 1.0]), "log_scale_shift")
    with pytest.raises(AlignmentError, match="1 of 3 depths are infinite or NaN"):
        align(truth, np.array([math.nan, 1.0, 1.0]), "median")
    with pytest.raises(AlignmentError, match="unknown alignment 'best'; known: none"):
        align(truth, truth, "best")
    assert set(ALIGNMENTS) >= {*FITS, "none", "mean_deviation"} and len(STANDARD) == 9
