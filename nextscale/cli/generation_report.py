"""What ``nextscale evaluate generation`` leaves behind: a table, JSON, pictures, and the curve of a sweep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nextscale.cli.console import pairs, table
from nextscale.core.checkpoint import write_atomically, write_json, write_text
from nextscale.evaluation.generation_figures import GenerationFigures
from nextscale.pictures import contact_sheet, save_png

COLOURS = ("#2450b8", "#b84a24", "#2a8a4a", "#8a4ab8", "#9a8a24", "#24909a")


@dataclass(frozen=True)
class Point:
    """One set of images: what was varied for it, its figures, and a few of its images in [0, 1]."""

    settings: dict[str, Any]
    figures: GenerationFigures
    shown: Tensor


def write_report(source: str, points: list[Point], out: Path) -> tuple[str, list[Path]]:
    """``figures.json``, ``table.md``, ``samples.png`` and, of several points, ``sweep.png``; those of an earlier call
    are replaced.

    Returns:
        The table as text, and the files.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = list(points[0].settings)
    titles = [name for name, _ in points[0].figures.rows()]
    header = [*names, *titles]
    rows = [
        [*(str(point.settings[name]) for name in names), *(value for _, value in point.figures.rows())]
        for point in points
    ]
    first = points[0].figures
    against = f"{first.reference:,}" if first.reference is not None else "kept statistics of"
    heading = f"{source}: {first.samples:,} images against {against} real ones, in {first.network}"
    text = table(header, rows) if names else pairs(points[0].figures.rows())
    markdown = "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))
    files = [
        write_json(
            out / "figures.json",
            {"source": source, "points": [{"settings": p.settings, **p.figures.to_json()} for p in points]},
        ),
        write_text(f"{heading}\n\n{markdown}\n", out / "table.md"),
        save_png(contact_sheet(points[-1].shown), out / "samples.png", overwrite=True),
    ]
    if len(points) > 1:
        files.append(plot(heading, points, out / "sweep.png"))
    return f"{heading}\n{text}", files


def plot(heading: str, points: list[Point], path: Path) -> Path:
    """The trade-off: FID against Inception score, and recall against precision. A line joins the points that differ in
    the first option only; each point is labelled with its value."""
    from matplotlib.figure import Figure

    names = list(points[0].settings)
    lines: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        lines.setdefault(tuple(point.settings[name] for name in names[1:]), []).append(point)
    panels = [
        ("Inception score", "FID", lambda f: (f.inception_score and f.inception_score.mean, f.fid)),
        ("precision", "recall", lambda f: (f.precision, f.recall)),
        ("CLIP score", "FID", lambda f: (f.clip_score, f.fid)),
        (names[0].replace("_", "-"), "FID", None),
    ]
    first = points[0].figures
    known = [panel for panel in panels if panel[2] is None or None not in panel[2](first)]
    figure = Figure(figsize=(4.6 * len(known), 4), layout="constrained")
    for axes, (across, up, values) in zip(figure.subplots(1, len(known), squeeze=False)[0], known, strict=True):
        for number, (rest, members) in enumerate(lines.items()):
            label = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in zip(names[1:], rest, strict=True))
            drawn = [(p.settings[names[0]], p.figures.fid) if values is None else values(p.figures) for p in members]
            axes.plot(*zip(*drawn, strict=True), "o-", color=COLOURS[number % len(COLOURS)], label=label or None)
            for point, place in zip(members, drawn, strict=True):
                axes.annotate(
                    f"{point.settings[names[0]]:g}", place, textcoords="offset points", xytext=(4, 4), fontsize=8
                )
        axes.set(xlabel=across, ylabel=up)
        axes.grid(alpha=0.3)
        if names[1:]:
            axes.legend(fontsize=8)
    figure.suptitle(heading, fontsize=9)
    return write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
