"""Predicted depth maps as files, of this library or from anywhere."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from .depth_encodings import Encoding, read_values
from .depth_pairs import MissingFilesError
from .errors import DatasetError, listed
from .files import replace_file

DESCRIPTION = "predictions.json"
Kind = Literal["depth", "disparity"]

SUFFIXES = {".npy": "npy", ".npz": "npz", ".png": "png", ".pfm": "pfm", ".hdf5": "hdf5", ".h5": "hdf5"}
"""Kinds of files by suffix: one array (height, width) each; a PNG is grey with 16 bits."""


PLAIN = Encoding("npy")


def _short(name: str, index: int) -> str:
    parts = name.split("/")
    return "_".join(parts if len(parts) < 3 else (parts[0], parts[-1]))


NAMINGS: dict[str, Callable[[str, int], str]] = {
    "nested": lambda name, index: name,
    "flat": lambda name, index: name.replace("/", "_"),
    "short": _short,
    "last": lambda name, index: name.rsplit("/", 1)[-1],
    "ten digits": lambda name, index: f"{index:010d}",
    "six digits": lambda name, index: f"{index:06d}",
    "five digits": lambda name, index: f"{index:05d}",
    "four digits": lambda name, index: f"{index:04d}",
    "number": lambda name, index: str(index),
}
"""How files are named after (sample's name, its number in the split, from 0). short: first and last part (BTS)."""


@dataclass(frozen=True)
class Predictions:
    """Predictions of the samples of a split.

    Attributes:
        kind: what they hold: depth (metres, or up to a scale), or disparity, its inverse.
        files: one for each sample; or None where ``stack`` holds all of them.
        encoding: of the files, without regard to ``kind``.
        stack: (n, height, width), mapped into memory.
        naming: how the files are named.
    """

    kind: Kind
    files: Sequence[Path] | None = None
    encoding: Encoding = PLAIN
    stack: np.ndarray | None = None
    naming: str = ""

    def read(self, index: int) -> np.ndarray:
        """float32 (height, width) of sample ``index``."""
        if self.stack is not None:
            return np.asarray(self.stack[index], np.float32)
        assert self.files is not None
        return read_values(self.files[index], self.encoding)


def open_predictions(
    place: str | os.PathLike[str],
    names: Sequence[str],
    *,
    kind: Kind | None = None,
    scale: float | None = None,
    png_scale: float = 256.0,
    limit: int | None = None,
) -> Predictions:
    """Find the predictions of samples.

    ``place`` is a folder of files named by one of :data:`NAMINGS` with a suffix of :data:`SUFFIXES`, or one ``.npy``
    file (n, height, width) in the split's order. A ``predictions.json`` in the folder may say ``{"kind": "depth" |
    "disparity", "scale": stored values per metre}``.

    Args:
        names: of the samples, in the split's order.
        kind, scale: as in ``predictions.json``, which they override; without either, depth, and 1 (of PNG
            ``png_scale``).

        limit: only so many samples, the first ones, need predictions.

    Raises:
        MissingFilesError: predictions are missing; all are listed. DatasetError: what is there is not understood.
    """
    path = Path(place)
    if path.is_file():
        stack = _stack(path, len(names))
        return Predictions(kind or "depth", stack=stack if scale is None else stack / scale, naming="stacked")
    if not path.is_dir():
        raise DatasetError(f"{path} does not exist; give a folder of predictions, or a model")
    said = _said(path)
    names = names[:limit]
    best: tuple[int, str, str, list[Path]] = (-1, "", "", [])
    for suffix in SUFFIXES:
        if not any(path.rglob(f"*{suffix}")):
            continue
        for naming, form in NAMINGS.items():
            files = [path / f"{form(name, index)}{suffix}" for index, name in enumerate(names)]
            if len(set(files)) == len(files):
                there = sum(file.is_file() for file in files)
                best = max(best, (there, naming, suffix, files), key=lambda found: found[0])
    there, naming, suffix, files = best
    if there < 1:
        usual = listed(sorted({form(names[0], 0) for form in NAMINGS.values()}))
        raise DatasetError(
            f"{path} holds no prediction: of sample {names[0]!r} it would be named {usual} "
            f"with one of {', '.join(SUFFIXES)}"
        )
    missing = [str(file.relative_to(path)) for file in files if not file.is_file()]
    if missing:
        raise MissingFilesError(
            f"{len(missing)} of {len(files)} predictions are missing below {path} (named like {files[0].name}): "
            f"{listed(missing, 40)}"
        )
    stored = scale if scale is not None else said.get("scale", png_scale if suffix == ".png" else 1.0)
    if not isinstance(stored, int | float) or not stored > 0:
        raise DatasetError(f"the scale of predictions is {stored!r}; expected stored values per metre, more than 0")
    chosen = kind or said.get("kind", "depth")
    if chosen not in ("depth", "disparity"):
        raise DatasetError(f"predictions hold {chosen!r}; expected 'depth' or 'disparity'")
    encoding = Encoding(SUFFIXES[suffix], float(stored), key=str(said.get("key", "dataset")))
    return Predictions("disparity" if chosen == "disparity" else "depth", files, encoding, None, naming)


def _said(folder: Path) -> dict[str, object]:
    path = folder / DESCRIPTION
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not valid JSON ({error})") from error
    known = {"kind", "scale", "key", "about"}
    if not isinstance(content, dict) or set(content) - known:
        raise DatasetError(f"{path} must be an object with some of {', '.join(sorted(known))}")
    return content


def _stack(path: Path, count: int) -> np.ndarray:
    if path.suffix != ".npy":
        raise DatasetError(f"{path}: predictions in one file are a .npy array (n, height, width)")
    try:
        stack = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DatasetError(f"{path} cannot be read ({error})") from error
    if stack.ndim == 4 and stack.shape[1] == 1:
        stack = stack[:, 0]
    if stack.ndim != 3 or len(stack) != count or stack.dtype.kind != "f":
        raise DatasetError(f"{path} holds {stack.dtype} {stack.shape}; expected floats ({count}, height, width)")
    array: np.ndarray = stack
    return array


def save_prediction(folder: Path, name: str, depth: np.ndarray) -> None:
    """Write one map (height, width) as float32 ``NAME.npy`` below a folder, whole or not at all."""
    path = folder / f"{name}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(depth, np.float32), allow_pickle=False)
    replace_file(path, buffer.getvalue())
