"""Each classical method improves what it is for, on a photograph that ships with scikit-image."""

import numpy as np
import pytest
import torch
from skimage import data

from nextscale.evaluation.classical import GRIDS, METHODS, Classical, tuned


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return torch.from_numpy(data.astronaut()[40:136, 180:276].copy()).permute(2, 0, 1).float() / 255


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * (a - b).square().mean().log10().item()


@pytest.mark.parametrize("name", ["nlm", "tv", "wavelet"])
def test_denoisers(name: str, photo: torch.Tensor) -> None:
    noisy = (photo + 25 / 255 * torch.randn(photo.shape)).clamp(0, 1)
    plain = psnr(Classical(name).restore(noisy), photo)
    assert plain > psnr(noisy, photo) + 2
    if name != "nlm":  # it takes seconds
        assert psnr(tuned(name, [(noisy, photo)]).restore(noisy), photo) >= plain - 1e-3


@pytest.mark.parametrize("name", ["wiener", "lucy"])
def test_deconvolution(name: str, photo: torch.Tensor) -> None:
    place = np.arange(-3, 4)
    kernel = np.exp(-(place[:, None] ** 2 + place**2) / 2)
    kernel /= kernel.sum()
    padded = torch.nn.functional.pad(photo[None], (3, 3, 3, 3), mode="reflect")
    weights = torch.from_numpy(kernel).float().expand(3, 1, -1, -1)
    blurred = (torch.nn.functional.conv2d(padded, weights, groups=3)[0] * 255).round() / 255
    method = Classical(name, {"psf": kernel})
    sharp = method.restore(blurred)
    assert psnr(sharp, photo) > psnr(blurred, photo) + 1
    assert torch.equal(sharp, method.restore(blurred)) and str(method) == name


def test_light_and_haze(photo: torch.Tensor) -> None:
    dark = 0.7 * photo**2.5
    for name in ("gamma", "clahe"):
        assert psnr(tuned(name, [(dark, photo)]).restore(dark), photo) > psnr(dark, photo) + 1
    hazy = photo * 0.5 + 0.9 * 0.5
    assert psnr(tuned("dcp", [(hazy, photo)]).restore(hazy), photo) > psnr(hazy, photo) + 3


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (17, 20)])
def test_any_size(name: str, size: tuple[int, int]) -> None:
    image = torch.rand(3, *size)
    restored = Classical(name).restore(image)
    assert restored.shape == image.shape and 0 <= restored.min() <= restored.max() <= 1


def test_names() -> None:
    assert set(GRIDS) == set(METHODS)
    parsed = Classical.parse("nlm:h=0.6,patch=3")
    assert parsed == Classical("nlm", {"h": 0.6, "patch": 3}) and str(parsed) == "nlm:h=0.6,patch=3"
    for text, message in (
        ("bm3d", "no classical method 'bm3d'; there are none, nlm"),
        ("tv:h=3", "tv has no option h; it has weight"),
        ("tv:weight=much", "expected NAME=NUMBER"),
    ):
        with pytest.raises(ValueError, match=message):
            Classical.parse(text)
