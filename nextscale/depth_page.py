"""A page about an evaluation of depth: figures beside published ones, the best and the worst images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from nextscale.evaluation.depth_pictures import WRONG, error_picture
from nextscale.evaluation.depth_published import Published
from nextscale.pictures import Facts, Figure, Gallery, Section, Table, write_page
from nextscale.pictures.depth import depth_picture
from nextscale.tasks.depth.evaluation import Job, compared, seen

if TYPE_CHECKING:
    from nextscale.pictures.page import Block

_WIDEST = 480


def figures_table(report: Mapping[str, Any], others: Sequence[Published]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what was measured, then what was published by the same protocol."""
    names = list(report["mean"])
    rows = [["this evaluation", *(_number(report["mean"][name]) for name in names), ""]]
    for entry in others:
        cells = (_number(entry.figures.get(name)) for name in names)
        rows.append([entry.model, *cells, entry.source])
    return ["", *names, "source"], rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if value >= 1 else f"{value:.3f}"


def write_report_page(
    path: Path,
    job: Job,
    report: Mapping[str, Any],
    ranking: Sequence[Mapping[str, Any]],
    metric: str,
    others: Sequence[Published],
    title: str,
    top: int,
) -> Path:
    """Write the page; the images shown are read and predicted once more.

    Args:
        ranking: records from best to worst by ``metric``.
        top: images shown of either end.
    """
    best, worst = ranking[:top], list(reversed(ranking[max(top, len(ranking) - top) :]))
    header, rows = figures_table(report, others)
    about: list[Block] = [Table(header, rows, "Means over images; `-`: not given")]
    if report["planes_and_edges"]:
        found = report["planes_and_edges"].items()
        about.append(Table(["planes and boundaries", ""], [[name, _number(value)] for name, value in found]))
    protocol = {
        name: value for name, value in report["settings"]["protocol"].items() if value not in (None, "", 0, False)
    }
    about.append(Table(["protocol", ""], [[name, str(value)] for name, value in protocol.items()]))
    sections = [Section("Figures", about)]
    for name, chosen in (("Best images", best), ("Worst images", worst)):
        if chosen:
            sections.append(Section(name, [_gallery(job, record, metric) for record in chosen]))
    facts = Facts(
        [
            (metric, _number(report["mean"][metric]), "mean over images"),
            ("images", str(report["images"]), f"{len(report['skipped'])} without a pixel to compare"),
            ("rmse, pooled", _number(report["pooled_rmse"]), "over the pixels of all images, an older habit"),
        ]
    )
    lead = (
        "Rows show the image, the ground truth, the prediction as it is compared, and its relative error: red is "
        f"predicted too far, blue too near, fully from {WRONG:.0%} on; grey is not compared."
    )
    return write_page(path, title, sections, lead=lead, facts=facts, overwrite=True)


def _gallery(job: Job, record: Mapping[str, Any], metric: str) -> Gallery:
    index, name = int(record["index"]), str(record["name"])
    found = compared(job, index)
    near, far = None, None
    if found.mask.any():
        near, far = (float(bound) for bound in np.quantile(found.truth[found.mask], [0.02, 0.98]))
    shown: list[tuple[str, np.ndarray]] = [
        ("ground truth", depth_picture(found.truth, near=near, far=far).transpose(1, 2, 0)),
        ("prediction", depth_picture(found.prediction, near=near, far=far).transpose(1, 2, 0)),
        ("relative error", error_picture(found.truth, found.prediction, found.mask)),
    ]
    try:
        image = seen(job.source.image(index), job.protocol)
        shown.insert(0, ("image", image if image.dtype == np.uint8 else (image * 255).astype(np.uint8)))
    except ValueError:
        pass  # predictions can be compared where images are not at hand
    value = f"{name}: {metric} {_number(record['metrics'][metric])}, {record['pixels']:,} pixels"
    figures = [
        Figure(_small(picture), f"{what} of {name}", value if number == 0 else what)
        for number, (what, picture) in enumerate(shown)
    ]
    return Gallery(figures, 200)


def _small(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    image.thumbnail((_WIDEST, _WIDEST))
    return image
