"""How data sets store depth: read to metres, and written in the same form again."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .depth_planar import HYPERSIM_FOV, planar_depth
from .errors import DatasetError


@dataclass(frozen=True)
class Encoding:
    """A file format with its scale and its rule for missing values.

    Attributes:
        kind: png (16-bit grey), png8 (8-bit grey), npy, hdf5, raw (float32 little-endian without a header), pfm, pgm
            (raw Kinect values).
        scale: stored value per metre: metres = value / scale.
        rotated: the 16 bits are rotated: value = (v >> 3) | (v << 13) (SUN RGB-D).
        highest: metres above which values are set to it (SUN RGB-D).
        key: name of the data set in an HDF5 file.
        distance: values are distances to the camera's centre instead of depths (Hypersim).
        size: (height, width) of a raw file.
    """

    kind: str = "png"
    scale: float = 1.0
    rotated: bool = False
    highest: float = math.inf
    key: str = "dataset"
    distance: bool = False
    size: tuple[int, int] | None = None

    @property
    def suffix(self) -> str:
        return {"png8": ".png", "hdf5": ".hdf5", "raw": ".bin"}.get(self.kind, f".{self.kind}")


KITTI = Encoding(scale=256)
NYU = Encoding(scale=1000)
TUM = Encoding(scale=5000)
VIRTUAL_KITTI = Encoding(scale=100)
IBIMS = Encoding(scale=65535 / 50)
SUN_RGBD = Encoding(scale=1000, rotated=True, highest=8.0)
HYPERSIM = Encoding("hdf5", distance=True)
TUM_HDF5 = Encoding("hdf5", key="depth")
DIODE = Encoding("npy")
ETH3D = Encoding("raw", size=(4032, 6048))
KINECT = Encoding("pgm")

ENCODINGS = {
    "kitti": KITTI,
    "nyu": NYU,
    "tum": TUM,
    "vkitti": VIRTUAL_KITTI,
    "ibims": IBIMS,
    "sunrgbd": SUN_RGBD,
    "hypersim": HYPERSIM,
    "diode": DIODE,
    "eth3d": ETH3D,
    "kinect": KINECT,
    "metres": Encoding("npy"),
}
"""Encodings by the data set that brought them."""


def read_depth(path: str | Path, encoding: Encoding, fov_x: float = HYPERSIM_FOV) -> np.ndarray:
    """float32 (height, width) metres; 0 where there is no value (0, negative, infinite or NaN in the file).

    Args:
        fov_x: horizontal angle of view, radians, where the file holds distances.

    Raises:
        DatasetError: the file is damaged or of another form. OSError: it cannot be read.
    """
    metres = read_values(path, encoding)
    if encoding.kind not in ("png", "png8"):  # whole numbers are all finite
        with np.errstate(invalid="ignore"):
            metres = np.where(np.isfinite(metres) & (metres > 0), metres, np.float32(0))
    if encoding.distance:
        metres = planar_depth(metres, fov_x)
    return metres if encoding.highest == math.inf else np.minimum(metres, np.float32(encoding.highest))


def read_values(path: str | Path, encoding: Encoding) -> np.ndarray:
    """float32 (height, width): what the file holds, divided by the scale, whatever it is. Raises as
    :func:`read_depth`."""
    if encoding.kind not in _READERS:
        raise DatasetError(f"unknown kind of depth file {encoding.kind!r}; known: {', '.join(_READERS)}")
    try:
        values = _READERS[encoding.kind](Path(path), encoding)
    except (DatasetError, FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise DatasetError(f"{path} cannot be read as {encoding.kind} ({type(error).__name__}: {error})") from error
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values[:, :, 0] if values.shape[2] == 1 else values[0]
    if values.ndim != 2 or not values.size:
        raise DatasetError(f"{path} holds an array of shape {values.shape}; expected (height, width)")
    scaled: np.ndarray = values.astype(np.float32) / np.float32(encoding.scale)
    return scaled


def _png(path: Path, encoding: Encoding) -> np.ndarray:
    from PIL import Image

    with Image.open(path, formats=("PNG",)) as image:
        deep = image.mode in ("I;16", "I;16B", "I")
        if not (deep if encoding.kind == "png" else image.mode in ("L", "I;16", "P")):
            raise DatasetError(
                f"{path} is a PNG of mode {image.mode}; depth of this kind is grey with "
                f"{16 if encoding.kind == 'png' else 8} bits"
            )
        values = np.asarray(image)
    if encoding.rotated:
        values = values.astype(np.uint16)
        values = (values >> 3) | (values << 13)
    return values


def _npy(path: Path, encoding: Encoding) -> np.ndarray:
    values = np.load(path, allow_pickle=False)
    if not isinstance(values, np.ndarray):
        with values as archive:
            if len(archive.files) != 1:
                raise DatasetError(f"{path} holds the arrays {', '.join(archive.files)}; expected one")
            values = archive[archive.files[0]]
    if values.dtype.kind not in "fiu":
        raise DatasetError(f"{path} holds {values.dtype}; expected numbers")
    array: np.ndarray = values
    return array


def _hdf5(path: Path, encoding: Encoding) -> np.ndarray:
    import h5py

    with h5py.File(path, "r") as file:
        if encoding.key not in file:
            raise DatasetError(f"{path} holds no {encoding.key!r}; it has: {', '.join(file)}")
        values: np.ndarray = file[encoding.key][()]
    return values


def _raw(path: Path, encoding: Encoding) -> np.ndarray:
    values = np.fromfile(path, "<f4")
    if encoding.size is None or values.size != encoding.size[0] * encoding.size[1]:
        raise DatasetError(f"{path} holds {values.size} float32 values; expected {encoding.size} (height, width)")
    return values.reshape(encoding.size)


def _pfm(path: Path, encoding: Encoding) -> np.ndarray:
    with path.open("rb") as file:
        kind, size, order = (file.readline().split() for _ in range(3))
        if kind != [b"Pf"]:
            raise DatasetError(f"{path} is no grey PFM file")
        width, height = (int(word) for word in size)
        values = np.frombuffer(file.read(), "<f4" if float(order[0]) < 0 else ">f4")
    return values.reshape(height, width)[::-1]  # rows go from the bottom up


def _kinect(path: Path, encoding: Encoding) -> np.ndarray:
    """Raw Kinect values of NYU: 351.3 / (1092.5 - value) metres up to 10, 2047 = none; little-endian in spite of
    PGM."""
    with path.open("rb") as file:
        header = file.readline().split()
        while len(header) < 4:
            line = file.readline()
            if not line:
                raise DatasetError(f"{path} has no complete PGM header")
            header += line.split(b"#")[0].split()
        width, height = int(header[1]), int(header[2])
        values = np.frombuffer(file.read(), "<u2", width * height).reshape(height, width)
    metres = np.clip(351.3 / (1092.5 - values.astype(np.float64)), 0, 10)
    return np.where(values >= 2047, 0, metres)


_READERS: dict[str, Callable[[Path, Encoding], np.ndarray]] = {
    "png": _png,
    "png8": _png,
    "npy": _npy,
    "npz": _npy,
    "hdf5": _hdf5,
    "raw": _raw,
    "pfm": _pfm,
    "pgm": _kinect,
}


def encode_depth(depth: np.ndarray, encoding: Encoding, fov_x: float = HYPERSIM_FOV) -> bytes:
    """The bytes of a file of this encoding.

    Args:
        depth: (height, width) metres; what is not positive and finite is stored as "no value".

    Raises:
        DatasetError: the kind is one that is only read, or a value does not fit the format.
    """
    with np.errstate(invalid="ignore"):
        known = np.isfinite(depth) & (depth > 0)
    values = np.where(known, depth, 0).astype(np.float64)
    if encoding.distance:
        flat = planar_depth(np.ones_like(values), fov_x)
        values = values / flat
    values = values * encoding.scale
    buffer = io.BytesIO()
    if encoding.kind in ("png", "png8"):
        from PIL import Image

        limit = 65535 if encoding.kind == "png" else 255
        whole = np.rint(values)
        if whole.max(initial=0) > limit:
            raise DatasetError(
                f"a depth of {depth[known].max():g} m does not fit: this format ends at {limit / encoding.scale:g} m"
            )
        # What is known must not turn into "no value".
        whole = np.where(known, np.maximum(whole, 1), 0)
        numbers = whole.astype(np.uint16)
        if encoding.rotated:
            numbers = ((numbers << 3) | (numbers >> 13)).astype(np.uint16)
        Image.fromarray(numbers if encoding.kind == "png" else numbers.astype(np.uint8)).save(buffer, "PNG")
    elif encoding.kind == "npy":
        np.save(buffer, values.astype(np.float32), allow_pickle=False)
    elif encoding.kind == "hdf5":
        import h5py

        with h5py.File(buffer, "w") as file:
            file.create_dataset(encoding.key, data=np.where(known, values, np.nan).astype(np.float32))
    elif encoding.kind == "raw":
        buffer.write(np.where(known, values, math.inf).astype("<f4").tobytes())
    else:
        raise DatasetError(f"depth is not written as {encoding.kind}; choose png, npy, hdf5 or raw")
    return buffer.getvalue()
