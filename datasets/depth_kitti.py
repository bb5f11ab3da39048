"""KITTI: raw recordings with improved ground truth or projected laser points, and the depth benchmark's own sets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np

from .decoding import image_size
from .depth_encodings import KITTI
from .depth_lidar import project_scan, read_scan, scanner_calibration
from .depth_lists import Frame, kitti_frames, kitti_list
from .depth_pairs import Camera, DepthPair, PairFiles, none_found
from .errors import DatasetError

SPLITS = {
    "eigen": "652 frames of the Eigen test split that have improved ground truth",
    "eigen-lidar": "all 697 frames of the Eigen test split, with projected laser points",
    "eigen-val": "800 frames of the Eigen training split, for validation (Marigold's list)",
    "selection": "1,000 images that the benchmark selects for validation",
    "server": "500 images of the benchmark's test set, without ground truth",
}
_FOCALS = {
    "2011_09_26": 721.5377,
    "2011_09_28": 707.0493,
    "2011_09_29": 718.3351,
    "2011_09_30": 707.0912,
    "2011_10_03": 718.856,
}
_RAW = ("", "raw", "kitti_raw", "raw_data")
_IMPROVED = ("", "depth", "data_depth_annotated", "kitti_depth", "gts")
_SELECTION = ("", "depth_selection", "depth/depth_selection", "data_depth_selection/depth_selection")


def kitti(root: Path, split: str, *, list_file: Path | None = None, depth_root: Path | None = None) -> PairFiles:
    """KITTI's pairs.

    Below ``root`` (or a sub-folder raw, kitti_raw): ``DAY/DAY_drive_NNNN_sync/image_02/data/FRAME.png`` and, for
    lidar splits, ``velodyne_points/data/FRAME.bin``; below ``depth_root`` (or ``root``, or a sub-folder depth,
    data_depth_annotated): ``[train|val/]DAY_drive_NNNN_sync/proj_depth/groundtruth/image_02/FRAME.png``.
    ``selection`` and ``server``: the folder ``depth_selection`` as the benchmark packs it.

    Args:
        split: of :data:`SPLITS`; with ``list_file`` "eigen" or "eigen-lidar" says which ground truth is meant.
        list_file: another list, in BTS's or monodepth2's form.
    """
    if split in ("selection", "server"):
        return _selected(root, split)
    if split not in SPLITS:
        raise DatasetError(f"KITTI has no split {split!r}; it has: {', '.join(SPLITS)}")
    if list_file is not None:
        frames: Sequence[Frame] = kitti_list(list_file)
    else:
        frames = kitti_frames("eigen_val" if split == "eigen-val" else "eigen_test")
    lidar = split == "eigen-lidar"
    if not lidar:
        frames = [frame for frame in frames if frame.improved]
    days = sorted({frame.day for frame in frames})
    raw = _base(root, _RAW, days)
    if raw is None:
        raise none_found(root, "KITTI raw recordings (folders such as 2011_09_26)")
    improved = None if lidar else _improved_base(depth_root or root, frames)
    pairs = [_pair(frame, raw, improved) for frame in frames]
    return PairFiles(pairs, KITTI, partial(_scanned, raw=raw) if lidar else None)


def _base(root: Path, candidates: Sequence[str], inside: Sequence[str]) -> Path | None:
    """The first candidate below ``root`` that holds one of the names."""
    for candidate in candidates:
        if any((root / candidate / name).is_dir() for name in inside):
            return root / candidate
    return None


def _improved_base(root: Path, frames: Sequence[Frame]) -> Path:
    sequences = sorted({frame.sequence for frame in frames})
    for candidate in _IMPROVED:
        for part in ("", "train", "val"):
            if any((root / candidate / part / name / "proj_depth").is_dir() for name in sequences):
                return root / candidate
    raise none_found(root, "improved ground truth (DAY_drive_NNNN_sync/proj_depth, perhaps below train and val)")


def _pair(frame: Frame, raw: Path, improved: Path | None) -> DepthPair:
    file, camera = f"{frame.number:010d}", f"image_{frame.camera:02d}"
    name = f"{frame.sequence}/{camera}/{file}"
    image = raw / frame.day / frame.sequence / camera / "data" / f"{file}.png"
    known = _camera(raw / frame.day, frame)
    if improved is None:
        scan = raw / frame.day / frame.sequence / "velodyne_points" / "data" / f"{file}.bin"
        return DepthPair(name, image, None, camera=known, extra=(("scan", scan),))
    inner = Path(frame.sequence) / "proj_depth" / "groundtruth" / camera / f"{file}.png"
    places = [improved / part / inner for part in ("", "train", "val")]
    return DepthPair(name, image, next((path for path in places if path.exists()), places[0]), camera=known)


@cache
def _calibrated(day: Path, camera: int) -> Camera | None:
    if not (day / "calib_cam_to_cam.txt").exists() or not (day / "calib_velo_to_cam.txt").exists():
        return None
    projection = scanner_calibration(day).projections[camera]
    return float(projection[0, 0]), float(projection[1, 1]), float(projection[0, 2]), float(projection[1, 2])


def _camera(day: Path, frame: Frame) -> Camera | None:
    """By the day's calibration; without it the published focal length, and the middle of the image."""
    known = _calibrated(day, frame.camera)
    if known is None and frame.day in _FOCALS:
        path = day / frame.sequence / f"image_{frame.camera:02d}" / "data" / f"{frame.number:010d}.png"
        if path.exists():
            width, height = image_size(path.read_bytes())
            return _FOCALS[frame.day], _FOCALS[frame.day], (width - 1) / 2, (height - 1) / 2
    return known


def _scanned(pair: DepthPair, raw: Path) -> np.ndarray:
    """Laser points in the image, by monodepth2's recipe: the scanner's forward distance."""
    assert pair.image is not None
    sequence, camera, _ = pair.name.split("/")
    calibration = scanner_calibration(raw / sequence[:10])
    width, height = image_size(pair.image.read_bytes())
    scan = read_scan(dict(pair.extra)["scan"])
    projection = calibration.projection(int(camera[-1]))
    return project_scan(scan, projection, (height, width), forward=True).astype(np.float32)


def _selected(root: Path, split: str) -> PairFiles:
    folder = "val_selection_cropped" if split == "selection" else "test_depth_prediction_anonymous"
    for candidate in _SELECTION:
        base = root / candidate / folder
        images = sorted((base / "image").glob("*.png"))
        if images:
            return PairFiles([_selected_pair(path, base, split) for path in images], KITTI)
    raise none_found(root, f"{folder}/image, as the depth benchmark packs it")


def _selected_pair(path: Path, base: Path, split: str) -> DepthPair:
    text = base / "intrinsics" / f"{path.stem}.txt"
    camera: Camera | None = None
    if text.exists():
        numbers = [float(word) for word in text.read_text().split()]
        if len(numbers) != 9:
            raise DatasetError(f"{text} holds {len(numbers)} numbers; expected the 9 of a camera matrix")
        camera = (numbers[0], numbers[4], numbers[2], numbers[5])
    if split == "server":
        return DepthPair(path.stem, path, None, camera=camera)
    match = re.fullmatch(r"(.*_sync)_image_(\d{10})_(image_0\d)", path.stem)
    if match is None:
        raise DatasetError(f"{path} is not named DRIVE_image_FRAME_image_0N.png, as the benchmark's selection is")
    truth = base / "groundtruth_depth" / f"{match[1]}_groundtruth_depth_{match[2]}_{match[3]}.png"
    return DepthPair(path.stem, path, truth, camera=camera)
