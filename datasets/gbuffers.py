"""Views of objects with depth, outline and cameras: folders in the G-buffer layout that SAR3D was trained on.

One folder per object, its pictures side by side: `raw_img.png` (or raw_image.png), colours on white; `depth_alpha.jpg`,
depth above outline, in grey; `d_near_far.npy` (2, pictures), the inverse depths that grey 0 and 255 stand for; `c.npy`
(pictures, 25), camera-to-world 4 x 4 (x right, y down, z forward) and intrinsics 3 x 3 in units of the picture's side,
row by row; and where they are there `normal.png`, `caption_3dtopia.txt`, tokens and features. A list of folders by
category lies above them in `dataset.json`; without it, folders are searched for. Facts: cyw-3d/SAR3D and its data set.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .errors import DatasetError, SourceError, listed
from .files import replace_file

COLOURS, DEPTH, LIMITS, CAMERAS, NORMALS = "raw_img.png", "depth_alpha.jpg", "d_near_far.npy", "c.npy", "normal.png"
CAPTION, TOKENS = "caption_3dtopia.txt", "gt_BL_dim_8_l2norm_lrm_256.npy"
FEATURES = {
    "image": ("image_dino_embedding_lrm.npy", None),
    "text": ("text_embedding_lrm_3dtopia.npy", "text_pooler_output_lrm_3dtopia.npy"),
}
"""Features of every patch or token, and the pooled ones; of pictures these are the first row of the others."""
BACKGROUND = 2.9
"""Depth from which on a pixel shows no object."""
_FARTHEST = 5.0

Key = int | tuple[int, int]


@dataclass(frozen=True, eq=False)
class Views:
    """Pictures of one object.

    Attributes:
        colours: uint8 (pictures, side, side, 3), on white.
        depth: float32 (pictures, side, side), along the viewing direction in the scene's units; 0: background.
        alpha: uint8 (pictures, side, side), 255 where the object is.
        cameras: float32 (pictures, 25).
        normals: float32 (pictures, side, side, 3) in [-1, 1], in the world's axes.
    """

    colours: np.ndarray
    depth: np.ndarray
    alpha: np.ndarray
    cameras: np.ndarray
    normals: np.ndarray | None = None

    def __post_init__(self) -> None:
        count, side = self.colours.shape[:2]
        expected = {
            "colours": (count, side, side, 3),
            "depth": (count, side, side),
            "alpha": (count, side, side),
            "cameras": (count, 25),
            "normals": (count, side, side, 3),
        }
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise DatasetError(f"{name} have shape {value.shape}, expected {shape} as the colours have")


# --- writing ------------------------------------------------------------------------------------------


def write_views(folder: str | Path, views: Views, caption: str | None = None) -> Path:
    """Write one object's folder, `c.npy` last, so that a folder that has it is complete.

    Depth keeps 8 bits of its inverse, and the losses of a JPEG file of the best quality, as the layout has it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    seen = views.depth > 0
    inverse = np.where(seen, 1 / np.where(seen, views.depth, 1), 1 / _FARTHEST)
    near = np.full(len(inverse), 1 / _FARTHEST, np.float32)
    far = np.maximum(inverse.reshape(len(inverse), -1).max(1), near + 1e-3).astype(np.float32)
    span = (far - near)[:, None, None]
    grey = np.round((inverse - near[:, None, None]) / span * 255).clip(0, 255).astype(np.uint8)
    both = np.concatenate((_side_by_side(grey), _side_by_side(views.alpha)), axis=0)
    replace_file(folder / COLOURS, _encoded(_side_by_side(views.colours), "PNG"))
    replace_file(folder / DEPTH, _encoded(both, "JPEG", quality=100, subsampling=0))
    replace_file(folder / LIMITS, _array_bytes(np.stack((near, far))))
    if views.normals is not None:
        x, y, z = np.moveaxis(views.normals, -1, 0)
        stored = (np.stack((-x, z, -y), axis=-1) + 1) / 2 * 255
        replace_file(folder / NORMALS, _encoded(_side_by_side(np.round(stored).clip(0, 255).astype(np.uint8)), "PNG"))
    if caption is not None:
        replace_file(folder / CAPTION, caption.encode())
    replace_file(folder / CAMERAS, _array_bytes(views.cameras.astype(np.float32)))
    return folder


