"""What the surfaces of synthetic scenes look like: colours and patterns laid over them, with the grain of
photographs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np

PATTERNS = ("plain", "mottled", "stripes", "tiles", "bricks", "wood", "picture", "facade", "grain")
"""plain: one colour; mottled: two colours in clouds; stripes, tiles, bricks: of two colours; wood: drawn-out clouds;
picture: a photograph over the whole face; facade: rows of windows; grain: a photographed surface, tinted."""

_PICTURES = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle_left")
_SURFACES = ("brick", "grass", "gravel")
_SIDE, _TILES = 256, 8


@dataclass(frozen=True)
class Material:
    """How a part is coloured.

    Attributes:
        pattern: of :data:`PATTERNS`.
        colour, other: linear RGB in [0, 1].
        size: metres of the pattern's period.
        gloss: strength of highlights.
        glow: light it gives off itself.
        image: which noise tile, picture or surface.
        offset: shift of the pattern, metres.
    """

    pattern: str = "plain"
    colour: tuple[float, float, float] = (0.5, 0.5, 0.5)
    other: tuple[float, float, float] = (0.3, 0.3, 0.3)
    size: float = 1.0
    gloss: float = 0.0
    glow: float = 0.0
    image: int = 0
    offset: tuple[float, float] = (0.0, 0.0)


@cache
def noise_tiles() -> np.ndarray:
    """Clouds that repeat, from smooth to fine: float32 (8, 256, 256) in [0, 1]; the same on every machine."""
    draw = np.random.default_rng(20240401)
    frequency = np.hypot(np.fft.fftfreq(_SIDE)[:, None], np.fft.fftfreq(_SIDE)[None]) * _SIDE
    frequency[0, 0] = 1
    tiles = []
    for number in range(_TILES):
        spectrum = np.fft.fft2(draw.standard_normal((_SIDE, _SIDE))) / frequency ** (1.25 + 0.13 * number)
        values = np.real(np.fft.ifft2(spectrum))
        tiles.append(np.clip(0.5 + (values - values.mean()) / values.std() / 5, 0, 1))
    return np.stack(tiles).astype(np.float32)


@cache
def _photographs(names: tuple[str, ...]) -> np.ndarray:
    """Images that come with scikit-image, (n, 256, 256, 3) linear RGB in [0, 1]."""
    from PIL import Image
    from skimage import data

    found = []
    for name in names:
        whole = data.stereo_motorcycle()[0] if name == "motorcycle_left" else getattr(data, name)()
        image = Image.fromarray(whole).convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        found.append((np.asarray(image, np.float32) / 255) ** 2.2)
    return np.stack(found)


@dataclass
class Palette:
    """The materials of a scene, by part, ready to be looked up for many points at once."""

    materials: list[Material] = field(default_factory=list)

    def colours(self, parts: np.ndarray, points: np.ndarray, normals: np.ndarray, extents: np.ndarray) -> np.ndarray:
        """Linear RGB (n, 3).

        Args:
            parts: (n,) number of the part each point lies on.
            points, normals: (n, 3) in the part's own frame, whose origin is its middle.
            extents: (n, 3) of the part, metres.
        """
        table = self.materials
        pattern = np.array([PATTERNS.index(m.pattern) for m in table])[parts]
        base, other = (np.array([getattr(m, name) for m in table], np.float32)[parts] for name in ("colour", "other"))
        size = np.array([m.size for m in table], np.float32)[parts]
        image = np.array([m.image for m in table])[parts]
        offset = np.array([m.offset for m in table], np.float32)[parts]
        # The two axes along the face: u across, v up where the face stands.
        facing = np.abs(normals).argmax(axis=1)
        rows = np.arange(len(parts))
        first, second = np.array([1, 0, 0])[facing], np.array([2, 2, 1])[facing]
        flat = np.stack([points[rows, first], points[rows, second]], axis=1)
        face = np.maximum(np.stack([extents[rows, first], extents[rows, second]], axis=1), 1e-3)
        across = (flat + offset) / size[:, None]
        colours = base.copy()
        for number, name in enumerate(PATTERNS):
            chosen = np.flatnonzero(pattern == number)
            if chosen.size and name != "plain":
                at = across[chosen]
                if name == "picture":
                    colours[chosen] = _picture(flat[chosen] / face[chosen], image[chosen])
                elif name == "grain":
                    grain = _lookup(_photographs(_SURFACES), image[chosen] % len(_SURFACES), at)
                    colours[chosen] *= 0.35 + 1.5 * grain
                else:
                    share = _share(name, at, image[chosen])[:, None]
                    colours[chosen] += share * (other[chosen] - colours[chosen])
        # No surface is of one even colour.
        stains = _noise(parts % _TILES, flat / 2.5 + offset)
        return np.clip(colours * (0.8 + 0.4 * stains[:, None]), 0, 1)


def _share(pattern: str, at: np.ndarray, image: np.ndarray) -> np.ndarray:
    """How much of the other colour, (n,) in [0, 1]."""
    u, v = at.T
    if pattern == "mottled":
        return np.clip(2.5 * _noise(image, at) - 0.75, 0, 1)
    if pattern == "stripes":
        return (u % 1 < 0.5).astype(np.float32)
    if pattern == "wood":
        return np.clip(2 * _noise(image, at * np.array([0.15, 2.0])) - 0.5, 0, 1)
    if pattern == "tiles":
        joint = (u % 1 < 0.04) | (v % 1 < 0.04)
        odd = (np.floor(u) + np.floor(v)) % 2
        return np.where(joint, 0.8, odd * ((image % 2) * 0.9)).astype(np.float32)
    if pattern == "bricks":
        row = np.floor(v * 3)
        along = u + 0.5 * (row % 2)
        joint = (along % 1 < 0.06) | ((v * 3) % 1 < 0.12)
        tone = _noise(image, np.stack([np.floor(along) * 0.37, row * 0.61], axis=1))
        return np.where(joint, 0.9, 0.5 * tone).astype(np.float32)
    # A facade: windows in a grid, some of them lit.
    inside = (u % 1 > 0.25) & (u % 1 < 0.78) & (v % 1 > 0.3) & (v % 1 < 0.8)
    pane = 0.6 + 0.4 * _noise(image, np.stack([np.floor(u) * 0.31, np.floor(v) * 0.47], axis=1))
    return np.where(inside, pane, 0).astype(np.float32)


def _picture(place: np.ndarray, image: np.ndarray) -> np.ndarray:
    photographs = _photographs(_PICTURES)
    column = np.clip((place[:, 0] + 0.5) * _SIDE, 0, _SIDE - 1).astype(int)
    row = np.clip((0.5 - place[:, 1]) * _SIDE, 0, _SIDE - 1).astype(int)
    found: np.ndarray = photographs[image % len(photographs), row, column]
    return found


def _noise(image: np.ndarray, at: np.ndarray) -> np.ndarray:
    return _lookup(noise_tiles(), image % _TILES, at)


def _lookup(tiles: np.ndarray, image: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Tiles that repeat with period 1, interpolated."""
    place = (at % 1) * _SIDE
    low = np.floor(place).astype(int)
    share = (place - low).astype(np.float32)
    low %= _SIDE
    high = (low + 1) % _SIDE
    wide = (slice(None), *([None] * (tiles.ndim - 3)))
    u, v = share[:, 0][wide], share[:, 1][wide]
    top = tiles[image, low[:, 1], low[:, 0]] * (1 - u) + tiles[image, low[:, 1], high[:, 0]] * u
    bottom = tiles[image, high[:, 1], low[:, 0]] * (1 - u) + tiles[image, high[:, 1], high[:, 0]] * u
    blended: np.ndarray = top * (1 - v) + bottom * v
    return blended
