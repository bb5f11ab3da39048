"""Golden cases of depth evaluation: BTS, monodepth2, DepthART (Hypersim, iBims-1), KITTI's laser scanner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nextscale.datasets.depth_lidar import project_scan, scanner_projection
from nextscale.datasets.depth_planar import fill_holes
from nextscale.datasets.depth_planar import planar_depth as to_planar
from nextscale.evaluation.depth_ibims import boundaries, planarity
from nextscale.evaluation.depth_maps import merge_mirrored
from nextscale.evaluation.depth_protocol_list import MONODEPTH2, bts
from nextscale.evaluation.depth_protocols import changed, compare, score
from nextscale.parity.case import Case
from nextscale.parity.replay import Operations, ReplayError

operations = Operations()


@operations
def metrics(case: Case) -> Mapping[str, Any]:
    """BTS: several evaluations of the same images."""
    options, table, counts = case.options, [], []
    names, dataset, images = list(options["metrics"]), options["dataset"], _images(case)
    for mode in options["modes"]:
        protocol = changed(
            bts(dataset, mode["crop"], mode["window"], mode["min_depth"], mode["max_depth"]), metrics=names
        )
        compared = [compare(truth, prediction, protocol) for truth, prediction in images]
        table.append([list(score(image, names).values()) for image in compared])
        counts.append([image.pixels for image in compared])
    return {"metrics": np.array(table), "valid_pixels": np.array(counts)}


def _images(case: Case) -> list[tuple[np.ndarray, np.ndarray]]:
    count = sum(name.startswith("gt_") for name in case.inputs)
    return [(case.inputs[f"gt_{i}"], case.inputs[f"pred_{i}"]) for i in range(count)]


@operations
def disparity_metrics(case: Case) -> Mapping[str, Any]:
    """monodepth2: disparities against either of its ground truths."""
    options, table, counts = case.options, [], []
    names, pairs = list(options["metrics"]), list(zip(case.inputs["gt"], case.inputs["disparity"], strict=True))
    for mode in options["modes"]:
        if mode["split"] not in MONODEPTH2:
            raise ReplayError(f"unknown split {mode['split']!r}")
        protocol = changed(
            MONODEPTH2[mode["split"]],
            scale=mode["scale"],
            alignment="median" if mode["median_scaling"] else "none",
            metrics=names,
        )
        compared = [compare(truth, disparity, protocol, kind="disparity") for truth, disparity in pairs]
        table.append([list(score(image, names).values()) for image in compared])
        counts.append([image.pixels for image in compared])
    return {"metrics": np.array(table), "valid_pixels": np.array(counts)}


@operations
def flip_merge(case: Case) -> Mapping[str, Any]:
    """monodepth2: the image's disparity and the mirrored image's."""
    return {"merged": merge_mirrored(case.inputs["disparity"], case.inputs["mirrored"], "edges")}


@operations
def project_points(case: Case) -> Mapping[str, Any]:
    """monodepth2: a scan in every camera, camera z or the scanner's forward distance."""
    given, (height, width) = case.inputs, case.options["size"]
    points = given["points"]
    projections = [scanner_projection(given["R"], given["T"], given["R_rect"], camera) for camera in given["P"]]
    maps = {
        name: [project_scan(points, projection, (height, width), forward=forward) for projection in projections]
        for name, forward in (("camera_depth", False), ("forward_depth", True))
    }
    return {name: np.stack(found) for name, found in maps.items()}


@operations
def planar_depth(case: Case) -> Mapping[str, Any]:
    """Hypersim: distances to depths, holes filled from the nearest pixel."""
    depth = to_planar(case.inputs["distance"], case.options["fov_x"])
    return {"depth": depth, "filled": fill_holes(depth, case.inputs["hole"])}


@operations
def ibims(case: Case) -> Mapping[str, Any]:
    """Planes of all three kinds, and boundaries."""
    given = case.inputs
    fx, fy, cx, cy = (float(value) for value in given["camera"])
    kinds = [
        planarity(
            given["gt"],
            given["pred"],
            numbers,
            given[f"planes_{kind}"][:, 4:7],
            (fx, fy, cx, cy),
            given["valid"],
        )
        for kind, numbers in zip(("table", "floor", "wall"), given["plane_numbers"], strict=True)
    ]
    edges = boundaries(given["pred"], given["edges"], case.options["max_distance"])
    planes = sum(kind.planes for kind in kinds)
    return {
        "flatness_sum": sum(kind.flatness for kind in kinds),
        "flatness_planes": planes,
        "orientation_sum": sum(kind.orientation for kind in kinds),
        "orientation_planes": planes,
        # Without a true edge there is nothing to match, and the published code counts nothing.
        "boundary_accuracy": 0.0 if edges is None else edges.accuracy,
        "boundary_completeness": 0.0 if edges is None else edges.completeness,
    }
