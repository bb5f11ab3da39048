"""Small images and shards, made on the fly."""

import io
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image


def encoded(seed: int = 0, size: tuple[int, int] = (8, 8), kind: str = "PNG", **options: object) -> bytes:
    """An image file of noise, (width, height) `size`."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    """A tar archive, compressed if its name says so, with the files in the order given."""
    mode = "w" if path.suffix == ".tar" else "w:gz"
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def samples(count: int, first: int = 0) -> dict[str, bytes]:
    """KEY.png and KEY.cls of `count` samples; sample i is noise of seed i and has label i modulo 3."""
    files = {}
    for i in range(first, first + count):
        files[f"{i:04d}.png"] = encoded(i)
        files[f"{i:04d}.cls"] = str(i % 3).encode()
    return files


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the user's cache folder out of the tests."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("NEXTSCALE_CACHE", str(folder))
    return folder


@pytest.fixture
def make() -> SimpleNamespace:
    """The functions above: `make.image`, `make.tar`, `make.samples`."""
    return SimpleNamespace(image=encoded, tar=tar_of, samples=samples)
