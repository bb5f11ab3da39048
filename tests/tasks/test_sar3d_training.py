"""Training SAR3D from a folder of views to a model that draws shapes; the terms of its losses."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trimesh

import nextscale
from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.training import TrainingConfig
from nextscale.datasets.gbuffers import TOKENS, Views, find_objects, write_views
from nextscale.tasks.shapes.pictures import LearnedEncoderConfig
from nextscale.tasks.shapes.sar3d_data import ConditionedObjects, ObjectData
from nextscale.tasks.shapes.sar3d_fields import FieldConfig, MeshField
from nextscale.tasks.shapes.sar3d_mesh_training import MeshLossConfig, MeshTraining, cast
from nextscale.tasks.shapes.sar3d_planes import PlanesConfig
from nextscale.tasks.shapes.sar3d_recipe import MeshRecipe, SAR3DRecipe, TriplaneRecipe, three_planes
from nextscale.tasks.shapes.sar3d_rendering import RenderConfig, camera_rays
from nextscale.tasks.shapes.sar3d_tokenizer import TriplaneVQ
from nextscale.tasks.shapes.sar3d_tokenizer_training import (
    TriplaneLossConfig,
    TriplaneTraining,
    aligned_depth_loss,
    cut_window,
)
from nextscale.tasks.shapes.sar3d_views import ViewsConfig
from nextscale.tasks.shapes.viewing import camera

SIDE = 16


def seen(mesh: trimesh.Trimesh, colour: tuple[int, int, int], count: int = 4) -> Views:
    """Views of a mesh of one colour from around it."""
    poses = [camera(70 * number, 20, 1.9) for number in range(count)]
    rows = [np.concatenate((pose.ravel(), [1.3889, 0, 0.5, 0, 1.3889, 0.5, 0, 0, 1])) for pose in poses]
    cameras = torch.tensor(np.array(rows), dtype=torch.float32)
    origins, directions = camera_rays(cameras, SIDE)
    depth = np.zeros((count, SIDE * SIDE), np.float32)
    vertices, faces = torch.tensor(mesh.vertices, dtype=torch.float32), torch.tensor(np.asarray(mesh.faces))
    normals = np.zeros((count, SIDE * SIDE, 3), np.float32)
    for view in range(count):
        hits = cast(vertices, faces, origins[view], directions[view])
        forward = cameras[view, :16].view(4, 4)[:3, 2]
        depth[view, hits.hit] = hits.distance * (directions[view][hits.hit] @ forward)
        normals[view, hits.hit] = hits.normals
    alpha = (depth > 0).reshape(count, SIDE, SIDE)
    colours = np.where(alpha[..., None], colour, 255).astype(np.uint8)
    return Views(
        colours, depth.reshape(alpha.shape), (alpha * 255).astype(np.uint8), cameras.numpy(),
        normals.reshape(*alpha.shape, 3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three red boxes and three blue balls."""
    folder = tmp_path_factory.mktemp("views")
    for number in range(3):
        size = 0.4 + 0.1 * number
        write_views(folder / "box" / f"{number}", seen(trimesh.creation.box((size,) * 3), (200, 30, 30)), "a red box")
        ball = trimesh.creation.icosphere(2, size / 2)
        write_views(folder / "ball" / f"{number}", seen(ball, (30, 30, 200)), "a blue ball")
    return folder


def training(folder: Path, **changes: Any) -> TrainingConfig:
    usual = {"epochs": 1.0, "batch_size": 2, "log_every": 1, "average": 0.9, "warmup_epochs": 0, "learning_rate": 0.05}
    return TrainingConfig(str(folder), **{**usual, **changes})


