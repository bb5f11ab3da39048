"""KITTI's laser scanner: calibration files, and scans projected into a camera's image as depth maps."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import DatasetError


@dataclass(frozen=True)
class ScannerCalibration:
    """From scanner to camera images; float64.

    Attributes:
        rotation, translation: (3, 3) and (3,), scanner to the reference camera.
        rectification: (3, 3) R_rect_00.
        projections: {camera: (3, 4)} P_rect of the rectified images.
        sizes: {camera: (height, width)} of the rectified images.
    """

    rotation: np.ndarray
    translation: np.ndarray
    rectification: np.ndarray
    projections: dict[int, np.ndarray]
    sizes: dict[int, tuple[int, int]]

    def projection(self, camera: int) -> np.ndarray:
        """(3, 4) from scanner points (forward, left, up, 1) to (u z, v z, z)."""
        if camera not in self.projections:
            raise DatasetError(f"the calibration has no camera {camera}; it has {sorted(self.projections)}")
        return scanner_projection(self.rotation, self.translation, self.rectification, self.projections[camera])


def scanner_projection(
    rotation: np.ndarray, translation: np.ndarray, rectification: np.ndarray, projection: np.ndarray
) -> np.ndarray:
    """projection [rectification | rotation, translation], (3, 4) float64."""
    to_camera, rectify = np.eye(4), np.eye(4)
    to_camera[:3, :3], to_camera[:3, 3] = rotation, np.reshape(translation, 3)
    rectify[:3, :3] = rectification
    whole: np.ndarray = np.asarray(projection, np.float64) @ rectify @ to_camera
    return whole


def read_calibration(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """A KITTI calibration file: {name: float64 (n,)} of its lines ``name: numbers``.

    Raises:
        DatasetError: it is damaged. OSError: it cannot be read.
    """
    values = {}
    for line in Path(path).read_text(encoding="ascii", errors="replace").splitlines():
        name, _, rest = line.partition(":")
        try:
            numbers = np.array([float(word) for word in rest.split()])
        except ValueError:
            continue  # the day on which it was made
        if numbers.size:
            values[name.strip()] = numbers
    if not values:
        raise DatasetError(f"{path} holds no line `name: numbers`: it is no KITTI calibration file, or is damaged")
    return values


def scanner_calibration(folder: str | os.PathLike[str]) -> ScannerCalibration:
    """Read ``calib_cam_to_cam.txt`` and ``calib_velo_to_cam.txt`` of a day's folder.

    Raises:
        DatasetError: a file is damaged or incomplete. OSError: one cannot be read.
    """
    folder = Path(folder)
    cameras = read_calibration(folder / "calib_cam_to_cam.txt")
    scanner = read_calibration(folder / "calib_velo_to_cam.txt")
    try:
        found = sorted(int(name[-2:]) for name in cameras if name.startswith("P_rect_"))
        return ScannerCalibration(
            scanner["R"].reshape(3, 3),
            scanner["T"].reshape(3),
            cameras["R_rect_00"].reshape(3, 3),
            {camera: cameras[f"P_rect_{camera:02d}"].reshape(3, 4) for camera in found},
            {camera: _size(cameras[f"S_rect_{camera:02d}"]) for camera in found},
        )
    except (KeyError, ValueError) as error:
        raise DatasetError(f"the calibration in {folder} is incomplete or damaged ({error}): copy it again") from error


def _size(width_height: np.ndarray) -> tuple[int, int]:
    width, height = (int(value) for value in width_height)
    return height, width


def read_scan(path: str | os.PathLike[str]) -> np.ndarray:
    """A Velodyne scan: float32 (n, 4) forward, left, up in metres, and reflectance.

    Raises:
        DatasetError: its size is no multiple of 16 bytes. OSError: it cannot be read.
    """
    values = np.fromfile(path, np.float32)
    if not values.size or values.size % 4:
        raise DatasetError(f"{path} holds {values.size} float32 values, no multiple of 4: the scan is cut short")
    return values.reshape(-1, 4)


def project_scan(
    points: np.ndarray, projection: np.ndarray, size: tuple[int, int], *, forward: bool = False
) -> np.ndarray:
    """A scan as a sparse depth map, by the recipe of monodepth2 (the ground truth of its Eigen figures).

    Columns and rows are rounded and then reduced by 1, so points lie a pixel up and left of KITTI's own projections.
    Where several points share an index row x (width - 1) + column - 1, the smallest value goes to the pixel of the
    first of them; as that index is shared by the last pixel of a row and the first of the next, a few points vanish.

    Args:
        points: (n, 3 or more) forward, left, up.
        projection: (3, 4), see :func:`scanner_projection`.
        size: (height, width).
        forward: give the scanner's forward distance, which is about 0.27 m more than the camera's depth and is what
            the published figures use, instead of the depth in the camera's frame.

    Returns:
        float64 (height, width), 0 where there is no point.
    """
    height, width = size
    ahead = points[points[:, 0] >= 0].astype(np.float64)
    seen = np.concatenate([ahead[:, :3], np.ones((len(ahead), 1))], axis=1) @ np.asarray(projection, np.float64).T
    with np.errstate(divide="ignore", invalid="ignore"):
        columns, rows = (np.round(seen[:, axis] / seen[:, 2]) - 1 for axis in (0, 1))
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    columns, rows = columns[inside].astype(np.int64), rows[inside].astype(np.int64)
    values = (ahead[:, 0] if forward else seen[:, 2])[inside]
    depth = np.zeros(size)
    depth[rows, columns] = values  # a later point overwrites
    index = rows * (width - 1) + columns - 1
    _, first, group, counts = np.unique(index, return_index=True, return_inverse=True, return_counts=True)
    smallest = np.full(len(counts), np.inf)
    np.minimum.at(smallest, group, values)
    several = counts > 1
    depth[rows[first[several]], columns[first[several]]] = smallest[several]
    return np.maximum(depth, 0)
