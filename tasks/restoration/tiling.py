"""Restoring a picture of any size by a network of one size: overlapping tiles with blended seams.

Tiles are blended by interpolating between what is there and what comes: with the weight w in [0, 1] of the new tile,
a + w (b - a). Where both agree the result is exactly theirs, so neither a flat picture nor an identity shows a seam.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nextscale.core.checkpoint import CheckpointError, read_tensors, write_atomically

Progress = Callable[[int, int], None]
"""Called with tiles done and tiles in all; what it raises stops the work."""


def restore_tiled(
    restore: Callable[[Tensor], Tensor],
    image: Float[Tensor, "channels height width"],
    *,
    tile: int,
    overlap: int,
    batch: int,
    progress: Progress | None = None,
    store: TileStore | None = None,
    apart: list[Tensor] | None = None,
) -> Float[Tensor, "channels height width"]:
    """Restore a picture tile by tile.

    Beside the picture and the result, one row of tiles and one batch are in memory at a time.

    Args:
        restore: tiles (n, channels, tile, tile), n at most ``batch``, to tiles of the same shape.
        image: of any size from 1 x 1; where it is smaller than a tile it is continued by reflection.
        tile: side of a tile in pixels.
        overlap: pixels that neighbouring tiles share at least; at most half a tile.
        batch: tiles restored at once. A ``restore`` that treats every tile by itself gives the same whatever it is.
        progress: see :data:`Progress`.
        store: keeps rows of tiles that are done, so that an interrupted call goes on from there.
        apart: is given the squared differences in tone of tiles where they meet, for :func:`follow_overview`.

    Returns:
        The restored picture, of the same size and on the same device.

    Raises:
        ValueError: a size is impossible, or ``restore`` changes the shape of its tiles.
    """
    _check(image, tile, overlap, batch)
    height, width = image.shape[-2:]
    tall, wide = max(height, tile), max(width, tile)
    image = reflected(image, tall, wide)
    rows, columns = starts(tall, tile, overlap), starts(wide, tile, overlap)
    done, result = _Counter(len(rows) * len(columns), progress), torch.empty_like(image)
    waiting = rows
    if store is not None:
        store.open(image, tile, overlap)
        waiting = [top for top in rows if top not in store]
    strips = _strips(restore, image, waiting, columns, tile, batch, done)
    reached, found = 0, [] if apart is None else apart
    for top in rows:
        if store is not None and top in store:
            strip, seams = store.read(top)
            strip = strip.to(result)
            done.add(len(columns))
        else:
            strip, seams = next(strips)
            if store is not None:
                store.write(top, strip, seams)
        found += [seams, tones_apart(result[:, top:reached], strip[:, : max(reached - top, 0)], len(columns))]
        blend(result[:, top : top + tile], strip, reached - top, dim=-2)
        reached = top + tile
    next(strips, None)  # the last batch is counted
    return result[:, :height, :width].clone() if (tall, wide) != (height, width) else result


TONES = 16
"""Side of the grid on which :func:`follow_overview` compares."""

COMMON = 2.0
"""Tiles that meet have seen the same pixels there, and err alike; what they are still apart by counts so often."""


def tones_apart(
    old: Float[Tensor, "channels height width"], new: Float[Tensor, "channels height width"], parts: int = 1
) -> Float[Tensor, " values"]:
    """Squared differences of two pictures' mean colours, in so many parts from left to right; none of empty ones."""
    if 0 in old.shape:
        return old.new_zeros(0)
    return F.adaptive_avg_pool2d((new - old)[None], (1, min(parts, old.shape[-1]))).square().flatten().cpu()


