"""Figures of shapes against sums written out, and properties of figures of sets."""

import math

import numpy as np
import pytest

from nextscale.evaluation.shape_sets import chamfer_distances, compare_sets, floor_figures, set_figures
from nextscale.evaluation.shapes import CONVENTIONS, compare_clouds, volume_iou

DRAW = np.random.default_rng(0)
A, B = DRAW.normal(size=(40, 3)), DRAW.normal(size=(30, 3))


def test_figures_are_the_sums_of_their_definitions() -> None:
    na, nb = DRAW.normal(size=A.shape), DRAW.normal(size=B.shape)
    figures = compare_clouds(A, B, (0.3, 0.8), na, nb)
    distances = np.linalg.norm(A[:, None] - B[None], axis=-1)
    a, c = distances.min(1), distances.min(0)
    assert figures.chamfer_l1 == pytest.approx((a.mean() + c.mean()) / 2)
    assert figures.chamfer_l2 == pytest.approx(((a**2).mean() + (c**2).mean()) / 2)
    assert figures.chamfer_sum == pytest.approx(2 * figures.chamfer_l1)
    for place, threshold in enumerate((0.3, 0.8)):
        p, r = (a < threshold).mean(), (c < threshold).mean()
        assert figures.f_score[place] == pytest.approx(2 * p * r / (p + r) if p + r else 0)
    cosine = abs((na * nb[distances.argmin(1)]).sum(1)) / (
        np.linalg.norm(na, axis=1) * np.linalg.norm(nb[distances.argmin(1)], axis=1)
    )
    assert figures.normals_accuracy == pytest.approx(cosine.mean())
    same = compare_clouds(A, A, (1e-9,), na, -3 * na)
    assert same.chamfer_l1 == 0 and same.f_score == (1.0,) and same.normals == pytest.approx(1)


def test_empty_predictions_have_the_figures_of_occupancy_networks() -> None:
    figures = compare_clouds(np.zeros((0, 3)), B, (0.1,), np.zeros((0, 3)), B)
    assert figures.chamfer_l1 == pytest.approx(math.sqrt(3)) and figures.chamfer_l2 == 3
    assert figures.normals == -1 and figures.f_score == (0.0,)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="not finite"):
        compare_clouds(A, np.array([[0, 0, math.nan]]))
    with pytest.raises(ValueError, match="no points"):
        compare_clouds(A, np.zeros((0, 3)))
    with pytest.raises(ValueError, match="normals"):
        compare_clouds(A, B, (), A)
    with pytest.raises(ValueError, match="common points"):
        volume_iou(np.ones(3), np.ones(4))


def test_volume_iou() -> None:
    first = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    second = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    assert volume_iou(first, second).tolist() == [pytest.approx(1 / 3), 1, 0]
    assert CONVENTIONS["3dshape2vecset"].thresholds == (0.02,)


def blobs(seed: int, number: int, size: float = 1.0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.normal(size=(24, 3)) * draw.uniform(0.5, 1.5, 3) * size for _ in range(number)]


def test_sets_of_one_kind_cannot_be_told_apart_and_others_can() -> None:
    references = blobs(0, 24)
    alike, other = compare_sets(references, blobs(1, 24)), compare_sets(references, blobs(2, 24, 3.0))
    assert 0.25 < alike.accuracy < 0.75 and other.accuracy > 0.95
    assert alike.coverage > other.coverage and alike.mmd < other.mmd
    assert 0.2 < floor_figures(chamfer_distances(references)).accuracy < 0.8
    copies = compare_sets(references, references)
    assert copies.coverage == 1 and copies.mmd == 0 and copies.accuracy < 0.1
    one = compare_sets(references, [references[0]] * 24)
    assert one.coverage == pytest.approx(1 / 24)


def test_set_figures_written_out() -> None:
    between = np.array([[1.0, 2.0, 3.0], [4.0, 0.5, 6.0]])
    references, generated = np.array([[0, 0.7], [0.7, 0]]), np.full((3, 3), 1.5)
    figures = set_figures(between, references, generated)
    # Nearest references of the generated ones: 0, 1, 0.
    assert figures.coverage == 1 and figures.mmd == pytest.approx(750)
    # References: 0.7 < 1 right, 0.7 > 0.5 wrong; generated: 1.5 > 1 wrong, 1.5 > 0.5 wrong, 1.5 < 3 right.
    assert figures.accuracy == pytest.approx(2 / 5)
    with pytest.raises(ValueError, match="2 or more"):
        set_figures(between[:1], references[:1, :1], generated)
