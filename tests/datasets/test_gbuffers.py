"""Views of objects in the G-buffer layout: written and read back, found by list or by search, refused where damaged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nextscale.datasets.errors import DatasetError, SourceError
from nextscale.datasets.gbuffers import (
    FEATURES,
    TOKENS,
    GBuffers,
    Views,
    find_objects,
    held_out,
    read_views,
    write_list,
    write_views,
)


def views(seed: int = 0, count: int = 3, side: int = 16) -> Views:
    """A disc before nothing, its depth rising from left to right."""
    generator = np.random.default_rng(seed)
    across, down = np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side))
    disc = np.broadcast_to(across**2 + down**2 < 0.6, (count, side, side))
    depth = np.where(disc, 2.0 + 0.4 * across, 0).astype(np.float32)
    colours = np.where(disc[..., None], generator.integers(0, 255, (count, 1, 1, 3)), 255).astype(np.uint8)
    normals = np.broadcast_to(np.array([0.6, 0.0, 0.8], np.float32), (count, side, side, 3))
    cameras = generator.standard_normal((count, 25)).astype(np.float32)
    return Views(colours, depth, (disc * 255).astype(np.uint8), cameras, normals)


def test_written_and_read_back(tmp_path: Path) -> None:
    given = views()
    found = read_views(write_views(tmp_path / "a ding ö", given, "a disc"), normals=True)
    np.testing.assert_array_equal(found.colours, given.colours)
    np.testing.assert_array_equal(found.cameras, given.cameras)
    assert found.normals is not None and given.normals is not None
    np.testing.assert_allclose(found.normals, given.normals, atol=0.01)
    # Away from the outline: JPEG blurs across it.
    inner = np.abs(given.depth - 2) < 0.1
    np.testing.assert_allclose(found.depth[inner], given.depth[inner], atol=0.05)
    assert (found.depth[:, 0, 0] == 0).all() and (found.alpha[inner] > 200).all()


def test_objects_are_found_by_list_or_by_search(tmp_path: Path) -> None:
    for name in ("chair/b", "chair/a", "table/c"):
        write_views(tmp_path / name, views())
    assert [(path.name, category) for path, category in find_objects(tmp_path)] == [
        ("a", "chair"), ("b", "chair"), ("c", "table"),
    ]  # fmt: skip
    write_list(tmp_path, {"furniture": ["chair/b", "table/c"]})
    objects = find_objects(tmp_path)
    assert [(path.name, category) for path, category in objects] == [("b", "furniture"), ("c", "furniture")]
    train, kept = held_out(objects, 1)
    assert [path.name for path, _ in train] == ["b"] and [path.name for path, _ in kept] == ["c"]
    assert held_out(objects, 0) == (objects, [])


def test_batches(tmp_path: Path) -> None:
    for number in range(2):
        folder = write_views(tmp_path / f"{number}", views(number), f"disc {number}")
        np.save(folder / TOKENS, np.arange(9) + number)
        np.save(folder / FEATURES["image"][0], np.full((4, 5), number, np.float32))
    dataset = GBuffers(find_objects(tmp_path), size=8, normals=True, captions=True, tokens=True, features="image")
    batch = dataset.fetch([(0, 1), 0])
    shapes = {name: tuple(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert shapes == {
        "colours": (2, 3, 3, 8, 8), "alpha": (2, 3, 1, 8, 8), "depth": (2, 3, 1, 8, 8), "normals": (2, 3, 3, 8, 8),
        "cameras": (2, 3, 25), "tokens": (2, 9), "states": (2, 3, 5), "pooled": (2, 5),
    }  # fmt: skip
    assert batch["caption"] == ["disc 1", "disc 0"] == dataset.texts()[::-1]
    assert batch["tokens"][0].tolist() == list(range(1, 10)) and batch["pooled"][0].tolist() == [1] * 5
    assert batch["colours"].max() == 1 and set(batch["depth"][:, :, 0, 0, 0].flatten().tolist()) == {0.0}


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        find_objects(tmp_path / "absent")
    with pytest.raises(SourceError, match="holds no folder of views"):
        find_objects(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({"a": ["../elsewhere"]}))
    with pytest.raises(SourceError, match="names folders outside"):
        find_objects(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({"a": ["absent"]}))
    with pytest.raises(SourceError, match="1 folders that are not there"):
        find_objects(tmp_path)
    (tmp_path / "dataset.json").write_text("[")
    with pytest.raises(SourceError, match="no list of folders"):
        find_objects(tmp_path)


def test_damaged_objects_are_refused(tmp_path: Path) -> None:
    folder = write_views(tmp_path / "a", views())
    colours = (folder / "raw_img.png").read_bytes()
    (folder / "raw_img.png").write_bytes(colours[: len(colours) // 2])
    with pytest.raises(DatasetError, match=r"raw_img\.png cannot be read"):
        read_views(folder)
    write_views(folder, views(side=8))
    np.save(folder / "c.npy", np.zeros((2, 25), np.float32))
    with pytest.raises(DatasetError, match="not 2 squares side by side"):
        read_views(folder)
    np.save(folder / "c.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(DatasetError, match=r"c\.npy cannot be read"):
        read_views(folder)
    write_views(folder, views(side=8))
    write_views(tmp_path / "b", views(side=16))
    with pytest.raises(DatasetError, match="they must be alike"):
        GBuffers(find_objects(tmp_path)).fetch([0, 1])
    with pytest.raises(DatasetError, match="alpha have shape"):
        Views(views().colours, views().depth, views(side=8).alpha, views().cameras)
