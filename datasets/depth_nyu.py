"""NYU Depth v2: the labelled file, and folders of PNG that others convert it to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .depth_encodings import NYU
from .depth_lists import read_list, shipped
from .depth_pairs import Camera, DepthPair, MissingFilesError, PairFiles, intrinsics, none_found, relative_name
from .errors import DatasetError

CAMERA: Camera = (518.8579, 519.4696, 325.5824, 253.7362)
"""Of the colour camera; images are 480 x 640."""

LABELLED = "nyu_depth_v2_labeled.mat"
FRAMES = 1449
SPLITS = {
    "test": "654 labelled frames",
    "train": "795 labelled frames",
    "all": "all 1,449 labelled frames",
}


def labelled_numbers(split: str) -> list[int]:
    """Numbers of labelled frames, from 0 (the toolbox counts from 1)."""
    test = set(shipped()["nyu_test"])
    if split not in SPLITS:
        raise DatasetError(f"NYU Depth has no split {split!r}; it has: {', '.join(SPLITS)}")
    wanted = {"test": lambda n: n in test, "train": lambda n: n not in test, "all": lambda n: True}[split]
    return [number for number in range(FRAMES) if wanted(number)]


def nyu(
    root: Path, split: str, *, list_file: Path | None = None, depth_root: Path | None = None
) -> PairFiles | LabelledNYU:
    """NYU's pairs.

    ``root`` is the labelled .mat file, a folder that holds it, or a folder of PNG by scene:
    ``SCENE/rgb_NNNNN.jpg`` with ``SCENE/sync_depth_NNNNN.png`` (millimetres), NNNNN the number of the labelled frame.

    Args:
        split: of :data:`SPLITS`; without meaning where a list is given.
        list_file: lines ``image depth [focal]``, relative to ``root`` and ``depth_root``.
    """
    if list_file is None:
        for path in (root, root / LABELLED):
            if path.is_file():
                return LabelledNYU(path, tuple(labelled_numbers(split)))
        return PairFiles(_by_scene(root, depth_root or root, set(labelled_numbers(split))), NYU)
    pairs = []
    for image, depth, *_ in (words if len(words) > 1 else [*words, "None"] for words in read_list(list_file)):
        name = str(Path(image.lstrip("/")).with_suffix(""))
        truth = None if depth == "None" else (depth_root or root) / depth.lstrip("/")
        pairs.append(DepthPair(name, root / image.lstrip("/"), truth, camera=CAMERA))
    return PairFiles(pairs, NYU)


def _by_scene(root: Path, depth_root: Path, numbers: set[int]) -> list[DepthPair]:
    found = {}
    for path in sorted(root.glob("*/rgb_*")):
        match = re.fullmatch(r"rgb_(\d{5})", path.stem)
        if match and int(match[1]) in numbers:
            depth = depth_root / path.parent.name / f"sync_depth_{match[1]}.png"
            found[int(match[1])] = DepthPair(relative_name(path, root), path, depth, camera=CAMERA)
    if not found:
        raise none_found(root, f"{LABELLED}, and no SCENE/rgb_NNNNN.jpg of this split")
    if missing := sorted(numbers - set(found)):
        raise MissingFilesError(
            f"{len(missing)} of {len(numbers)} frames are missing below {root}: {missing[:40]}"
            f"{' and more' if len(missing) > 40 else ''} (numbers of labelled frames, from 0, as in rgb_NNNNN)"
        )
    return [found[number] for number in sorted(found)]


@dataclass(frozen=True)
class LabelledNYU:
    """Frames of the labelled MATLAB 7.3 file, a source (``depth_pairs.DepthSource``).

    HDF5 holds MATLAB's arrays with their axes reversed: frames are turned to (480, 640).

    Attributes:
        path: the file. numbers: of the frames, from 0.
        filled: take the depth whose holes are painted in, instead of the measured one (``rawDepths``).
    """

    path: Path
    numbers: tuple[int, ...]
    filled: bool = False

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        return f"rgb_{self.numbers[index]:05d}"

    def image(self, index: int) -> np.ndarray:
        frame: np.ndarray = np.asarray(self._array("images")[self.numbers[index]]).transpose(2, 1, 0)
        return frame

    def depth(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        frame = np.asarray(self._array("depths" if self.filled else "rawDepths")[self.numbers[index]], np.float32).T
        known = np.isfinite(frame) & (frame > 0)
        return np.where(known, frame, np.float32(0)), known

    def camera(self, index: int, size: tuple[int, int]) -> np.ndarray:
        return intrinsics(CAMERA)

    def check(self) -> None:
        for name in ("images", "depths" if self.filled else "rawDepths"):
            length, *inner = self._array(name).shape
            wanted = [3, 640, 480] if name == "images" else [640, 480]
            if length <= max(self.numbers) or inner != wanted:
                raise MissingFilesError(
                    f"{self.path}: {name!r} has shape {(length, *inner)}; expected ({FRAMES}, "
                    f"{', '.join(map(str, wanted))})"
                )

    def _array(self, name: str) -> np.ndarray:
        file = _open(self.path)
        if name not in file:
            raise DatasetError(f"{self.path} holds no {name!r}; it has: {', '.join(file)}")
        array: np.ndarray = file[name]
        return array


@cache
def _open(path: Path) -> dict[str, np.ndarray]:
    import h5py

    try:
        file: dict[str, np.ndarray] = h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(f"{path} is no MATLAB 7.3 (HDF5) file, or is damaged ({error})") from error
    return file