def tokenizer_recipe(objects: Path, output: Path, **changes: Any) -> TriplaneRecipe:
    return TriplaneRecipe(
        ObjectData(str(objects), held_out=1),
        scales="1 2 4",
        encoder=AutoencoderConfig(8, (1, 1, 2), 1, 12, 10, attention=False, norm_groups=4),
        views=ViewsConfig(3, 2, 4),
        quantizer=QuantizerConfig(16, 4, unit_norm=True),
        decoder=PlanesConfig(8, 2, 2),
        upsampler=AutoencoderConfig(8, (1, 1), 1, 8, 8, norm_groups=4, level_attention=()),
        head=FieldConfig("density", 8, 16, grid=8),
        render=RenderConfig(coarse=6, fine=4),
        loss=TriplaneLossConfig(
            pictures=3, patch=12, discriminator_channels=8, discriminator_levels=1, perceptual_start=1
        ),
        training=training(output, **changes),
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def load(source: str, tokenizer: Any = None) -> Any:
    return nextscale.load(source, device="cpu")


@pytest.fixture(scope="module")
def tokenizer(objects: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tokenizer"
    recipe = tokenizer_recipe(objects, folder)
    run = recipe.trainer(load)
    run.run()
    examples = recipe.examples(run)
    assert [name for name, _ in examples.rows] == ["seen", "made"] and len(examples.rows[1][1]) == 2
    return recipe.finish(run)


def test_tokenizer_is_trained_and_saved(tokenizer: Path) -> None:
    logged = rows(tokenizer.parent)
    assert {"loss", "colour", "mask", "depth", "perceptual", "quantizer", "adversarial", "psnr"} <= set(logged[1])
    assert "discriminator/real" in logged[1] and any("validation/psnr" in row for row in logged)
    assert all(np.isfinite(row["loss"]) for row in logged if "loss" in row)
    loaded = load(str(tokenizer))
    assert isinstance(loaded, TriplaneVQ) and loaded.config.schedule == three_planes("1 2 4")


def test_learning_lowers_the_loss(objects: Path, tmp_path: Path) -> None:
    recipe = tokenizer_recipe(objects, tmp_path)
    torch.manual_seed(0)
    model = recipe.build(load)
    task = TriplaneTraining(model, replace(recipe.loss, adversarial=0.0, perceptual=0.0))
    batch = recipe.data.open_training().fetch([0, 2])
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for step in range(12):
        optimizer.zero_grad()
        loss, metrics = task.loss("tokenizer", model.train(), dict(batch), step)
        loss.backward()
        optimizer.step()
        losses.append(float(metrics["mask"]))
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_the_mesh_head_learns_on_its_own(tokenizer: Path, objects: Path, tmp_path: Path) -> None:
    recipe = MeshRecipe(
        str(tokenizer), ObjectData(str(objects), normals=True), loss=MeshLossConfig(rays=64, samples=16),
        training=training(tmp_path / "mesh", epochs=0.4, average=0.0),
    )  # fmt: skip
    run = recipe.trainer(load)
    task = run.task
    assert isinstance(task, MeshTraining) and isinstance(task.tokenizer.field, MeshField)
    before = {name: value.clone() for name, value in task.tokenizer.state_dict().items()}
    run.run()
    after = task.tokenizer.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"field"} and {"overlap", "mask", "colour"} <= set(rows(tmp_path / "mesh")[0])
    saved = load(str(recipe.finish(run)))
    assert saved.official_name == "vqvae-flexicubes-ckpt.pt"
    again = replace(recipe, tokenizer=str(tmp_path / "mesh" / "model")).build(load)
    assert torch.equal(again.state_dict()["field.distance.0.weight"], after["field.distance.0.weight"])


@pytest.mark.parametrize("condition", ["image", "text"])
def test_transformer_is_trained_and_draws_shapes(
    tokenizer: Path, objects: Path, tmp_path: Path, condition: Any
) -> None:
    recipe = SAR3DRecipe(
        str(tokenizer), ObjectData(str(objects), held_out=1), condition, depth=1, width=16, heads=2,
        picture=LearnedEncoderConfig(16, 8, 2), memory_width=8, text_width=8, text_length=6,
        training=training(tmp_path / "model", average=0.0),
    )  # fmt: skip
    run = recipe.trainer(load)
    run.run()
    logged = rows(tmp_path / "model")
    assert {"cross_entropy", "accuracy_last"} <= set(logged[0]) and any("validation/loss" in row for row in logged)
    assert len(recipe.examples(run).rows[0][1]) == 2
    model = load(str(recipe.finish(run)))
    given = "a red box" if condition == "text" else objects / "box" / "0" / "raw_img.png"
    [shape] = model.generate(given, resolution=10, level=-100.0)
    assert shape.up == "z"
    loss, _ = model.loss({"tokens": torch.zeros(1, 63, dtype=torch.long), "features": model.prepare(given)})
    assert torch.isfinite(loss)


def test_prepared_tokens_and_features_are_read(tokenizer: Path, objects: Path, tmp_path: Path) -> None:
    for folder, _ in find_objects(objects):
        np.save(folder / TOKENS, np.arange(63) % 16)
        np.save(folder / "image_dino_embedding_lrm.npy", np.zeros((5, 8), np.float32))
    recipe = SAR3DRecipe(str(tokenizer), ObjectData(str(objects)), depth=1, width=16, heads=2, prepared=True,
                         memory_width=8, training=training(tmp_path / "model"))  # fmt: skip
    run = recipe.trainer(load)
    batch = next(run.batches(0, 2))
    assert batch["tokens"].tolist() == [(np.arange(63) % 16).tolist()] * 2 and len(batch["features"]) == 2
    assert batch["features"].states.lengths == (4, 4)


def test_every_epoch_shows_another_picture_and_encodes_nothing_again(tokenizer: Path, objects: Path) -> None:
    model = SimpleNamespace(tokenizer=load(str(tokenizer)))
    data = ConditionedObjects(ObjectData(str(objects)).open_training(), model, seed=0)  # type: ignore[arg-type]
    pictures = [data.fetch([(epoch, 3)])["condition"] for epoch in range(6)]
    assert len({picture.numpy().tobytes() for picture in pictures}) > 1
    assert torch.equal(data.fetch([(3, 3)])["condition"], pictures[3])
    model.tokenizer.encode = None
    assert data.fetch([(0, 3)])["tokens"].shape == (1, 63)


# --- losses -----------------------------------------------------------------------------------------


def test_depth_counts_whatever_its_scale_and_shift() -> None:
    target = torch.rand(2, 8, 8) + 1
    mask = torch.rand(2, 8, 8) > 0.3
    assert aligned_depth_loss(3 * target - 2, target, mask) < 1e-5
    assert aligned_depth_loss(target + torch.rand(2, 8, 8), target, mask) > 1e-3
    changed = torch.where(mask, target, 100.0)
    assert aligned_depth_loss(changed, target, mask) < 1e-5
    assert aligned_depth_loss(target, target, torch.zeros_like(mask)) == 0


def test_windows_lie_where_the_object_is(objects: Path) -> None:
    batch = ObjectData(str(objects)).open_training().fetch([0, 1])
    window = cut_window(batch, 6, 1.0)
    assert window.colours.shape == (8, 3, 6, 6) and window.directions.shape == (2, 4 * 36, 3)
    assert (window.alpha.amax((1, 2, 3)) > 0.5).all()
    # The rays are those of the pixels: where they meet the object, they point at it.
    nearest = torch.linalg.cross(window.origins, window.directions).norm(dim=-1).view(8, 1, 6, 6)
    assert nearest[window.alpha > 0.5].max() < nearest[window.alpha <= 0.5].max()


def test_a_hit_knows_its_distance_and_normal() -> None:
    vertices = torch.tensor([[-1.0, -1, 2], [1, -1, 2], [0, 1, 2]], requires_grad=True)
    origins, directions = torch.zeros(2, 3), torch.tensor([[0.0, 0, 1], [0, 0, -1]])
    hits = cast(vertices, torch.tensor([[0, 1, 2]]), origins, directions)
    assert hits.hit.tolist() == [True, False] and hits.distance.item() == pytest.approx(2)
    assert hits.normals[0].tolist() == pytest.approx([0, 0, -1])
    hits.distance.sum().backward()
    assert vertices.grad is not None and vertices.grad[:, 2].sum() == pytest.approx(1)
