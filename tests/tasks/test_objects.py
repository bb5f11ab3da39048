"""Shapes: what is checked when they are made, their parts, their files, and drawing them from seeds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trimesh

from nextscale.core.random import Draws
from nextscale.tasks.shapes.objects import FORMATS, Shape, ShapeGenerator


def boxes(up: str = "y") -> Shape:
    """A large red box and a small green one beside it."""
    large = trimesh.creation.box((1.0, 2.0, 0.5))
    small = trimesh.creation.box((0.1, 0.1, 0.1), transform=trimesh.transformations.translation_matrix((2, 0, 0)))
    vertices = np.concatenate((large.vertices, small.vertices))
    colours = np.repeat([[1.0, 0, 0], [0, 1.0, 0]], 8, axis=0)
    return Shape(vertices, np.concatenate((large.faces, small.faces + 8)), colours, up)


def test_a_shape_knows_its_parts() -> None:
    shape = boxes()
    assert shape.watertight and shape.volume == pytest.approx(1.001) and shape.area == pytest.approx(7.06)
    large, small = shape.components()
    assert large.volume == pytest.approx(1.0) and small.volume == pytest.approx(0.001)
    assert (shape.largest_component().colours == [1, 0, 0]).all() and (small.colours == [0, 1, 0]).all()
    assert len(large.vertices) == 8


def test_tensors_are_taken() -> None:
    shape = Shape(torch.zeros(3, 3, requires_grad=True), torch.tensor([[0, 1, 2]]), torch.full((3, 3), 1.5))
    assert shape.vertices.dtype == np.float32 and shape.faces.dtype == np.int64 and shape.colours.max() == 1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((np.full((3, 3), np.nan), [[0, 1, 2]]), "3 of 3 vertices are not finite"),
        ((np.zeros((3, 3)), [[0, 1, 3]]), "faces name vertices 0 to 3, there are 3"),
        ((np.zeros((3, 2)), [[0, 1, 2]]), r"vertices have shape \(3, 2\)"),
        ((np.zeros((3, 3)), [[0, 1, 2]], np.zeros((2, 3))), "2 colours were given for 3 vertices"),
        ((np.zeros((3, 3)), [[0, 1, 2]], None, "x"), "up is 'x'"),
    ],
)
def test_parts_that_do_not_fit(parts: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shape(*parts)


def test_faces_are_turned_outwards() -> None:
    shape = boxes()
    inside_out = Shape(shape.vertices, shape.faces[:, ::-1])
    assert inside_out.volume == pytest.approx(-1.001)
    assert inside_out.oriented().volume == pytest.approx(1.001)


def test_another_axis_up_is_a_rotation() -> None:
    shape = boxes()
    turned = shape.turned("z")
    assert turned.volume == pytest.approx(shape.volume) and np.ptp(turned.vertices, axis=0)[2] == pytest.approx(2)
    np.testing.assert_array_equal(turned.turned("y").vertices, shape.vertices)


def test_normalised() -> None:
    shape = boxes().normalised(0.45)
    assert np.ptp(shape.vertices, axis=0).max() == pytest.approx(0.9)
    np.testing.assert_allclose(shape.vertices.min(0) + shape.vertices.max(0), 0, atol=1e-6)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("up", ["y", "z"])
def test_files_stand_upright_and_hold_colours(tmp_path: Path, suffix: str, up: str) -> None:
    path = boxes(up).save(tmp_path / f"a böx{suffix}")
    read = trimesh.load(path, force="mesh", process=False)
    long = {"y": {"y": 1, "z": 2}, "z": {"y": 1, "z": 2}}[up][FORMATS[suffix]]
    here = {"y": 1, "z": 2}[up]
    extent = np.ptp(boxes(up).vertices, axis=0)
    assert np.ptp(read.vertices, axis=0)[long] == pytest.approx(extent[here])
    assert read.volume == pytest.approx(1.001, rel=1e-3)
    if suffix != ".stl":
        found = Shape.from_trimesh(read).largest_component()
        assert found.colours is not None and (found.colours == [1, 0, 0]).all()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"suffix '\.abc' is no mesh"):
        boxes().save(tmp_path / "box.abc")
    empty = Shape(np.zeros((0, 3)), np.zeros((0, 3)))
    assert empty.empty and empty.largest_component().empty and not empty.watertight
    with pytest.raises(ValueError, match="no faces to write"):
        empty.save(tmp_path / "box.glb")


@dataclass
class Numbers:
    values: list[int]

    def __len__(self) -> int:
        return len(self.values)

    def select(self, rows: list[int]) -> "Numbers":
        return Numbers([self.values[row] for row in rows])


class Triangles(ShapeGenerator):
    """A triangle whose size is the condition, and whose place is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer, self.scale = torch.nn.Identity(), torch.nn.Parameter(torch.ones(()))
        self.config = SimpleNamespace(schedule=range(3))

    def prepare(self, condition: int | list[int]) -> Numbers:
        return Numbers([condition] if isinstance(condition, int) else condition)

    def draw_shapes(self, condition: Numbers, draws: Draws, advance: Callable[[], None]) -> list[Shape]:  # type: ignore[override]
        for _ in range(self.scales):
            advance()
        places = draws.exponential((len(condition), 3), self.device)
        corners = torch.eye(3)[None] * torch.tensor(condition.values)[:, None, None] + places[:, None]
        return [Shape(each, [[0, 1, 2]]) for each in corners]


def test_a_shape_is_the_same_in_any_batch() -> None:
    model, calls = Triangles().train(), []
    shapes = model.generate([1, 2], 5, seed=3, batch_size=2, progress=lambda *call: calls.append(call))
    alone = model.generate([2], 1, seed=4)
    np.testing.assert_array_equal(shapes[1].vertices, alone[0].vertices)
    assert len(shapes) == 5 and calls[-1] == (9, 9) and len(calls) == 9
    assert not model.tokenizer.training
    assert [shape.area for shape in shapes] == pytest.approx([0.866, 3.464, 0.866, 3.464, 0.866], rel=1e-3)
    with pytest.raises(ValueError, match="2 seeds were given for 5"):
        model.generate([1, 2], 5, seed=[1, 2])
