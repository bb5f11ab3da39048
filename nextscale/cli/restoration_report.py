"""What ``nextscale evaluate restoration`` leaves behind: sheets, a table beside published figures, a plot."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nextscale.cli.console import table
from nextscale.core.checkpoint import write_atomically, write_json, write_text
from nextscale.evaluation.restoration import find_protocol
from nextscale.evaluation.restoration_published import PUBLISHED
from nextscale.pictures import comparison_sheet, save_png, to_pil
from nextscale.tasks.restoration.evaluation import Result, Setting, summary

SHOWN = 512
"""Longest side of a picture on a sheet, in pixels."""
ERROR_RANGE = 0.2
"""Mean absolute difference of the colours, in [0, 1], that is drawn brightest."""


def save_sheet(result: Result, path: Path) -> Path:
    """Input, output, truth and error side by side."""
    assert result.images is not None
    degraded, restored, clean = (image.clamp(0, 1) for image in result.images)
    error = (restored - clean).abs().mean(0).numpy()
    pictures = [shrunk(to_pil(image)) for image in (degraded, restored, clean)]
    headings = [
        f"input, {_decibels(result.input.psnr)}",
        f"output, {_decibels(result.output.psnr)}",
        "truth",
        f"error, 0 to {ERROR_RANGE:g}",
    ]
    sheet = comparison_sheet([("", [*pictures, shrunk(coloured(error))])], headings)
    return save_png(sheet, path, overwrite=True)


def coloured(error: np.ndarray) -> Image.Image:
    """(height, width) errors as colours, black to yellow."""
    from matplotlib import colormaps

    values = colormaps["inferno"](np.clip(error / ERROR_RANGE, 0, 1))[..., :3]
    return Image.fromarray((values * 255).round().astype(np.uint8))


def shrunk(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
    return image


def _decibels(value: float) -> str:
    return f"{value:.2f} dB"


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


@dataclass(frozen=True)
class Report:
    """The results of one model on one setting."""

    model: str
    setting: Setting
    results: list[Result]

    @property
    def heading(self) -> str:
        """How the figures were taken, in a line."""
        setting = self.setting
        parts = [setting.dataset, setting.degradation, f"{len(self.results)} images", setting.protocol]
        parts += [setting.channel.upper(), f"border of {setting.crop} left out" if setting.crop else None]
        parts.append(f"squashed to {setting.squash} x {setting.squash}" if setting.squash else None)
        return ", ".join(part for part in parts if part)

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """(what, PSNR, SSIM, LPIPS, source)."""
        means = summary(self.results)
        measured = f"measured here: {find_protocol(self.setting.protocol).source}"
        rows = [
            (
                name,
                _cell(means[side]["psnr"], 2),
                _cell(means[side]["ssim"], 4),
                _cell(means[side].get("lpips"), 4),
                measured,
            )
            for name, side in (("input", "input"), (self.model, "output"))
        ]
        for each in PUBLISHED.get(self.setting.task or "", ()):
            rows.append((f"{each.system}, published", f"{each.psnr:.2f}", f"{each.ssim:.3f}", "-", each.source))
        return rows

    def table(self) -> str:
        """Our figures, and under them published ones of the same task."""
        lines = [self.heading, table(("", "PSNR", "SSIM", "LPIPS", "source"), self.rows())]
        means = summary(self.results)
        if means["seconds_per_megapixel"] is not None:
            lines.append(f"{means['seconds_per_megapixel']:.2f} seconds per megapixel")
        if means["equal_to_truth"]:
            lines.append(f"{means['equal_to_truth']} images equal the truth and are left out of the mean PSNR")
        return "\n".join(lines)

    def write(self, out: Path) -> list[Path]:
        """``summary.json``, ``table.md`` and ``figures.png`` in a folder; those of an earlier call are replaced."""
        rows: list[Any] = [("", "PSNR", "SSIM", "LPIPS", "source"), ("---",) * 5, *self.rows()]
        text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        content = {"model": self.model, "setting": asdict(self.setting), **summary(self.results)}
        return [
            write_json(out / "summary.json", content),
            write_text(f"{self.heading}\n\n{text}\n", out / "table.md"),
            self.plot(out / "figures.png"),
        ]

    def plot(self, path: Path) -> Path:
        """PSNR of every image before and after, and the gains in order."""
        from matplotlib.figure import Figure

        pairs = np.array([(result.input.psnr, result.output.psnr) for result in self.results])
        pairs = pairs[np.isfinite(pairs).all(1)]
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        if len(pairs):
            low, high = pairs.min() - 1, pairs.max() + 1
            left.plot([low, high], [low, high], color="#9a9a9a", linewidth=1)
            left.scatter(*pairs.T, s=14, color="#2450b8")
            left.set(xlim=(low, high), ylim=(low, high))
            gains = np.sort(pairs[:, 1] - pairs[:, 0])
            right.bar(range(1, len(gains) + 1), gains, color=np.where(gains >= 0, "#2450b8", "#b84a24"))
        left.set(xlabel="PSNR of the input, dB", ylabel="PSNR of the output, dB", aspect="equal")
        right.set(xlabel="images, by gain", ylabel="gain, dB")
        right.xaxis.get_major_locator().set_params(integer=True)
        right.axhline(0, color="#9a9a9a", linewidth=1)
        figure.suptitle(self.heading, fontsize=9)
        return write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
