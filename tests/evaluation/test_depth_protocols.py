"""Protocols: which pixels count, what is done to predictions, and what is refused."""

import math

import numpy as np
import pytest

from nextscale.evaluation.depth import EmptyMaskError, depth_metrics
from nextscale.evaluation.depth_depthart import evaluate, wrong_share
from nextscale.evaluation.depth_ibims import boundaries, planarity
from nextscale.evaluation.depth_maps import merge_mirrored, resize_map
from nextscale.evaluation.depth_pictures import error_picture
from nextscale.evaluation.depth_protocol_list import MONODEPTH2, PROTOCOLS, bts, protocol
from nextscale.evaluation.depth_protocols import Protocol, ProtocolError, changed, compare, evaluate_map
from nextscale.evaluation.depth_published import PUBLISHED, published
from nextscale.evaluation.depth_regions import benchmark_window, crop, eigen_kitti, garg

KITTI_SIZES = {
    # size: garg rows and columns, eigen rows and columns, window's top and left
    (375, 1242): ((153, 371, 44, 1197), (124, 342, 44, 1197), (23, 13)),
    (376, 1241): ((153, 372, 44, 1196), (124, 343, 44, 1196), (24, 12)),
    (374, 1238): ((152, 370, 44, 1193), (124, 341, 44, 1193), (22, 11)),
    (370, 1226): ((151, 366, 44, 1181), (122, 337, 44, 1181), (18, 5)),
    (370, 1224): ((151, 366, 43, 1180), (122, 337, 43, 1180), (18, 4)),
    (352, 1216): ((143, 349, 43, 1172), (117, 321, 43, 1172), (0, 0)),
}


def corners(region) -> tuple[int, int, int, int]:
    return region.top, region.bottom, region.left, region.right


@pytest.mark.parametrize("size", KITTI_SIZES)
def test_published_crops(size: tuple[int, int]) -> None:
    expected = KITTI_SIZES[size]
    assert corners(garg(*size)) == expected[0] and corners(eigen_kitti(*size)) == expected[1]
    window = benchmark_window(*size)
    assert (window.top, window.left) == expected[2] and window.shape == (352, 1216)


def test_other_crops() -> None:
    assert corners(crop("eigen_nyu", 480, 640)) == (45, 471, 41, 601)
    assert corners(crop("eigen_nyu", 100, 60)) == (45, 100, 41, 60)
    assert corners(crop(None, 7, 9)) == (0, 7, 0, 9)
    with pytest.raises(ValueError, match="unknown crop 'middle'; known: garg"):
        crop("middle", 5, 5)
    with pytest.raises(ValueError, match="does not hold the benchmark's window"):
        benchmark_window(300, 1300)


def pair(seed: int, height: int = 370, width: int = 1226) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    truth = draw.uniform(0.5, 100, (height, width)) * (draw.random((height, width)) < 0.1)
    prediction = np.where(truth > 0, truth, 10) * np.exp(draw.normal(0, 0.2, (height, width)))
    return truth.astype(np.float32), prediction.astype(np.float32)


def by_hand(truth, prediction, rows, columns, low, high, scaled=None):
    """Boolean masks and plain arithmetic in float64."""
    g, p = truth.astype(np.float64)[rows, columns], prediction.astype(np.float64)[rows, columns]
    counts = (g > low) & (g < high)
    g, p = g[counts], p[counts]
    if scaled == "median":
        p = p * (np.median(g) / np.median(p))
    if scaled == "scale_shift":
        design = np.stack([p, np.ones_like(p)], 1)
        p = design @ np.linalg.lstsq(design, g, rcond=None)[0]
    if scaled == "inverse_scale_shift":
        design = np.stack([1 / p, np.ones_like(p)], 1)
        p = 1 / np.maximum(design @ np.linalg.lstsq(design, 1 / g, rcond=None)[0], 1 / high)
    if scaled == "log_scale_shift":
        design = np.stack([np.log(p), np.ones_like(p)], 1)
        p = np.exp(design @ np.linalg.lstsq(design, np.log(g), rcond=None)[0])
    return depth_metrics(g, np.clip(p, low, high))


