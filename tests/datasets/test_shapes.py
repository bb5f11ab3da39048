"""Prepared objects: what is written comes back, samples depend on (seed, epoch, object) alone, damage is found."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from nextscale.datasets.array_store import ArrayStore, ArrayStoreWriter
from nextscale.datasets.errors import DatasetError, ShardError
from nextscale.datasets.loader import make_loader
from nextscale.datasets.sampler import EpochSampler
from nextscale.datasets.shapes import KIND, ShapeSamples, ShapeSet, packed_row, quantised, restored

SAMPLES = ShapeSamples(surface=40, uniform=30, near=21, distances=True, views=2, size=8)


def balls(folder: Path, samples: ShapeSamples = SAMPLES, number: int = 5, finish: bool = True) -> Path:
    """Balls of growing size, every third of them refused."""
    settings = {"samples": asdict(samples), "classes": ["ball", "orb"]}
    writer = ArrayStoreWriter(folder, kind=KIND, settings=settings, columns=samples.columns(), shard_size=2)
    for i in range(len(writer.done), number):
        draw, radius = np.random.default_rng(i), 0.5 + 0.08 * i
        normals = draw.normal(size=(samples.surface, 3))
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        queries = quantised(draw.uniform(-1, 1, (samples.queries, 3)))
        distance = np.linalg.norm(restored(queries), axis=1) - radius
        image = np.full((samples.views, samples.size, samples.size, 3), 0, np.uint8) + np.array([0, 255, 51], np.uint8)
        row = packed_row(
            i % 2,
            normals * radius,
            normals,
            queries,
            distance < 0,
            distance if samples.distances else None,
            image if samples.views else None,
        )
        writer.write({"name": f"ball {i}"}, None if i % 3 == 2 else row)
    if finish:
        writer.finish()
    return folder


def test_a_batch_is_what_was_written(tmp_path: Path) -> None:
    data = ShapeSet(balls(tmp_path))
    assert len(data) == 4 and data.names == ["ball 0", "ball 1", "ball 3", "ball 4"] and data.classes == ("ball", "orb")
    assert [record["name"] for record in data.store.refused] == ["ball 2"]
    batch = data.fetch([0, 2])
    shapes = {name: tuple(value.shape) for name, value in batch.items()}
    assert shapes["surface"] == (2, 40, 6) and shapes["queries"] == (2, 51, 3) and shapes["image"] == (2, 3, 8, 8)
    assert batch["occupied"].dtype == torch.bool and batch["label"].tolist() == [0, 1]
    radius = torch.tensor([0.5, 0.74])
    points, normals = batch["surface"].split(3, -1)
    torch.testing.assert_close(points.norm(dim=-1), radius[:, None].expand(2, 40), atol=1e-4, rtol=0)
    torch.testing.assert_close(normals, points / radius[:, None, None], atol=0.01, rtol=0)
    distance = batch["queries"].norm(dim=-1) - radius[:, None]
    assert torch.equal(batch["occupied"], distance < 0)
    torch.testing.assert_close(batch["distance"], distance, atol=1e-3, rtol=0)
    assert batch["near"].sum(1).tolist() == [21, 21] and not batch["near"][:, :30].any()
    assert batch["image"][0, :, 0, 0].tolist() == pytest.approx([0, 1, 0.2])


def test_samples_depend_on_seed_epoch_and_object_alone(tmp_path: Path) -> None:
    folder = balls(tmp_path)
    data = ShapeSet(folder, surface=16, uniform=8, near=4, noise=0.01, seed=3)
    alone, together = data.fetch([(1, 2)]), data.fetch([(1, 0), (1, 2)])
    assert all(torch.equal(alone[name][0], together[name][1]) for name in alone)
    assert alone["surface"].shape == (1, 16, 6) and alone["queries"].shape == (1, 12, 3)
    assert alone["near"].sum() == 4
    for other in (data.fetch([(2, 2)]), ShapeSet(folder, surface=16, uniform=8, near=4, seed=4).fetch([(1, 2)])):
        assert not torch.equal(alone["queries"], other["queries"])
    batch = next(iter(make_loader(data, EpochSampler(len(data), batch_size=3))))
    assert batch["surface"].shape == (3, 16, 6)
    # Bits are those of the points that were chosen.
    distance = batch["queries"].norm(dim=-1) - (0.5 + 0.08 * torch.tensor([0, 1, 3, 4]))[batch["index"]][:, None]
    assert torch.equal(batch["occupied"], distance < 0)


def test_stretching_keeps_surface_and_queries_together(tmp_path: Path) -> None:
    plain = ShapeSamples(surface=400, uniform=100, near=0)
    folder = balls(tmp_path / "plain", plain)
    batch = ShapeSet(folder, stretch=0.25, seed=1).fetch([3])
    points, normals = batch["surface"][0].split(3, -1)
    # An ellipsoid: points solve sum (x / a)^2 = 1, and the normal is along x / a^2.
    inverse = torch.linalg.lstsq(points.square(), torch.ones(400, 1)).solution[:, 0]
    assert inverse.max() / inverse.min() > 1.05
    torch.testing.assert_close((points.square() @ inverse), torch.ones(400), atol=1e-3, rtol=0)
    along = torch.nn.functional.normalize(points * inverse, dim=-1)
    torch.testing.assert_close(normals, along, atol=0.02, rtol=0)
    assert torch.equal(batch["occupied"][0], batch["queries"][0].square() @ inverse < 1)
    with pytest.raises(DatasetError, match="stretch"):
        ShapeSet(balls(tmp_path / "pictures"), stretch=0.1)


def test_classes_of_another_set_number_the_labels(tmp_path: Path) -> None:
    data = ShapeSet(balls(tmp_path), classes=["orb", "cup", "ball"])
    assert data.labels.tolist() == [2, 0, 0, 2]
    with pytest.raises(DatasetError, match="orb"):
        ShapeSet(tmp_path, classes=["ball"])


def test_an_interrupted_folder_goes_on(tmp_path: Path) -> None:
    balls(tmp_path, number=3, finish=False)
    with pytest.raises(ShardError, match="not complete"):
        ArrayStore(tmp_path, KIND)
    (tmp_path / "points-00001.npy").write_bytes(b"half a shard")
    balls(tmp_path)
    whole = balls(tmp_path.with_name("whole"))
    for name in SAMPLES.columns():
        both = [ArrayStore(folder, KIND).rows(name, range(4)) for folder in (tmp_path, whole)]
        np.testing.assert_array_equal(*both)
    with pytest.raises(ShardError, match="another columns, samples"):
        balls(tmp_path, ShapeSamples(surface=41, uniform=30, near=21, distances=True, views=2, size=8))


@pytest.mark.parametrize("name", ["points-00000.npy", "records-00001.json", "index.json"])
def test_damage_is_found(tmp_path: Path, name: str) -> None:
    path = balls(tmp_path) / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ShardError, match=name):
        ShapeSet(tmp_path)


def test_more_points_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="surface is 41"):
        ShapeSet(balls(tmp_path), surface=41)
    with pytest.raises(DatasetError, match="view is 2"):
        ShapeSet(tmp_path, view=2)
