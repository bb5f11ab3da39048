"""Synthetic scenes: reproducible, exact, and packed so that an interrupted run goes on."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from nextscale.datasets.depth import open_depth, recognise
from nextscale.datasets.depth_store import DepthStore, DepthStoreWriter, is_store
from nextscale.datasets.errors import DatasetError, ShardError
from nextscale.datasets.scenes import LAYOUTS, SceneSettings, make_scene
from nextscale.datasets.scenes_layout import Light, Scene, looking
from nextscale.datasets.scenes_render import Renderer
from nextscale.datasets.scenes_shapes import FURNITURE, Thing
from nextscale.datasets.scenes_textures import PATTERNS, Material, Palette
from nextscale.datasets.scenes_write import write_scenes

SMALL = SceneSettings(height=24, width=32, seed=5)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_scene_has_a_picture_and_depth(kind: str) -> None:
    settings = SceneSettings(24, 32, streets=float(kind == "street"))
    sample = make_scene(settings, 0)
    again = make_scene(settings, 0)
    assert sample.kind == kind and sample.image.shape == (24, 32, 3) and sample.image.dtype == np.uint8
    assert np.array_equal(sample.image, again.image) and np.array_equal(sample.depth, again.depth)
    assert sample.image.std() > 5 and (sample.depth > 0).mean() >= 0.5
    assert kind == "street" or (sample.depth > 0).all()
    assert not np.array_equal(make_scene(settings, 1).depth, sample.depth)


def a_wall(turn: float = 0.0) -> Scene:
    """A wall 5 m ahead of the camera, which may look beside it."""
    wall = Thing().box((100, 1, 100), (0, 5.5, -50), Material())
    lamp = Light(np.array([0.0, 0, 3]), np.ones(3))
    return Scene(wall.parts, [lamp], np.ones(3), np.zeros(3), looking(turn, 0, 0), np.pi / 2, False, 1.0, 0.0)


def test_depth_is_measured_along_the_axis() -> None:
    assert np.allclose(Renderer(a_wall()).depth(16, 20), 5, atol=1e-5)
    renderer = Renderer(a_wall(0.3))
    depth, camera = renderer.depth(16, 20), renderer.intrinsics(16, 20).astype(float)
    across = (np.arange(20) - camera[0, 2]) / camera[0, 0]
    # The plane y = 5 in the turned camera's frame.
    expected = 5 / (np.cos(0.3) - across * np.sin(0.3))
    assert np.allclose(depth, np.broadcast_to(expected, (16, 20)), rtol=1e-4)
    assert camera[0, 0] == pytest.approx(10) and camera[0, 2] == 9.5


@pytest.mark.parametrize("maker", FURNITURE)
def test_furniture_stands_on_the_floor(maker) -> None:
    for seed in range(3):
        thing = maker(np.random.default_rng(seed))
        lowest = min(float(part.vertices[:, 2].min()) for part in thing.parts)
        assert -0.16 < lowest < 0.75 and 0 < thing.height < 3 and thing.radius < 2


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_are_colours(pattern: str) -> None:
    draw = np.random.default_rng(0)
    points, normals = draw.normal(size=(50, 3)), draw.normal(size=(50, 3))
    palette = Palette([Material(pattern, (0.2, 0.4, 0.6), (0.9, 0.1, 0.1), 0.3)])
    colours = palette.colours(np.zeros(50, int), points, normals, np.ones((50, 3)))
    assert colours.shape == (50, 3) and colours.min() >= 0 and colours.max() <= 1 and colours.std() > 0


@pytest.mark.parametrize("given", [{"height": 4}, {"seed": -1}, {"streets": 1.5}])
def test_settings_out_of_range(given) -> None:
    with pytest.raises(ValueError, match="expected at least 8 x 8"):
        SceneSettings(**given)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise Stopped

    with pytest.raises(Stopped):
        write_scenes(tmp_path / "cut", SMALL, 6, workers=0, shard_size=2, progress=stop)
    with pytest.raises(ShardError, match=r"not complete \(4 of 6"):
        DepthStore(tmp_path / "cut")
    (tmp_path / "cut" / ".image-00002.npy.1.tmp").write_bytes(b"left over")
    begun = []
    write_scenes(tmp_path / "cut", SMALL, 6, workers=0, shard_size=2, progress=lambda done, _: begun.append(done))
    assert begun[0] == 4 and not list((tmp_path / "cut").glob(".*"))
    write_scenes(tmp_path / "whole", SMALL, 6, workers=0, shard_size=4)
    cut, whole = DepthStore(tmp_path / "cut"), DepthStore(tmp_path / "whole")
    numbers = [5, 0, 3]
    assert np.array_equal(cut.images(numbers), whole.images(numbers))
    assert np.array_equal(cut.depths(numbers), whole.depths(numbers))
    assert np.array_equal(cut.cameras(numbers), whole.cameras(numbers))
    # More of the same.
    write_scenes(tmp_path / "whole", SMALL, 7, workers=0)
    assert len(DepthStore(tmp_path / "whole")) == 7 and np.array_equal(
        pickle.loads(pickle.dumps(cut)).images([1]), cut.images([1])
    )


def test_several_processes_make_the_same(tmp_path: Path) -> None:
    write_scenes(tmp_path / "two", SMALL, 2, workers=1)
    assert np.array_equal(DepthStore(tmp_path / "two").images([1])[0], make_scene(SMALL, 1).image)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    writer = DepthStoreWriter(tmp_path / "packed", settings={"kind": "test"}, size=(4, 6), total=3, shard_size=2)
    for number in range(3):
        depth = np.full((4, 6), number + 1.0, np.float32)
        depth[0, 0] = 0
        writer.write(np.full((4, 6, 3), 50 * number, np.uint8), depth, np.eye(3))
    return tmp_path / "packed"


def test_packed_pairs_are_a_data_set(packed: Path) -> None:
    assert is_store(packed) and recognise(packed) == "scenes" and not is_store(packed.parent)
    batch = open_depth("scenes", packed, size=(4, 6)).fetch([2, 0])
    assert batch["depth"][:, 0, 1, 1].tolist() == [3, 1] and not batch["valid"][:, 0, 0, 0].any()
    assert batch["image"][0, 0, 0, 0].item() == np.float32(100) / np.float32(255) * 2 - 1
    assert open_depth("scenes", packed, size=(2, 3)).fetch([1])["depth"].shape == (1, 1, 2, 3)
    with pytest.raises(IndexError):
        DepthStore(packed).images([3])
    with pytest.raises(DatasetError, match="no splits"):
        open_depth("scenes", packed, "val", size=(4, 6))


@pytest.mark.parametrize("damage", ["cut", "missing", "type", "index"])
def test_damaged_folders_are_named(packed: Path, damage: str) -> None:
    if damage == "index":
        (packed / "index.json").write_text("{}")
        with pytest.raises(ShardError, match=r"index.json is damaged"):
            DepthStore(packed)
        return
    if damage == "cut":
        path = packed / "depth-00001.npy"
        path.write_bytes(path.read_bytes()[:-30])
    elif damage == "missing":
        (packed / "depth-00001.npy").unlink()
    else:
        np.save(packed / "depth-00001.npy", np.zeros((1, 4, 6)))
    with pytest.raises(ShardError, match="is damaged: depth-00001"):
        DepthStore(packed)


def test_other_settings_are_refused(packed: Path) -> None:
    with pytest.raises(ShardError, match="was begun with another kind"):
        DepthStoreWriter(packed, settings={"kind": "other"}, size=(4, 6), total=3)
    with pytest.raises(ShardError, match="another size"):
        DepthStoreWriter(packed, settings={"kind": "test"}, size=(5, 6), total=3)
    with pytest.raises(ShardError, match="holds 3 pairs already"):
        DepthStoreWriter(packed, settings={"kind": "test"}, size=(4, 6), total=2)
    with pytest.raises(ShardError, match="no folder of packed depth pairs"):
        DepthStore(packed.parent)
    writer = DepthStoreWriter(packed.parent / "new", settings={}, size=(4, 6), total=1)
    with pytest.raises(ValueError, match="expected"):
        writer.write(np.zeros((4, 5, 3)), np.zeros((4, 6)), np.eye(3))
    assert json.loads((packed / "index.json").read_text())["shards"] == [2, 1]