def write_list(source: str | Path, categories: Mapping[str, Sequence[str | Path]]) -> Path:
    """Write `dataset.json`: the folders of each category, relative to `source`."""
    source = Path(source)
    rows = {name: [Path(folder).as_posix() for folder in folders] for name, folders in categories.items()}
    replace_file(source / "dataset.json", (json.dumps(rows, indent=1) + "\n").encode())
    return source / "dataset.json"


def _side_by_side(pictures: np.ndarray) -> np.ndarray:
    return np.concatenate(list(pictures), axis=1)


def _encoded(picture: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    return buffer.getvalue()


def _array_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


# --- reading ------------------------------------------------------------------------------------------


def find_objects(source: str | Path) -> list[tuple[Path, str]]:
    """Folders of objects with their categories, sorted; the category is that of `dataset.json`, or the folder above.

    Raises:
        SourceError: there is none, or `dataset.json` names folders that are not there or lie outside.
    """
    source = Path(source)
    if not source.is_dir():
        raise SourceError(f"{source}: no such folder; give one that holds folders of views")
    named = source / "dataset.json"
    if not named.is_file():
        found = sorted(place.parent for place in source.rglob(CAMERAS))
        if not found:
            raise SourceError(f"{source} holds no folder of views: each has a {CAMERAS} beside its pictures")
        return [(folder, folder.parent.name if folder != source else source.name) for folder in found]
    try:
        rows = json.loads(named.read_text(encoding="utf-8"))
        objects = [(source / path, str(category)) for category, paths in rows.items() for path in paths]
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise SourceError(f"{named} is no list of folders by category ({error})") from None
    if outside := [path for path, _ in objects if not path.resolve().is_relative_to(source.resolve())]:
        raise SourceError(f"{named} names folders outside of {source}: {listed(outside, 3)}")
    if missing := [path for path, _ in objects if not path.is_dir()]:
        raise SourceError(f"{named} names {len(missing)} folders that are not there: {listed(missing, 3)}")
    return objects


def read_views(folder: str | Path, normals: bool = False) -> Views:
    """The pictures of one object.

    Raises:
        DatasetError: a file is missing, damaged, or does not fit the others.
    """
    folder = Path(folder)
    cameras = read_array(folder / CAMERAS).astype(np.float32)
    count = len(cameras)
    names = (COLOURS, "raw_image.png")
    colours = _pictures(next((folder / name for name in names if (folder / name).is_file()), folder / COLOURS), count)
    both = _pixels(folder / DEPTH, "L")
    grey, alpha = (_apart(part, count, folder / DEPTH) for part in np.split(both, 2, axis=0))
    near, far = read_array(folder / LIMITS).astype(np.float32).reshape(2, count, 1, 1)
    inverse = grey.astype(np.float32) / 255 * (far - near) + near
    depth = 1 / np.maximum(inverse, 1e-6)
    depth[depth > BACKGROUND] = 0
    turned = None
    if normals:
        x, y, z = np.moveaxis(_pictures(folder / NORMALS, count).astype(np.float32) / 255 * 2 - 1, -1, 0)
        turned = np.stack((-x, -z, y), axis=-1)
    return Views(colours, depth, alpha, cameras, turned)


def read_array(path: Path) -> np.ndarray:
    """An array of numbers; nothing in the file is executed.

    Raises:
        DatasetError: there is none.
    """
    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
        return array
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from None


def _pixels(path: Path, mode: str) -> np.ndarray:
    try:
        with Image.open(path) as opened:
            return np.asarray(opened.convert(mode))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from None


def _pictures(path: Path, count: int) -> np.ndarray:
    return _apart(_pixels(path, "RGB"), count, path)


def _apart(strip: np.ndarray, count: int, path: Path) -> np.ndarray:
    height, width = strip.shape[:2]
    if width != height * count:
        raise DatasetError(f"{path} has {width} x {height} pixels, which are not {count} squares side by side")
    return strip.reshape(height, count, height, *strip.shape[2:]).swapaxes(0, 1)


@dataclass(frozen=True)
class GBuffers:
    """Objects as batches.

    A batch holds of every object `colours` (pictures, 3, size, size) in [0, 1], `depth` and `alpha` of one channel,
    `cameras` (pictures, 25), and what else is asked for: `normals`, `caption`, `tokens`, and `states` with `pooled`,
    the features of a condition.

    Attributes:
        objects: of :func:`find_objects`.
        size: side in pixels that pictures are resized to; None: their own.
        pictures: whether they are read.
        normals, captions, tokens: what else is.
        features: "image" or "text": read the features of that condition.
    """

    objects: Sequence[tuple[Path, str]] = field(repr=False)
    size: int | None = None
    pictures: bool = True
    normals: bool = False
    captions: bool = False
    tokens: bool = False
    features: str | None = None

    def __len__(self) -> int:
        return len(self.objects)

    def fetch(self, keys: Sequence[Key]) -> dict[str, Any]:
        """A batch of the objects with these numbers; of pairs, the second number counts.

        Raises:
            DatasetError: a file is missing or damaged, or objects have different numbers or sizes of pictures.
        """
        rows = [self._read(self.objects[key if isinstance(key, int) else key[1]]) for key in keys]
        batch: dict[str, Any] = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if not isinstance(values[0], torch.Tensor):
                batch[name] = values
                continue
            if len({value.shape for value in values}) > 1:
                shapes = sorted({tuple(value.shape) for value in values})
                raise DatasetError(f"{name} of the objects of one batch have shapes {shapes}; they must be alike")
            batch[name] = torch.stack(values)
        return batch

    def texts(self) -> list[str]:
        """The caption of every object."""
        return [_text(folder / CAPTION) for folder, _ in self.objects]

    def _read(self, place: tuple[Path, str]) -> dict[str, Any]:
        folder, category = place
        row: dict[str, Any] = {"category": category}
        if self.pictures:
            views = read_views(folder, self.normals)
            maps = {
                "colours": torch.from_numpy(views.colours.copy()).movedim(-1, 1).float() / 255,
                "alpha": torch.from_numpy(views.alpha.copy())[:, None].float() / 255,
                "depth": torch.from_numpy(views.depth)[:, None],
            }
            if views.normals is not None:
                maps["normals"] = torch.from_numpy(views.normals).movedim(-1, 1)
            row |= {name: self._resized(value, name) for name, value in maps.items()}
            row["cameras"] = torch.from_numpy(views.cameras)
        if self.captions:
            row["caption"] = _text(folder / CAPTION)
        if self.tokens:
            row["tokens"] = torch.from_numpy(read_array(folder / TOKENS).astype(np.int64)).flatten()
        if self.features is not None:
            states, pooled = (None if name is None else folder / name for name in FEATURES[self.features])
            assert states is not None
            found = torch.from_numpy(read_array(states).astype(np.float32))
            if pooled is None:
                row |= {"states": found[1:], "pooled": found[0]}
            else:
                row |= {"states": found, "pooled": torch.from_numpy(read_array(pooled).astype(np.float32)).flatten()}
        return row

    def _resized(self, maps: torch.Tensor, name: str) -> torch.Tensor:
        if self.size is None or maps.shape[-1] == self.size:
            return maps
        # The depth of a pixel is that of one thing, never a mean of the object's and the background's.
        if name == "depth":
            return F.interpolate(maps, size=self.size, mode="nearest-exact")
        return F.interpolate(maps, size=self.size, mode="bilinear", antialias=True)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from None


def held_out(objects: Sequence[tuple[Path, str]], count: int) -> tuple[list[tuple[Path, str]], list[tuple[Path, str]]]:
    """Objects to train on, and the last `count` of each category, which are held out."""
    by_category: dict[str, list[tuple[Path, str]]] = {}
    for place in objects:
        by_category.setdefault(place[1], []).append(place)
    train = [place for places in by_category.values() for place in (places[:-count] if count else places)]
    return train, [place for places in by_category.values() for place in (places[-count:] if count else [])]