def agree(found, expected) -> None:
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize(
    ("name", "rows", "columns", "high", "scaled"),
    [
        ("bts-kitti", slice(151, 366), slice(44, 1181), 80, None),
        ("bts-kitti-50", slice(151, 366), slice(44, 1181), 50, None),
        ("bts-kitti-eigen", slice(122, 337), slice(44, 1181), 80, None),
        ("dar-kitti", slice(18 + 143, 18 + 349), slice(5 + 43, 5 + 1172), 80, None),
        ("dar-kitti-eigen", slice(18 + 117, 18 + 321), slice(5 + 43, 5 + 1172), 80, None),
        ("monodepth2-eigen", slice(151, 366), slice(44, 1181), 80, "median"),
    ],
)
def test_kitti_protocols_equal_plain_arithmetic(name, rows, columns, high, scaled) -> None:
    truth, prediction = pair(1)
    agree(
        evaluate_map(truth, prediction, protocol(name)), by_hand(truth, prediction, rows, columns, 1e-3, high, scaled)
    )


@pytest.mark.parametrize("crop_name", ["garg", "eigen_kitti", None])
@pytest.mark.parametrize("high", [50.0, 80.0])
@pytest.mark.parametrize("alignment", ["none", "median", "scale_shift", "inverse_scale_shift", "log_scale_shift"])
def test_every_crop_cap_and_alignment(crop_name, high, alignment) -> None:
    truth, prediction = pair(2, 120, 200)
    made = Protocol(truth_range=(1e-3, high), crop=crop_name, alignment=alignment, clamp=(1e-3, high))
    region = crop(crop_name, 120, 200)
    rows, columns = slice(region.top, region.bottom), slice(region.left, region.right)
    scaled = None if alignment == "none" else alignment
    agree(
        evaluate_map(truth, prediction * 0.4, made), by_hand(truth, prediction * 0.4, rows, columns, 1e-3, high, scaled)
    )


def test_a_window_is_cut_or_pasted_and_takes_either_size() -> None:
    truth, prediction = pair(3)
    window = benchmark_window(*truth.shape)
    for name in ("bts-kitti", "dar-kitti"):
        whole = compare(truth, prediction, protocol(name))
        small = compare(truth, window.cut(prediction), protocol(name))
        assert whole.predicted.tolist() == small.predicted.tolist() and whole.pixels == small.pixels
    pasted = compare(truth, prediction, bts("kitti", None, window=True))
    assert pasted.prediction[0, 0] == 0 and 0 in pasted.predicted
    assert depth_metrics(pasted.true, pasted.predicted, ["rmse_log"])["rmse_log"] == math.inf


def test_the_whole_map_and_the_pixels_that_count_agree() -> None:
    truth, prediction = pair(4)
    for name in ("bts-kitti", "dar-kitti", "marigold-kitti", "monodepth2-eigen", "inverse-scale-shift", "median"):
        found = compare(truth, prediction, protocol(name))
        assert np.array_equal(found.prediction[found.mask], found.predicted), name
        assert np.array_equal(found.truth[found.mask], found.true), name


def test_infinite_and_missing_predictions_are_clamped_first_or_refused() -> None:
    truth, prediction = pair(5)
    prediction[200, :] = np.inf
    prediction[201, :] = np.nan
    found = compare(truth, prediction, protocol("bts-kitti"))
    assert found.predicted.max() == 80 and found.predicted.min() == 1e-3
    with pytest.raises(ProtocolError, match="predictions that count are infinite or NaN"):
        compare(truth, prediction, protocol("monodepth2-eigen"))
    # Where they do not count, they do no harm.
    assert compare(truth, prediction, protocol("monodepth2-eigen"), valid=(np.arange(370) < 200)[:, None] & (truth > 0))


