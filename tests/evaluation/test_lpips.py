"""LPIPS on random weights, against the formula written out."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from nextscale.evaluation.lpips import LPIPS

# torchvision's VGG16 up to the last compared activation: convolution widths, and "M" for pooling.
LAYOUT = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]
LAST = {1: 0, 4: 1, 8: 2, 12: 3, 16: 4}


@pytest.fixture(scope="module")
def weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    trunk, place, width = {}, 0, 3
    for item in LAYOUT:
        if item == "M":
            place += 1
            continue
        shape = (int(item), width, 3, 3)
        trunk[f"features.{place}.weight"] = torch.randn(shape, generator=generator) * (2 / (9 * width)) ** 0.5
        trunk[f"features.{place}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
        place, width = place + 2, int(item)
    widths = (64, 128, 256, 512, 512)
    linear = {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1, generator=generator) for i, w in enumerate(widths)}
    return trunk, linear


@pytest.fixture(scope="module")
def files(
    weights: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(weights[0] | {"classifier.0.weight": torch.zeros(2)}, folder / "vgg.pth")
    save_file(weights[1], folder / "lpips.safetensors")
    return folder / "vgg.pth", folder / "lpips.safetensors"


@pytest.fixture(scope="module")
def model(files: tuple[Path, Path]) -> LPIPS:
    return LPIPS.from_files(*files)


def by_hand(trunk: dict[str, Tensor], linear: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (torch.cat((a, b)) - shift[:, None, None]) / scale[:, None, None]
    place, total = 0, torch.zeros(len(a))
    for layer, item in enumerate(LAYOUT):
        if item == "M":
            x, place = F.max_pool2d(x, 2, 2), place + 1
            continue
        x = F.conv2d(x, trunk[f"features.{place}.weight"], trunk[f"features.{place}.bias"], padding=1).clamp(min=0)
        place += 2
        if layer in LAST:
            unit = F.normalize(x, dim=1, eps=1e-10)
            squared = (unit[: len(a)] - unit[len(a) :]) ** 2
            total += F.conv2d(squared, linear[f"lin{LAST[layer]}.model.1.weight"]).mean((1, 2, 3))
    return total


def test_formula_and_invariances(model: LPIPS, weights: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    a, b = torch.rand(2, 3, 16, 24) * 2 - 1, torch.rand(2, 3, 16, 24) * 2 - 1
    a.requires_grad_()
    distance = model.distance(a, b)
    torch.testing.assert_close(distance, by_hand(*weights, a, b), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model(a, b), distance.mean())
    distance.sum().backward()
    assert a.grad is not None and a.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert model(b, b) == 0
        torch.testing.assert_close(model.distance(b, a), distance)
        torch.testing.assert_close(model.distance(a[1:], b[1:]), distance[1:])
        near = model.distance(b, (b + 0.02 * torch.randn_like(b)).clamp(-1, 1))
    assert (near < distance).all() and (near > 0).all()


def test_errors(model: LPIPS, files: tuple[Path, Path], tmp_path: Path) -> None:
    vgg, linear = files
    with pytest.raises(ValueError, match=r"lin0\.model\.1\.weight is missing, expected \(1, 64, 1, 1\)"):
        LPIPS.from_files(vgg, vgg)
    torch.save({"features.0.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"features\.0\.weight has the shape \(4, 3, 3, 3\), expected \(64, 3, 3, 3\)"):
        LPIPS.from_files(tmp_path / "other.pth", linear)
    (tmp_path / "bad.pth").write_bytes(vgg.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"bad\.pth cannot be read"):
        LPIPS.from_files(tmp_path / "bad.pth", linear)
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such file"):
        LPIPS.from_files(tmp_path / "none.pth", linear)
    with pytest.raises(ValueError, match=r"at least 16 pixels"):
        model(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="expected two of the same shape"):
        model(torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 16))
