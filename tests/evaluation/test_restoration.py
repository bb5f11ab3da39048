"""Protocols against the formulas written out, and against each other where they must agree."""

import math

import numpy as np
import pytest
import torch
from scipy.signal import correlate2d

from nextscale.evaluation.restoration import PROTOCOLS, luma, mean_figures, measure


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    truth = (torch.rand(3, 24, 31, generator=generator) * 255).round() / 255
    image = truth + 0.05 * torch.randn(3, 24, 31, generator=generator)
    return image, truth


def ssim_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """One channel in 0 to 255: equation 13 of Wang et al. 2004."""
    place = np.arange(11) - 5
    window = np.exp(-(place**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def mean(values: np.ndarray) -> np.ndarray:
        return correlate2d(values, window, mode="valid")

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())


def test_basicsr_is_the_formula(pair) -> None:
    image, truth = pair
    found = measure(image, truth, "basicsr", crop=2)
    a, b = ((x.clamp(0, 1) * 255).round()[:, 2:-2, 2:-2].double().numpy() for x in (image, truth))
    assert found.psnr == pytest.approx(10 * math.log10(255**2 / ((a - b) ** 2).mean()))
    assert found.ssim == pytest.approx(np.mean([ssim_by_hand(x, y) for x, y in zip(a, b, strict=True)]))
    assert found.lpips is None


def test_luma_is_scikit_images(pair) -> None:
    from skimage.color import rgb2ycbcr

    pixels = (pair[1] * 255).byte().permute(1, 2, 0).numpy()
    np.testing.assert_allclose(luma(pixels), rgb2ycbcr(pixels)[..., 0], atol=2e-5)
    y = measure(*pair, "basicsr", channel="y")
    a, b = (rgb2ycbcr((x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())[..., 0] for x in pair)
    assert y.psnr == pytest.approx(10 * math.log10(255**2 / ((a - b) ** 2).mean()), abs=1e-4)
    assert y.ssim == pytest.approx(ssim_by_hand(a, b), abs=1e-5)


def test_airnet_and_skimage_are_scikit_images(pair) -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    image, truth = (x.clamp(0, 1).permute(1, 2, 0).numpy() for x in pair)
    found = measure(*pair, "airnet")
    assert found.psnr == pytest.approx(peak_signal_noise_ratio(truth, image, data_range=1), abs=1e-5)
    assert found.ssim == pytest.approx(structural_similarity(truth, image, data_range=1, channel_axis=-1))
    image, truth = ((x * 255).round().astype(np.uint8) for x in (image, truth))
    found = measure(*pair, "skimage")
    assert found.psnr == pytest.approx(peak_signal_noise_ratio(truth, image))
    assert found.ssim == pytest.approx(structural_similarity(truth, image, channel_axis=-1))
    # Bytes are the same as what they stand for; so are luma's figures, whatever its scale.
    assert measure(image.transpose(2, 0, 1), truth.transpose(2, 0, 1), "skimage") == found
    eight = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    for channel in ("rgb", "y"):
        first, second = (measure(eight, pair[1], name, channel=channel) for name in ("skimage", "airnet"))
        assert first.psnr == pytest.approx(second.psnr, abs=1e-4) and first.ssim == pytest.approx(second.ssim, abs=1e-4)


def test_equal_images(pair) -> None:
    found = [measure(pair[1], pair[1], name) for name in PROTOCOLS]
    assert all(each.psnr == math.inf and each.ssim == pytest.approx(1) for each in found)


def test_lpips_is_of_the_cropped_colours(pair) -> None:
    seen = []

    def lpips(a, b):
        seen.append(a)
        return (a - b).abs().mean()

    found = measure(*pair, "basicsr", channel="y", crop=3, lpips=lpips)
    assert seen[0].shape == (1, 3, 18, 25) and -1 <= seen[0].min() < -0.5 < 0.5 < seen[0].max() <= 1
    assert found.lpips is not None and found.lpips > 0


def test_mistakes_are_named(pair) -> None:
    image, truth = pair
    with pytest.raises(ValueError, match="no protocol 'psnr'; there are basicsr, airnet, skimage"):
        measure(image, truth, "psnr")
    with pytest.raises(ValueError, match="31 x 24 pixels and the truth 30 x 24"):
        measure(image, truth[..., 1:])
    with pytest.raises(ValueError, match="too small: basicsr needs 11 x 11"):
        measure(image, truth, crop=7)
    with pytest.raises(ValueError, match="expected RGB"):
        measure(image[:1], truth[:1])
    with pytest.raises(ValueError, match="not finite"):
        measure(image * float("nan"), truth)
    with pytest.raises(ValueError, match="channel is 'Y'"):
        measure(image, truth, channel="Y")


def test_means_leave_out_what_is_infinite() -> None:
    means = mean_figures([{"psnr": 30.0, "lpips": None}, {"psnr": math.inf, "lpips": None}, {"psnr": 32.0}])
    assert means == {"psnr": 31.0, "lpips": None}