def test_disparities_are_resized_as_such_and_inverted() -> None:
    truth = np.full((8, 8), 4.0)
    disparity = np.full((4, 4), 0.5)
    found = compare(
        truth, disparity, changed(MONODEPTH2["eigen_benchmark"], alignment="none", scale=5.4), kind="disparity"
    )
    assert np.allclose(found.predicted, 2 * 5.4)
    disparity[:] = 0
    with pytest.raises(ProtocolError, match="disparities of 0 or less"):
        compare(truth, disparity, protocol("median"), kind="disparity")


def test_unmeasured_pixels_and_masks_do_not_count() -> None:
    truth = np.array([[1.0, 0.0, np.nan], [np.inf, -1.0, 2.0]])
    assert compare(truth, np.ones((2, 3)), protocol("metric")).pixels == 2
    valid = np.array([[1, 1, 1], [1, 1, 0]])
    assert compare(truth, np.ones((2, 3)), protocol("metric"), valid=valid).true.tolist() == [1]
    with pytest.raises(EmptyMaskError, match="no pixel to compare: of 6 pixels, 0 were measured"):
        compare(truth, np.ones((2, 3)), protocol("metric"), valid=np.zeros((2, 3)))
    with pytest.raises(EmptyMaskError, match=r"none of them lies in \(0.001, 10\) metres and the crop eigen_nyu"):
        compare(np.full((480, 640), 20.0), np.ones((480, 640)), protocol("bts-nyu"))


def test_bounds_of_the_truth() -> None:
    truth, ones = np.array([[0.01, 50.0, 49.0]]), np.ones((1, 3))
    assert compare(truth, ones, protocol("ibims")).true.tolist() == [50, 49]
    assert compare(truth, ones, changed(protocol("ibims"), include_high=False)).true.tolist() == [49]


@pytest.mark.parametrize(
    ("truth", "prediction", "name", "message"),
    [
        ((4, 4, 1), (4, 4), "metric", "ground truth is float64 of shape"),
        ((4, 4), (0, 4), "metric", "prediction is float64 of shape"),
        ((480, 640), (240, 320), "bts-nyu", "resizes nothing; save predictions"),
        ((10, 10), (10, 10), "depthart-nyu", "leaves nothing without 8 pixels"),
    ],
)
def test_unfit_maps_are_refused(truth, prediction, name, message) -> None:
    with pytest.raises(ProtocolError, match=message):
        compare(np.ones(truth), np.ones(prediction), protocol(name))


def test_protocols_have_names_and_fields() -> None:
    with pytest.raises(ProtocolError, match="unknown protocol 'mine'; known: bts-kitti"):
        protocol("mine")
    with pytest.raises(ProtocolError, match="a protocol has no cap"):
        changed(PROTOCOLS["metric"], cap=3)
    with pytest.raises(ProtocolError, match="unknown data set 'tum'"):
        bts("tum", None)
    assert all(
        entry.protocol in PROTOCOLS and set(entry.figures) <= set(PROTOCOLS[entry.protocol].metrics)
        for entry in PUBLISHED
    )
    assert {entry.model for entry in published("nyu", "bts-nyu")} >= {"BTS ResNet50", "DAR-Large"}
    assert published("kitti", "median") == []


def test_relative_depth_of_any_scale_scores_alike_where_the_protocol_aligns() -> None:
    truth, prediction = pair(6, 480, 640)
    truth = np.where(truth > 9, 0, truth)
    for name, made in PROTOCOLS.items():
        if made.window or made.alignment == "none" or not truth.any():
            continue
        first, second = (evaluate_map(truth, prediction * factor, made) for factor in (1, 0.01))
        assert second == pytest.approx(first, rel=1e-6, abs=1e-6), name


# --- maps ---------------------------------------------------------------------------------------------


