"""Hypersim, ETH3D, iBims-1, TUM RGB-D, DIODE and SUN RGB-D, in the layouts in which they are handed out."""

from __future__ import annotations

import bisect
import csv
import gzip
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from .depth_encodings import DIODE, ETH3D, HYPERSIM, IBIMS, SUN_RGBD, TUM, TUM_HDF5
from .depth_lists import read_list
from .depth_pairs import Camera, DepthPair, PairFiles, none_found, relative_name
from .depth_planar import HYPERSIM_FOV
from .errors import DatasetError

_HYPERSIM_SPLIT = "metadata_images_split_scene_v1.csv"
_HYPERSIM_CAMERAS = "metadata_camera_parameters.csv"


def hypersim(root: Path, split: str, *, list_file: Path | None = None, depth_root: Path | None = None) -> PairFiles:
    """Hypersim: ``SCENE/images/scene_cam_NN_final_preview/frame.IIII.tonemap.jpg`` and
    ``scene_cam_NN_geometry_hdf5/frame.IIII.depth_meters.hdf5``.

    Args:
        split: train, val or test of the official table (``metadata_images_split_scene_v1.csv`` in ``root``, or
            ``list_file``; public frames only), or "all": every frame that is there. With ``list_file`` a table with the
            columns images, depth, settings_camera_fov is taken whole (DepthART's).
    """
    table = list_file or next(
        (root / f for f in (_HYPERSIM_SPLIT, _HYPERSIM_SPLIT + ".gz") if (root / f).exists()), None
    )
    views = _fields_of_view(root)
    pairs = []
    if split == "all" and list_file is None:
        for path in sorted(root.glob("*/images/*_geometry_hdf5/frame.*.depth_meters.hdf5")):
            pairs.append(_hypersim_pair(root, path.relative_to(root).as_posix(), None, views))
    elif table is None:
        raise DatasetError(f"{root} holds no {_HYPERSIM_SPLIT}; put it there, name it as the list, or take split 'all'")
    else:
        for row in _table(table):
            if "depth" in row and "images" in row:
                fov = float(row.get("settings_camera_fov") or HYPERSIM_FOV)
                pairs.append(_hypersim_pair(root, row["depth"], fov, views))
            elif row.get("split_partition_name") == split and row.get("included_in_public_release") == "True":
                place = f"{row['scene_name']}/images/scene_{row['camera_name']}_geometry_hdf5"
                pairs.append(
                    _hypersim_pair(root, f"{place}/frame.{int(row['frame_id']):04d}.depth_meters.hdf5", None, views)
                )
    if not pairs:
        raise none_found(root, f"Hypersim frames of split {split!r} (train, val, test or all)")
    return PairFiles(pairs, HYPERSIM)


def _table(path: Path) -> Iterator[dict[str, str]]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    yield from csv.DictReader(io.StringIO(text))


def _fields_of_view(root: Path) -> dict[str, float]:
    """Of scenes that have another than pi / 3, where the table with them is there."""
    path = root / _HYPERSIM_CAMERAS
    if not path.exists():
        return {}
    return {row["scene_name"]: float(row["settings_camera_fov"]) for row in _table(path) if row["settings_camera_fov"]}


def _hypersim_pair(root: Path, depth: str, fov: float | None, views: dict[str, float]) -> DepthPair:
    image = depth.replace("_geometry_hdf5/", "_final_preview/").replace(".depth_meters.hdf5", ".tonemap.jpg")
    name = depth.removesuffix(".depth_meters.hdf5")
    angle = fov if fov is not None else views.get(depth.split("/")[0], HYPERSIM_FOV)
    return DepthPair(name, root / image, root / depth, fov_x=angle)