def follow_overview(
    picture: Float[Tensor, "channels height width"],
    overview: Float[Tensor, "channels side side"],
    apart: Float[Tensor, " values"],
) -> Float[Tensor, "channels height width"]:
    """Move a picture's brightness and colours, on a coarse grid, towards those of a small view of the whole.

    Tiles know details, and cannot know how dark or hazy the rest of a photograph is; a view of the whole does. Where
    tiles agree with each other, as on noise, they are right by themselves. How far the picture is moved is, as for two
    guesses of one quantity, the variance of the tiles' by that of the difference of both.

    Args:
        picture: restored in tiles; changed in place.
        overview: the same picture, squeezed to a square and restored as a whole.
        apart: of :func:`tones_apart`, where tiles meet.
    """
    resize = functools.partial(F.interpolate, align_corners=False)
    coarse = (resize(x[None], (TONES, TONES), mode="bilinear", antialias=True) for x in (overview.to(picture), picture))
    wanted, found = coarse
    difference = wanted - found
    between = float(F.adaptive_avg_pool2d(difference, TONES // 4).square().mean())
    share = min(1.0, COMMON * float(apart.mean()) / max(between, 1e-12)) if len(apart) else 0.0
    picture += resize(difference * share, picture.shape[-2:], mode="bicubic")[0]
    return picture


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the tiles along one side: evenly spread, at least ``overlap`` shared, the ends covered."""
    count = 1 + math.ceil(max(length - tile, 0) / (tile - overlap))
    return [round(i * (length - tile) / max(count - 1, 1)) for i in range(count)]


def blend(canvas: Tensor, new: Tensor, shared: int, dim: int) -> None:
    """Lay ``new`` over ``canvas`` (equal shapes), whose first ``shared`` places along ``dim`` are filled already.

    The weight of the new one rises over these by half a cosine; nothing is left of either beyond them.
    """
    if shared > 0:
        place = (torch.arange(shared, dtype=torch.float64, device=new.device) + 0.5) / shared
        weight = ((1 - torch.cos(math.pi * place)) / 2).to(new.dtype)
        weight = weight[:, None] if dim == -2 else weight
        old = canvas.narrow(dim, 0, shared)
        old += weight * (new.narrow(dim, 0, shared) - old)
    rest = new.shape[dim] - max(shared, 0)
    canvas.narrow(dim, max(shared, 0), rest).copy_(new.narrow(dim, max(shared, 0), rest))


def reflected(
    image: Float[Tensor, "channels height width"], height: int, width: int
) -> Float[Tensor, "channels tall wide"]:
    """The picture continued to the right and below by reflection, as often as it takes; one pixel is repeated."""
    for dim, wanted in ((-2, height), (-1, width)):
        length = image.shape[dim]
        if wanted > length:
            place = torch.arange(wanted, device=image.device) % max(2 * length - 2, 1)
            image = image.index_select(dim, torch.where(place < length, place, 2 * length - 2 - place))
    return image


def _strips(
    restore: Callable[[Tensor], Tensor],
    image: Tensor,
    rows: list[int],
    columns: list[int],
    tile: int,
    batch: int,
    done: _Counter,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of tiles, each blended along the row: (channels, tile, width), and what tiles in it are apart by.

    A batch may reach into the next row.
    """
    places = [(top, left) for top in rows for left in columns]
    strip, reached, seams = torch.empty_like(image[:, :tile]), 0, list[Tensor]()
    for first in range(0, len(places), batch):
        chosen = places[first : first + batch]
        tiles = torch.stack([image[:, top : top + tile, left : left + tile] for top, left in chosen])
        restored = restore(tiles)
        if restored.shape != tiles.shape:
            raise ValueError(
                f"tiles {tuple(tiles.shape)} were restored to {tuple(restored.shape)}, expected the same shape"
            )
        restored = restored.to(image)
        for (_, left), each in zip(chosen, restored, strict=True):
            if left == columns[0]:
                reached, seams = 0, []
            seams.append(tones_apart(strip[..., left:reached], each[..., : max(reached - left, 0)]))
            blend(strip[:, :, left : left + tile], each, reached - left, dim=-1)
            reached = left + tile
            if left == columns[-1]:
                yield strip, torch.cat(seams)
        done.add(len(chosen))  # now, so that whoever stops the work here has the rows that are whole


class _Counter:
    """Tells how many tiles are done."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.count, self._progress = total, 0, progress

    def add(self, count: int) -> None:
        self.count += count
        if count and self._progress is not None:
            self._progress(self.count, self.total)


def _check(image: Tensor, tile: int, overlap: int, batch: int) -> None:
    if image.ndim != 3 or 0 in image.shape or not image.is_floating_point():
        raise ValueError(
            f"the image is {tuple(image.shape)} {image.dtype}, expected floats (channels, height, width), "
            "at least one pixel"
        )
    if tile < 1 or batch < 1:
        raise ValueError(f"tile is {tile} and batch {batch}; expected 1 or more")
    if not 0 <= overlap <= tile // 2:
        raise ValueError(f"overlap is {overlap}; expected 0 to {tile // 2}, half a tile of {tile}")


class TileStore:
    """Rows of tiles that are done, in a folder, each file whole or not there.

    Args:
        folder: made where it is missing; rows in it of another picture, model or tiling are removed.
        owner: tells the model and its settings apart from others, as text.
    """

    def __init__(self, folder: str | os.PathLike[str], owner: str) -> None:
        self.folder, self.owner = Path(folder), owner
        self._key = ""

    def open(self, image: Tensor, tile: int, overlap: int) -> None:
        """Take the rows of this picture into use."""
        pixels = image.detach().cpu().contiguous()
        digest = hashlib.sha256(pixels.reshape(-1).view(torch.uint8).numpy().data)
        digest.update(f"{self.owner} {tuple(image.shape)} {image.dtype} {tile} {overlap}".encode())
        self._key = digest.hexdigest()[:16]
        for path in self.folder.glob("row-*.safetensors"):
            if not path.name.startswith(f"row-{self._key}-"):
                path.unlink()

    def path(self, top: int) -> Path:
        return self.folder / f"row-{self._key}-{top}.safetensors"

    def __contains__(self, top: int) -> bool:
        return self.path(top).is_file()

    def read(self, top: int) -> tuple[Tensor, Tensor]:
        """A row of tiles, and what they are apart by.

        Raises:
            CheckpointError: the file was damaged since it was written.
        """
        found = read_tensors(self.path(top))
        strip, seams = found.get("strip"), found.get("seams")
        if not isinstance(strip, Tensor) or not isinstance(seams, Tensor):
            raise CheckpointError(f"{self.path(top)} holds no row of tiles; remove it")
        return strip, seams

    def write(self, top: int, strip: Tensor, seams: Tensor) -> None:
        from safetensors.torch import save_file

        tensors = {"strip": strip.detach().cpu().contiguous(), "seams": seams}
        write_atomically(self.path(top), lambda path: save_file(tensors, path))

    def clear(self) -> None:
        """Remove all rows, and the folder where nothing else is in it."""
        for path in self.folder.glob("row-*.safetensors"):
            path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()