def test_resizing_as_evaluators_do() -> None:
    row = np.array([[0.0, 4.0]])
    assert resize_map(row, (1, 4)).tolist() == [[0, 1, 3, 4]]
    assert resize_map(np.array([[0.0, 3.0]]), (1, 4), "bilinear_corners").tolist() == [[0, 1, 2, 3]]
    assert resize_map(np.array([[0, 1, 2]]) > 0, (1, 2), "nearest").tolist() == [[False, True]]
    with pytest.raises(ValueError, match="cannot be interpolated"):
        resize_map(np.ones((2, 2), int), (4, 4))


def test_merging_with_the_mirror_image() -> None:
    draw = np.random.default_rng(0)
    plain = draw.random((3, 100))
    assert np.allclose(merge_mirrored(plain, plain[:, ::-1]), plain)
    assert np.allclose(merge_mirrored(plain, plain[:, ::-1], "edges"), plain)
    merged = merge_mirrored(np.zeros((1, 101)), np.ones((1, 101)), "edges")
    assert merged[0, 0] == 1 and merged[0, -1] == 0 and merged[0, 50] == 0.5
    with pytest.raises(ValueError, match="expected the same shape"):
        merge_mirrored(plain, plain[:, :50])


def test_depthart_counts_wrong_pixels() -> None:
    truth, prediction = np.array([[1.0, 1.0, 1.0, 1.0]]), np.array([[1.0, 1.3, 0.0, -1.0]])
    assert wrong_share(truth, prediction, 1.25) == 0.5
    errors, shares = evaluate(truth, prediction, np.ones((1, 4), bool), ["mae"], ["d1"])
    assert errors == [pytest.approx(3.3 / 4)] and shares == [0.5]
    with pytest.raises(ValueError, match="mask is empty"):
        evaluate(truth, prediction, np.zeros((1, 4), bool), ["mae"], ["d1"])


def test_a_true_plane_is_flat_and_right_whatever_its_scale() -> None:
    rows, columns = np.mgrid[1:121, 1:161].astype(float)
    camera = (150.0, 150.0, 80.0, 60.0)
    normal = np.array([0.2, -0.9, 0.387])
    normal /= np.linalg.norm(normal)
    ray = np.stack([(columns - camera[2]) / camera[0], np.ones_like(rows), -(rows - camera[3]) / camera[1]], axis=-1)
    depth = -2 / (ray @ normal)
    numbers = np.ones(depth.shape, np.uint8)
    found = planarity(depth, 0.3 * depth, numbers, normal[None], camera)
    assert found.planes == 1 and found.flatness < 1e-9 and found.orientation < 1e-5
    bent = planarity(depth, depth + 0.05 * np.sin(rows), numbers, normal[None], camera)
    assert bent.flatness > 1
    assert planarity(depth, depth, numbers * 2, normal[None], camera).planes == 0


def test_boundaries() -> None:
    step = np.where(np.arange(64) < 32, 1.0, 3.0) * np.ones((64, 1))
    edges = np.zeros((64, 64), bool)
    edges[:, 32] = True
    near = boundaries(step, edges)
    assert near is not None and near.accuracy <= 1 and near.completeness <= 1
    far = boundaries(np.roll(step, 20, axis=1), np.roll(edges, 0, axis=1))
    assert far is not None and far.completeness == 10
    flat = boundaries(np.ones((64, 64)), edges)
    assert flat is not None and (flat.accuracy, flat.completeness) == (10, 10)
    assert boundaries(step, np.zeros((64, 64), bool)) is None
    with pytest.raises(ValueError, match="NaN or infinity"):
        boundaries(np.full((4, 4), np.nan), np.ones((4, 4), bool))


def test_error_maps() -> None:
    truth, prediction = np.full((1, 4), 2.0), np.array([[2.0, 4.0, 0.5, 2.0]])
    picture = error_picture(truth, prediction, np.array([[True, True, True, False]]))
    assert picture[0, 0].min() > 250 and picture[0, 3].tolist() == [128, 128, 128]
    assert picture[0, 1, 0] > picture[0, 1, 2] and picture[0, 2, 2] > picture[0, 2, 0]
