"""Preparing objects: procedural ones, folders, ShapeNet and Objaverse; resumed, extended, refused files named."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import trimesh

from nextscale.datasets.errors import DatasetError, ShardError, SourceError
from nextscale.datasets.gbuffers import find_objects, read_views
from nextscale.datasets.objects_procedural import CLASSES, make_object
from nextscale.datasets.shapes import ShapeSamples, ShapeSet
from nextscale.datasets.shapes_gbuffers import Rendering, render_all
from nextscale.datasets.shapes_prepare import Preparation, prepare
from nextscale.datasets.shapes_sources import Procedural, open_source
from nextscale.datasets.shapes_topology import closed, pieces
from nextscale.datasets.shapes_views import DISTANCE, HALF, camera, render
from nextscale.datasets.shapes_winding import winding_numbers

FEW = ShapeSamples(surface=200, uniform=100, near=60, distances=True, views=2, size=16)
PREPARATION = Preparation(FEW, resolution=32)


@pytest.mark.parametrize("name", CLASSES)
def test_procedural_objects_are_closed_and_differ(name: str) -> None:
    volumes = []
    for index in range(3):
        mesh, own = make_object(7, index, (name,))
        assert own == name and closed(mesh.faces) and mesh.volume > 0
        assert np.abs(mesh.vertices).max() == pytest.approx(1) and mesh.colours is not None
        assert sum(abs(mesh.select(part).volume) > 1e-4 for part in pieces(mesh)) == 1
        volumes.append(mesh.volume)
    assert len(set(volumes)) == 3
    again, _ = make_object(7, 2, (name,))
    np.testing.assert_array_equal(again.vertices, mesh.vertices)


def test_prepared_objects_know_what_is_inside(tmp_path: Path) -> None:
    source = Procedural(4, seed=1, classes=("cup", "table"))
    records = prepare(tmp_path, source, PREPARATION, workers=0)
    assert [record["category"] for record in records] == ["cup", "table"] * 2
    data = ShapeSet(tmp_path)
    batch = data.fetch(range(4))
    assert data.classes == ("cup", "table") and batch["label"].tolist() == [0, 1, 0, 1]
    for number in (0, 1):
        mesh = source.mesh(number).normalised(0.95)
        queries = batch["queries"][number].double().numpy()
        winding = winding_numbers(queries, mesh.vertices, mesh.faces)
        np.testing.assert_array_equal(batch["occupied"][number].numpy(), winding > 0.5)
        assert ((batch["distance"][number].numpy() < 0) == (winding > 0.5)).all()
    assert batch["image"].shape == (4, 3, 16, 16) and 0.2 < float(batch["image"].mean()) < 1
    assert float(batch["surface"][..., :3].abs().max()) == pytest.approx(0.95, abs=0.02)


def test_preparing_goes_on_and_takes_in_more(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    small = Procedural(5, classes=("spoon", "vase"))
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "a", small, PREPARATION, workers=0, shard_size=2, progress=stop)
    with pytest.raises(ShardError, match="not complete"):
        ShapeSet(tmp_path / "a")
    counts: list[int] = []
    prepare(tmp_path / "a", small, PREPARATION, workers=0, shard_size=2, progress=lambda done, _: counts.append(done))
    assert counts == [2, 3, 4, 5]
    more = Procedural(6, classes=("spoon", "vase"))
    prepare(tmp_path / "a", more, PREPARATION, workers=0, shard_size=2)
    prepare(tmp_path / "b", more, PREPARATION, workers=0)
    first, second = (ShapeSet(tmp_path / name).fetch(range(6)) for name in "ab")
    assert all(np.array_equal(first[name], second[name]) for name in first)
    with pytest.raises(ShardError, match="seed"):
        prepare(tmp_path / "a", more, Preparation(FEW, resolution=32, seed=1), workers=0)


def folder_of_meshes(root: Path) -> Path:
    for place, made in {
        "bälle/rot 1.ply": trimesh.creation.icosphere(1),
        "bälle/2.obj": trimesh.creation.icosphere(1),
        "boxes/a.stl": trimesh.creation.box((1, 2, 3)),
        "boxes/b.glb": trimesh.creation.box((1, 1, 1)),
    }.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        made.export(root / place)
    (root / "boxes" / "broken.stl").write_bytes(b"solid nothing")
    (root / "boxes" / "notes.txt").write_text("not a mesh")
    return root


def test_a_folder_of_meshes_its_refusals_and_its_changes(tmp_path: Path) -> None:
    root = folder_of_meshes(tmp_path / "my meshes")
    source = open_source(root)
    assert source.classes == ("boxes", "bälle")
    records = prepare(tmp_path / "out", source, PREPARATION, workers=0)
    refused = [record for record in records if "refused" in record]
    assert [record["name"] for record in refused] == ["boxes/broken.stl"] and refused[0]["refused"]
    data = ShapeSet(tmp_path / "out")
    assert data.names == ["boxes/a.stl", "boxes/b.glb", "bälle/2.obj", "bälle/rot 1.ply"]
    # An upright box in an STL file stays upright.
    extent = np.ptp(data.fetch([0])["surface"][0, :, :3].numpy(), axis=0)
    assert extent.argmax() == 2
    trimesh.creation.icosphere(2).export(root / "bälle" / "3.off")
    assert len(prepare(tmp_path / "out", open_source(root), PREPARATION, workers=0)) == 6
    trimesh.creation.icosphere(2).export(root / "bälle" / "2.obj")
    with pytest.raises(DatasetError, match=r"2\.obj changed"):
        prepare(tmp_path / "out", open_source(root), PREPARATION, workers=0)
    with pytest.raises(SourceError, match="no such folder"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="has no class cups"):
        open_source(root, classes=["cups"])


def test_shapenet_and_objaverse_layouts(tmp_path: Path) -> None:
    net = tmp_path / "ShapeNetCore.v2"
    for synset, model in (("03001627", "a1"), ("03001627", "b2"), ("02958343", "c3")):
        place = net / synset / model / "models" / "model_normalized.obj"
        place.parent.mkdir(parents=True)
        trimesh.creation.box().export(place)
    (net / "taxonomy.json").write_text(json.dumps([{"synsetId": "03001627", "name": "chair,seat"}]))
    for synset, names in (("03001627", "b2\n"), ("02958343", "c3\n")):
        (net / synset / "test.lst").write_text(names)
    assert open_source(net).classes == ("02958343", "chair")
    assert [item.name.split("/")[1] for item in open_source(net, split="test").items] == ["c3", "b2"]
    with pytest.raises(SourceError, match=r"train\.lst"):
        open_source(net, split="train")
    verse = tmp_path / "objaverse"
    (verse / "glbs" / "000-000").mkdir(parents=True)
    trimesh.creation.box().export(verse / "glbs" / "000-000" / "u1.glb")
    paths = {"u1": "glbs/000-000/u1.glb", "u2": "glbs/000-000/absent.glb", "u3": "../../etc/passwd"}
    (verse / "object-paths.json.gz").write_bytes(gzip.compress(json.dumps(paths).encode()))
    (verse / "lvis-annotations.json.gz").write_bytes(gzip.compress(json.dumps({"crate": ["u1"]}).encode()))
    assert [(item.name, item.category) for item in open_source(verse).items] == [("glbs/000-000/u1.glb", "crate")]


def test_views_show_what_is_there() -> None:
    ball = trimesh.creation.icosphere(4)
    from nextscale.datasets.shapes_files import Mesh

    mesh = Mesh(np.asarray(ball.vertices), np.asarray(ball.faces))
    pose = camera(40, 25)
    np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)
    views = render(mesh, pose[None], 33)
    assert views.depth[0, 16, 16] == pytest.approx(DISTANCE - HALF, abs=2e-3)
    assert views.depth[0, 0, 0] == 0 and views.alpha[0, 16, 16] == 255 and views.alpha[0, 0, 0] == 0
    normals = views.normals
    assert normals is not None
    np.testing.assert_allclose(normals[0, 16, 16], pose[:3, 3] / DISTANCE, atol=0.05)
    # The upper half of the picture shows the upper half of the ball.
    assert normals[0, 8, 16, 2] > normals[0, 24, 16, 2]
    assert (views.colours[0, 0, 0] == 255).all()


def test_gbuffers_are_read_back(tmp_path: Path) -> None:
    source = Procedural(2, classes=("cup", "lamp"))
    rendering = Rendering(views=3, size=24)
    records = render_all(tmp_path, source, rendering, workers=0)
    written = (tmp_path / records[0]["folder"] / "c.npy").stat().st_mtime_ns
    render_all(tmp_path, Procedural(3, classes=("cup", "lamp")), rendering, workers=0)
    assert (tmp_path / records[0]["folder"] / "c.npy").stat().st_mtime_ns == written
    found = find_objects(tmp_path)
    assert [category for _, category in found] == ["cup", "cup", "lamp"]
    views = read_views(found[0][0], normals=True)
    assert views.colours.shape == (3, 24, 24, 3) and views.normals is not None
    seen = views.depth > 0
    assert 0.02 < seen.mean() < 0.9 and (views.alpha[seen] > 0).mean() > 0.95
    assert views.depth[seen].min() > 1 and views.depth[seen].max() < 2.6
