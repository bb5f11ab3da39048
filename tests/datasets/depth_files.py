"""Small photographs and depth files for the tests of depth data."""

from pathlib import Path

import numpy as np
from PIL import Image

from nextscale.datasets.depth_encodings import Encoding, encode_depth


def image(path: Path, height: int, width: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    Image.fromarray(coarse).resize((width, height)).save(path, quality=95)
    return path


def written(path: Path, depth: np.ndarray, encoding: Encoding) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_depth(depth, encoding))
    return path


def a_depth(height: int = 6, width: int = 8, seed: int = 0) -> np.ndarray:
    depth = np.random.default_rng(seed).uniform(1, 7, (height, width)).astype(np.float32)
    depth[0, :2] = 0
    return depth
