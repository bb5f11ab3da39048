"""PSNR and SSIM against scikit-image, and codebook usage against counts made by hand."""

import json
import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from nextscale.evaluation.reconstruction import CodebookUsage, ReconstructionMeter, psnr, ssim


def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 24, 20, generator=generator)
    return images, (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def test_psnr_and_ssim_equal_scikit_image() -> None:
    a, b = pairs(3)
    for index in range(3):
        x, y = a[index].permute(1, 2, 0).double().numpy(), b[index].permute(1, 2, 0).double().numpy()
        assert float(psnr(a, b)[index]) == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1), abs=1e-4)
        expected = structural_similarity(
            x, y, data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert float(ssim(a, b)[index]) == pytest.approx(expected, abs=1e-4)


def test_the_meter_averages_over_images_whatever_the_batches() -> None:
    a, b = pairs(5)
    meter = ReconstructionMeter()
    meter.update(a[:4], b[:4])
    meter.update(a[4:], b[4:])
    report = meter.report()
    assert report.images == 5
    assert report.psnr == pytest.approx(float(psnr(a, b).mean()), rel=1e-6)
    assert report.ssim == pytest.approx(float(ssim(a, b).mean()), rel=1e-6)
    assert report.rmse == pytest.approx(float((a - b).square().mean().sqrt()), rel=1e-5)
    assert json.loads(report.to_json())["images"] == 5


def test_exact_copies_are_counted_apart() -> None:
    a, b = pairs(2)
    meter = ReconstructionMeter()
    meter.update(a, torch.stack([a[0], b[1]]))
    report = meter.report()
    assert (report.images, report.exact) == (2, 1)
    assert report.psnr == pytest.approx(float(psnr(a, b)[1]), rel=1e-6)
    exact = ReconstructionMeter()
    exact.update(a, a)
    assert exact.report().psnr is None


def test_pairs_that_do_not_fit_are_refused() -> None:
    a, b = pairs(2)
    meter = ReconstructionMeter()
    with pytest.raises(ValueError, match="no image was compared"):
        meter.report()
    with pytest.raises(ValueError, match="expected the same"):
        meter.update(a, b[:1])
    with pytest.raises(ValueError, match="sides of at least 11"):
        ssim(a[:, :, :8], b[:, :, :8])
    with pytest.raises(ValueError, match="NaN"):
        meter.update(a, b * math.nan)


def test_codebook_usage_per_scale() -> None:
    usage = CodebookUsage(codebook_size=8, scales=3)
    usage.update([torch.tensor([[3], [3]]), torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]]), torch.zeros(2, 9).long()])
    usage.update([torch.tensor([[5]]), torch.tensor([[0, 1, 2, 3]]), torch.zeros(1, 3, 3).long()])
    coarse, middle, fine = usage.per_scale()
    assert (coarse.tokens, coarse.used) == (3, 2 / 8)
    assert coarse.entropy == pytest.approx(-(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3)))
    assert (middle.tokens, middle.used, middle.entropy, middle.perplexity) == (12, 0.5, 2.0, 4.0)
    assert (fine.tokens, fine.entropy, fine.perplexity) == (27, 0.0, 1.0)
    assert usage.overall().tokens == 42
    assert usage.counts[1].tolist() == [3, 3, 3, 3, 0, 0, 0, 0]
    assert usage.dead_codes().tolist() == [4, 6, 7]
    assert json.loads(usage.to_json())["per_scale"][1]["entropy"] == 2
    assert usage.table().row_count == 4


def test_tokens_outside_the_codebook_leave_the_counts_as_they_were() -> None:
    usage = CodebookUsage(codebook_size=4, scales=2)
    with pytest.raises(ValueError, match="scale 1 holds tokens from 0 to 4; expected 0 to 3"):
        usage.update([torch.tensor([1]), torch.tensor([0, 4])])
    with pytest.raises(ValueError, match="tokens of 1 scales"):
        usage.update([torch.tensor([1])])
    assert int(usage.counts.sum()) == 0
    assert usage.overall().perplexity == 0