def eth3d(root: Path, split: str, *, list_file: Path | None = None, depth_root: Path | None = None) -> PairFiles:
    """ETH3D high-resolution training images with their rendered depth (raw float32, infinite where there is none).

    ``rgb/SCENE/images/dslr_images/NAME.JPG`` with
    ``depth/SCENE_dslr_depth/SCENE/ground_truth_depth/dslr_images/NAME.JPG``, or both below ``SCENE``.
    """
    pairs = []
    for path in sorted([*root.glob("rgb/*/images/dslr_images/*"), *root.glob("*/images/dslr_images/*")]):
        scene = path.parts[-4]
        inner = Path(scene, "ground_truth_depth", "dslr_images", path.name)
        places = [root / "depth" / f"{scene}_dslr_depth" / inner, root / inner]
        depth = next((place for place in places if place.exists()), places[0])
        pairs.append(DepthPair(f"{scene}/{path.stem}", path, depth))
    wanted = _wanted(list_file, lambda words: "/".join(_scene_and_name(words[0])))
    pairs = [pair for pair in pairs if wanted is None or pair.name in wanted]
    if not pairs:
        raise none_found(root, "ETH3D images (rgb/SCENE/images/dslr_images/NAME.JPG)")
    return PairFiles(pairs, replace(ETH3D, size=None))


def _scene_and_name(image: str) -> tuple[str, str]:
    parts = Path(image).parts
    return parts[-4], Path(parts[-1]).stem


def _wanted(list_file: Path | None, name: Callable[[list[str]], str]) -> set[str] | None:
    if list_file is None:
        return None
    return {name(words) for words in read_list(list_file)}


def ibims(root: Path, split: str, *, list_file: Path | None = None, depth_root: Path | None = None) -> PairFiles:
    """iBims-1: 100 images, with what its planarity and boundary errors need as extra files where they are there."""
    base = root / "ibims1_core_raw" if (root / "ibims1_core_raw").is_dir() else root
    listing = list_file or base / "imagelist.txt"
    if listing.exists():
        names = [Path(words[0]).stem for words in read_list(listing)]
    else:
        names = [path.stem for path in sorted((base / "rgb").glob("*.png"))]
    if not names:
        raise none_found(root, "iBims-1 images (rgb/NAME.png)")
    pairs = []
    for name in names:
        extra = [("edges", base / "edges" / f"{name}.png")]
        for kind in ("table", "floor", "wall"):
            extra += [(f"{kind}-mask", base / f"mask_{kind}" / f"{name}.png")]
            extra += [(f"{kind}-planes", base / f"mask_{kind}" / f"{name}.txt")]
        pairs.append(
            DepthPair(
                name,
                base / "rgb" / f"{name}.png",
                base / "depth" / f"{name}.png",
                (base / "mask_invalid" / f"{name}.png", base / "mask_transp" / f"{name}.png"),
                _ibims_camera(base / "calib" / f"{name}.txt"),
                extra=tuple((use, path) for use, path in extra if path.exists()),
            )
        )
    return PairFiles(pairs, IBIMS)


def _ibims_camera(path: Path) -> Camera | None:
    if not path.exists():
        return None
    try:
        fx, fy, cx, cy = (float(word) for word in path.read_text().splitlines()[0].split(","))
    except (ValueError, IndexError):
        raise DatasetError(f"{path} does not begin with `fx,fy,cx,cy`") from None
    return fx, fy, cx, cy


_TUM_CAMERAS: dict[str, Camera] = {
    "freiburg1": (517.3, 516.5, 318.6, 255.3),
    "freiburg2": (520.9, 521.0, 325.1, 249.7),
    "freiburg3": (535.4, 539.2, 320.1, 247.6),
}


def tum(root: Path, split: str, *, list_file: Path | None = None, depth_root: Path | None = None) -> PairFiles:
    """TUM RGB-D: a sequence with ``rgb.txt`` and ``depth.txt``, or a folder of such; images are paired with the depth
    nearest in time, at most 0.02 s away. Or a folder of HDF5 files with ``image`` and ``depth`` (metres).
    """
    packed = sorted([*root.rglob("*.h5"), *root.rglob("*.hdf5")])
    if packed:
        return PairFiles([DepthPair(relative_name(path, root), path, path) for path in packed], TUM_HDF5)
    pairs = []
    for listing in sorted([*root.glob("rgb.txt"), *root.glob("*/rgb.txt")]):
        sequence = listing.parent
        images = _times(listing)
        depths = _times(sequence / "depth.txt")
        camera = next((value for key, value in _TUM_CAMERAS.items() if key in sequence.resolve().name), None)
        at = [time for time, _ in depths]
        for time, file in images:
            place = bisect.bisect(at, time)
            near = min(depths[max(place - 1, 0) : place + 1], key=lambda entry: abs(entry[0] - time))
            if abs(near[0] - time) <= 0.02:
                path = sequence / file
                pairs.append(DepthPair(relative_name(path, root), path, sequence / near[1], camera=camera))
    if not pairs:
        raise none_found(root, "TUM sequence (rgb.txt, depth.txt) or HDF5 files")
    return PairFiles(pairs, TUM)


