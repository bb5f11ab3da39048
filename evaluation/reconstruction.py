"""How well a tokenizer reproduces images, and how much of its codebook it uses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rich.table import Table


def _pair(images: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
    if images.ndim != 4 or images.shape != reconstructions.shape:
        raise ValueError(
            f"images have shape {tuple(images.shape)} and reconstructions {tuple(reconstructions.shape)}; "
            "expected the same (batch, channels, height, width)"
        )
    return images.detach().float(), reconstructions.detach().to(images.device).float()


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of images (B, C, H, W) in [0, 1]; infinite for an exact copy."""
    a, b = _pair(images, reconstructions)
    return -10 * torch.log10((a - b).square().flatten(1).mean(dim=1))


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity (B,) of images (B, C, H, W) in [0, 1] (Wang et al. 2004): 11 x 11 Gaussian of
    sigma 1.5.

    The mean of the map over channels and over the pixels whose window lies wholly inside, so sides of at
    least 11.
    """
    from kornia.metrics import ssim as ssim_map

    a, b = _pair(images, reconstructions)
    if min(a.shape[2:]) < 11:
        raise ValueError(f"images are {a.shape[2]} x {a.shape[3]} pixels; SSIM takes sides of at least 11")
    return ssim_map(a, b, window_size=11, max_val=1.0, padding="valid").flatten(1).mean(dim=1)


@dataclass(frozen=True)
class ReconstructionReport:
    """Means over `images` images: PSNR in dB (over those not reproduced exactly), SSIM, and RMSE over all
    pixels.

    psnr is None where every image was reproduced exactly; `exact` counts these.
    """

    images: int
    exact: int
    psnr: float | None
    ssim: float
    rmse: float

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)


class ReconstructionMeter:
    """Running PSNR, SSIM and RMSE of a stream of image pairs."""

    def __init__(self) -> None:
        self._images = self._exact = 0
        self._psnr = self._ssim = self._squared_error = 0.0

    def update(self, images: Tensor, reconstructions: Tensor) -> None:
        """Take in two batches (B, C, H, W) in [0, 1]."""
        a, b = _pair(images, reconstructions)
        ratios = psnr(a, b).double()
        finite = torch.isfinite(ratios)
        if bool(torch.isnan(ratios).any()):
            raise ValueError("images or reconstructions hold NaN; expected values in [0, 1]")
        self._images += len(a)
        self._exact += int((~finite).sum())
        self._psnr += float(ratios[finite].sum())
        self._ssim += float(ssim(a, b).double().sum())
        self._squared_error += float((a - b).double().square().flatten(1).mean(dim=1).sum())

    def report(self) -> ReconstructionReport:
        """The means so far. Raises ValueError before the first image."""
        if self._images == 0:
            raise ValueError("no image was compared yet; update the meter first")
        inexact = self._images - self._exact
        return ReconstructionReport(
            images=self._images,
            exact=self._exact,
            psnr=self._psnr / inexact if inexact else None,
            ssim=self._ssim / self._images,
            rmse=math.sqrt(self._squared_error / self._images),
        )


@dataclass(frozen=True)
class ScaleUsage:
    """Use of the codebook at one scale (or over all).

    tokens: how many were counted. used: share of the codes that occurred, in [0, 1]. entropy: of the codes'
    frequencies, in bits (at most log2 of the codebook's size). perplexity: 2 to the entropy, codes in
    effective use.
    """

    tokens: int
    used: float
    entropy: float
    perplexity: float


class CodebookUsage:
    """Running counts of every code at every scale: `counts` (scales, codes) int64."""

    def __init__(self, codebook_size: int, scales: int) -> None:
        if codebook_size < 1 or scales < 1:
            raise ValueError(f"codebook of {codebook_size} codes and {scales} scales; expected 1 or more of each")
        self.counts = torch.zeros(scales, codebook_size, dtype=torch.int64)

    def update(self, tokens: Sequence[Tensor]) -> None:
        """Take in one batch of token pyramids: per scale, code indices of any shape, e.g. (B, h * w)."""
        scales, codes = self.counts.shape
        if len(tokens) != scales:
            raise ValueError(f"tokens of {len(tokens)} scales were given; expected {scales}")
        flat = [indices.detach().flatten().cpu().long() for indices in tokens]
        # All scales are checked before any is counted: a refused batch leaves the counts as they were.
        for number, indices in enumerate(flat):
            if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < codes:
                raise ValueError(
                    f"scale {number} holds tokens from {int(indices.min())} to {int(indices.max())}; "
                    f"expected 0 to {codes - 1}"
                )
        for number, indices in enumerate(flat):
            self.counts[number] += torch.bincount(indices, minlength=codes)

    def per_scale(self) -> list[ScaleUsage]:
        """One entry per scale, coarse to fine."""
        return [_usage(row) for row in self.counts]

    def overall(self) -> ScaleUsage:
        """Over the tokens of all scales together."""
        return _usage(self.counts.sum(dim=0))

    def dead_codes(self) -> Tensor:
        """Indices of the codes that no scale used, int64."""
        return (self.counts.sum(dim=0) == 0).nonzero().flatten()

    def to_json(self) -> str:
        """Usage of each scale and of all together, as JSON (the counts themselves are in `counts`)."""
        usage = {
            "codebook_size": self.counts.shape[1],
            "overall": asdict(self.overall()),
            "per_scale": [asdict(u) for u in self.per_scale()],
        }
        return json.dumps(usage, indent=2, allow_nan=False)

    def table(self) -> Table:
        """One row per scale, and one for all together, as a rich table."""
        from rich.table import Table

        table = Table("Scale", title=f"Use of a codebook of {self.counts.shape[1]:,} codes")
        for title in ("Tokens", "Codes used", "Entropy (bits)", "Perplexity"):
            table.add_column(title, justify="right")
        for name, usage in [*((str(n), u) for n, u in enumerate(self.per_scale())), ("all", self.overall())]:
            table.add_row(
                name,
                f"{usage.tokens:,}",
                f"{usage.used:.1%}",
                f"{usage.entropy:.2f}",
                f"{usage.perplexity:.0f}",
            )
        return table


def _usage(counts: Tensor) -> ScaleUsage:
    total = int(counts.sum())
    share = counts[counts > 0].double() / max(total, 1)
    entropy = max(float(-(share * share.log2()).sum()), 0.0)
    return ScaleUsage(total, len(share) / len(counts), entropy, 2**entropy if total else 0.0)
