"""The published evaluators of depth, replayed; the replay notices an altered value."""

from pathlib import Path

import numpy as np
import pytest

from nextscale.evaluation.depth import depth_metrics
from nextscale.evaluation.depth_regions import crop
from nextscale.parity.replay import replay

from .conftest import write_case

CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.stem for path in CASES.glob("depth_eval_*.npz"))


@pytest.mark.parametrize("name", NAMES)
def test_values_that_nothing_reads_fail(name, changed):
    result = replay(changed(name, lambda meta, arrays: meta["options"].update({"nosuch": 1})))
    assert not result.passed and "options.nosuch" in result.problems[0]


def case_of(operation, options, inputs, outputs):
    tolerance = {"meaning": "", "rtol": 1e-9, "atol": 1e-9, "store": "full"}
    meta = {
        "format": 2,
        "system": "depth_eval",
        "case": operation,
        "operation": operation,
        "source": {},
        "config": {},
        "options": options,
        "weights": {},
        "inputs": {},
        "outputs": dict.fromkeys(outputs, tolerance),
        "notes": "",
    }
    arrays = {f"in/{name}": value for name, value in inputs.items()}
    return meta, arrays | {f"out/{name}": value for name, value in outputs.items()}


def images(sizes):
    draw = np.random.default_rng(3)
    found = []
    for height, width in sizes:
        truth = (draw.uniform(0.5, 100, (height, width)) * (draw.random((height, width)) < 0.05)).astype(np.float32)
        prediction = draw.uniform(0.3, 120, (height, width)).astype(np.float32)
        found.append((truth, prediction))
    return found


METRICS = ["d1", "silog", "abs_rel", "rmse", "log10"]


@pytest.mark.parametrize("dataset", ["kitti", "nyu"])
def test_metrics_of_a_case_made_here(dataset, tmp_path):
    """What the operation's description says, written out once more."""
    sizes = [(375, 1242), (370, 1226)] if dataset == "kitti" else [(480, 640)]
    modes = [
        {"crop": c, "window": w, "min_depth": 1e-3, "max_depth": m}
        for c, w, m in (("eigen", False, 10.0), (None, False, 60.0), ("garg", dataset == "kitti", 80.0))
    ]
    pairs, table, counts = images(sizes), [], []
    for mode in modes:
        for truth, prediction in pairs:
            height, width = truth.shape
            p = np.clip(prediction.astype(np.float64), mode["min_depth"], mode["max_depth"])
            if mode["window"]:
                top, left = height - 352, int((width - 1216) / 2)
                whole = np.zeros_like(p)
                whole[top:, left : left + 1216] = p[top:, left : left + 1216]
                p = whole
            name = f"eigen_{dataset}" if mode["crop"] == "eigen" else mode["crop"]
            region = crop(name, height, width)
            inside = np.zeros(truth.shape, bool)
            inside[region.top : region.bottom, region.left : region.right] = True
            inside &= (truth > mode["min_depth"]) & (truth < mode["max_depth"])
            table.append(list(depth_metrics(truth[inside], p[inside], METRICS).values()))
            counts.append(inside.sum())
    shape = (len(modes), len(pairs))
    inputs = {f"{kind}_{i}": pair[j] for i, pair in enumerate(pairs) for j, kind in enumerate(("gt", "pred"))}
    outputs = {"metrics": np.reshape(table, (*shape, len(METRICS))), "valid_pixels": np.reshape(counts, shape)}
    options = {"dataset": dataset, "metrics": METRICS, "modes": modes}
    assert replay(write_case(tmp_path / "depth_eval_made.npz", *case_of("metrics", options, inputs, outputs))).passed
    options["modes"][1]["max_depth"] = 59.0
    assert not replay(
        write_case(tmp_path / "depth_eval_made.npz", *case_of("metrics", options, inputs, outputs))
    ).passed


def test_disparity_metrics_of_a_case_made_here(tmp_path):
    [(truth, _)] = images([(40, 100)])
    disparity = np.random.default_rng(1).uniform(0.05, 1, (40, 100)).astype(np.float32)
    modes = [
        {"split": split, "median_scaling": scaled, "scale": 5.4 if not scaled else 1.0}
        for split in ("eigen", "eigen_benchmark")
        for scaled in (True, False)
    ]
    table, counts = [], []
    for mode in modes:
        inside = truth > 0
        if mode["split"] == "eigen":
            region = crop("garg", 40, 100)
            within = np.zeros_like(inside)
            within[region.top : region.bottom, region.left : region.right] = True
            inside = within & (truth > 1e-3) & (truth < 80)
        g, p = truth[inside].astype(np.float64), mode["scale"] / disparity[inside].astype(np.float64)
        if mode["median_scaling"]:
            p *= np.median(g) / np.median(p)
        table.append([list(depth_metrics(g, np.clip(p, 1e-3, 80), METRICS).values())])
        counts.append([inside.sum()])
    outputs = {"metrics": np.array(table), "valid_pixels": np.array(counts)}
    options = {"metrics": METRICS, "modes": modes}
    inputs = {"gt": truth[None], "disparity": disparity[None]}
    path = tmp_path / "depth_eval_made.npz"
    assert replay(write_case(path, *case_of("disparity_metrics", options, inputs, outputs))).passed
    options["modes"][0]["split"] = "eigen_zhou"
    result = replay(write_case(path, *case_of("disparity_metrics", options, inputs, outputs)))
    assert "unknown split 'eigen_zhou'" in result.problems[0]