def _times(path: Path) -> list[tuple[float, str]]:
    try:
        return sorted((float(words[0]), words[1]) for words in read_list(path))
    except (ValueError, IndexError):
        raise DatasetError(f"{path} is no list of `time file`") from None


def diode(root: Path, split: str, *, list_file: Path | None = None, depth_root: Path | None = None) -> PairFiles:
    """DIODE: ``val/indoors/scene_N/scan_N/NAME.png``, ``NAME_depth.npy``, ``NAME_depth_mask.npy``.

    Args:
        split: val, val-indoor, val-outdoor, train, ...; folders val and train may be left out.
    """
    part, _, kind = split.partition("-")
    if part not in ("train", "val") or kind not in ("", "indoor", "outdoor"):
        raise DatasetError(f"DIODE has no split {split!r}; it has: val, val-indoor, val-outdoor and the same of train")
    base = root / part if (root / part).is_dir() else root
    pairs = []
    for path in sorted(base.rglob("*_depth.npy")):
        place = path.relative_to(base).parts
        if kind and not any(folder.startswith(kind) for folder in place[:-1]):
            continue
        stem = path.name.removesuffix("_depth.npy")
        pairs.append(
            DepthPair(
                relative_name(path.with_name(f"{stem}.png"), base),
                path.with_name(f"{stem}.png"),
                path,
                (path.with_name(f"{stem}_depth_mask.npy"),),
            )
        )
    wanted = _wanted(list_file, lambda words: Path(words[0]).stem)
    pairs = [pair for pair in pairs if wanted is None or pair.name.rsplit("/", 1)[-1] in wanted]
    if not pairs:
        raise none_found(root, f"DIODE files of split {split!r} (NAME.png with NAME_depth.npy)")
    return PairFiles(pairs, DIODE)


def sunrgbd(root: Path, split: str, *, list_file: Path | None = None, depth_root: Path | None = None) -> PairFiles:
    """SUN RGB-D: ``SUNRGBD/.../SCENE/{image/*.jpg, depth/*.png, intrinsics.txt}``.

    Args:
        split: "all", or with ``list_file`` (lines ``image depth``, paths that hold ``SUNRGBD/``) any name.
    """
    base = next((root / f for f in ("SUNRGBD", "downloaded/SUNRGBD") if (root / f).is_dir()), root)
    pairs = []
    if list_file is not None:
        for words in read_list(list_file):
            image, depth = (base / word.split("SUNRGBD/")[-1] for word in words[:2])
            pairs.append(_sun_pair(image, depth, base))
    else:
        for depth in sorted(base.rglob("depth/*.png")):
            images = sorted((depth.parents[1] / "image").glob("*.jpg"))
            if images:
                pairs.append(_sun_pair(images[0], depth, base))
    if not pairs:
        raise none_found(root, "SUN RGB-D scenes (image/*.jpg beside depth/*.png)")
    return PairFiles(pairs, SUN_RGBD)


def _sun_pair(image: Path, depth: Path, base: Path) -> DepthPair:
    text = image.parents[1] / "intrinsics.txt"
    camera: Camera | None = None
    if text.exists():
        numbers = np.array([float(word) for word in text.read_text().split()])
        if numbers.size < 6 or not math.isfinite(numbers[:6].sum()):
            raise DatasetError(f"{text} is no camera matrix of 9 numbers")
        camera = (float(numbers[0]), float(numbers[4]), float(numbers[2]), float(numbers[5]))
    return DepthPair(relative_name(image, base), image, depth, camera=camera)
