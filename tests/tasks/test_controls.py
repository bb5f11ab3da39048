"""Control pictures: canny, sizes, soft edges and sketches, depth and normals."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.evaluation.control import edge_agreement
from nextscale.tasks.generation.controls import KINDS, Extraction, extract, extract_batch
from nextscale.tasks.generation.controls_canny import canny
from nextscale.tasks.generation.controls_edges import gradient_edges, sketch, thin
from nextscale.tasks.generation.controls_geometry import nearness, normal_picture
from nextscale.tasks.generation.controls_resize import detector_size, resize, resize_for_detector, squash


def picture(height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def test_canny_of_a_step_is_one_line() -> None:
    pixels = np.zeros((9, 9, 3), np.uint8)
    pixels[:, 5:, 1] = 40  # one channel alone: a gradient of 160
    edges = canny(pixels, 100, 150)
    assert edges[:, 4].all() and edges.sum() == 9
    assert not canny(pixels, 100, 160).any()  # above, not at, the threshold
    assert not canny(pixels, 170, 200).any()


def test_weak_edges_stay_where_they_touch_strong_ones() -> None:
    pixels = np.zeros((12, 12, 1), np.uint8)
    pixels[:6, 6:], pixels[6:, 6:] = 60, 30
    joined = canny(pixels, 50, 200)
    assert joined[:5, 5].all() and joined[7:, 5].all()
    pixels[:6, 6:] = 30
    assert not canny(pixels, 50, 200).any()


def test_canny_of_a_batch_is_that_of_each() -> None:
    batch = np.stack([picture(seed=i) for i in range(3)])
    edges = canny(batch)
    assert edges.any() and all(np.array_equal(edges[i], canny(batch[i])) for i in range(3))
    with pytest.raises(ValueError, match="expected uint8"):
        canny(batch.astype(float))


@pytest.mark.parametrize("size", [(20, 28), (64, 64), (40, 56)])
def test_tensors_are_resized_as_pillow_does(size: tuple[int, int]) -> None:
    pixels = picture()
    assert np.array_equal(squash(pixels, size), np.asarray(Image.fromarray(pixels).resize(size[::-1])))
    ours = resize(tensor(pixels)[None], size)[0] * 255
    assert np.abs(ours.permute(1, 2, 0).numpy() - squash(pixels, size)).max() < 1.01


@pytest.mark.parametrize(
    ("shape", "resolution", "expected"),
    [
        ((96, 72), 384, (512, 384)),
        ((500, 800), 384, (384, 640)),
        ((400, 440), 384, (384, 448)),
        ((64, 64), 64, (64, 64)),
    ],
)
def test_a_detectors_picture(shape: tuple[int, int], resolution: int, expected: tuple[int, int]) -> None:
    assert detector_size(*shape, resolution) == expected
    flat = np.full((*shape, 3), 93, np.uint8)
    assert (resize_for_detector(flat, resolution) == 93).all()
    seen = resize_for_detector(picture(*shape), resolution)
    assert seen.shape[:2] == expected
    about = np.asarray(Image.fromarray(picture(*shape)).resize(expected[::-1], Image.Resampling.BICUBIC))
    assert np.abs(seen.astype(int) - about).mean() < 2


def test_thin_lines_and_strokes() -> None:
    down, right = np.mgrid[:96, :96] - 48
    soft = np.where(np.abs(np.hypot(down, right) - 30) < 4, 255, 0).astype(np.uint8)
    lines = thin(soft)
    assert 0 < lines.sum() < 0.4 * (soft > 0).sum() and (soft[lines] > 0).all()
    strokes = sketch(soft)
    assert strokes.sum() > 2 * lines.sum() and strokes[lines].all()


def test_soft_edges_need_no_weights() -> None:
    image = torch.zeros(3, 64, 64)
    image[:, :, 32:] = 1
    soft = gradient_edges(image)
    assert soft.argmax(1).sub(31.5).abs().max() < 1 and soft.max() == 1
    assert gradient_edges(torch.full((3, 64, 64), 0.3)).max() < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_control(kind: str) -> None:
    image = tensor(picture())

    def far_on_the_left(seen: torch.Tensor) -> torch.Tensor:
        return torch.linspace(0, 1, seen.shape[2]).expand(seen.shape[1:])

    control = extract(image, Extraction(kind, resolution=64), depth=far_on_the_left)
    assert control.shape == image.shape and control.min() >= 0 and control.max() <= 1
    assert extract(image, Extraction(kind, resolution=64), size=(32, 32), depth=far_on_the_left).shape == (3, 32, 32)
    if kind == "depth":
        assert control[0, 20, 0] < control[0, 20, -1]
    if kind in ("canny", "hed", "sketch"):
        how = Extraction(kind, resolution=64)
        assert torch.equal(extract_batch(image[None], how)[0], extract(image, how))


def test_a_detector_of_ones_own() -> None:
    image, how = tensor(picture()), Extraction("hed", resolution=64)
    white = extract(image, how, detector=lambda seen: torch.ones(seen.shape[1:]))
    torch.testing.assert_close(white, torch.ones_like(white))
    normals = extract(image, Extraction("normal", resolution=64), detector=lambda seen: torch.zeros_like(seen))
    assert (normals - 0.5).abs().max() < 1 / 255


def test_normals_of_slopes() -> None:
    image = torch.zeros(3, 32, 32)
    floor = normal_picture(image, lambda seen: torch.linspace(0, 1, 32)[:, None].expand(32, 32))[:, 16, 16]
    assert floor[1] > 0.7 and abs(floor[0] - 0.5) < 0.05 and floor[2] > 0.5
    wall = normal_picture(image, lambda seen: torch.linspace(0, 1, 32).expand(32, 32))[:, 16, 16]
    assert wall[0] > 0.7 and wall[2] > 0.5  # near on the right, so it faces left
    flat = normal_picture(image, lambda seen: torch.ones(32, 32))[:, 16, 16]
    torch.testing.assert_close(flat, torch.tensor([0.5, 0.5, 1.0]), atol=0.01, rtol=0)


def test_depth_models() -> None:
    image = torch.rand(3, 16, 16)
    distances = SimpleNamespace(predict=lambda seen: torch.linspace(1, 4, 16).expand(16, 16))
    near = nearness(image, distances)
    assert near[0, 0] == 1 and near[0, -1] == 0.25
    assert nearness(image, lambda seen: torch.zeros(1, 8, 8)).shape == (16, 16)
    with pytest.raises(ValueError, match="need a depth model"):
        nearness(image, None)
    with pytest.raises(ValueError, match=r"gave \(2, 8, 8\)"):
        nearness(image, lambda seen: torch.zeros(2, 8, 8))


def test_a_depth_model_of_transformers(tmp_path: Path) -> None:
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, is_hybrid=False,
    )  # fmt: skip
    DPTForDepthEstimation(config).save_pretrained(tmp_path)
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    control = extract(tensor(picture()), Extraction("depth", resolution=64), depth=str(tmp_path))
    assert control.shape == (3, 40, 56) and torch.equal(control[0], control[1])


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match="no control 'pose'"):
        extract(tensor(picture()), "pose")
    with pytest.raises(ValueError, match="expected \\(3, height, width\\)"):
        extract(torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="at least 64"):
        Extraction("hed", resolution=32)


def test_agreement_of_edges() -> None:
    wanted = np.zeros((6, 6), bool)
    wanted[2] = True
    shifted = np.roll(wanted, 1, axis=0)
    assert edge_agreement(wanted, wanted) == (1, 1, 1)
    assert edge_agreement(wanted, shifted).f1 == 0 and edge_agreement(wanted, shifted, tolerance=1).f1 == 1
    half = wanted.copy()
    half[2, 3:] = False
    assert edge_agreement(wanted, half) == pytest.approx((2 / 3, 1, 0.5))
    empty = np.zeros_like(wanted)
    assert edge_agreement(empty, empty).f1 == 1 and edge_agreement(wanted, empty).f1 == 0
    with pytest.raises(ValueError, match="one size"):
        edge_agreement(wanted, wanted[:3])
