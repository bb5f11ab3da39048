"""Figures of an image generator beside those of reconstructions and real images, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Measurement:
    """A figure, of how many images it is, and against how many real ones it was measured (None: against
    none).
    """

    value: float
    samples: int
    reference: int | None = None


@dataclass(frozen=True)
class SetFigures:
    """The figures of one set of images.

    classified: share that the classifier gives the label they carry (None where they carry none), in [0, 1].
    per_class: that share by label. frechet: distance to the real images. precision, recall: against equally
    many real images. inception_score: on this classifier's logits.
    """

    classified: Measurement | None
    per_class: Mapping[int, Measurement]
    frechet: Measurement
    precision: Measurement
    recall: Measurement
    inception_score: Measurement


@dataclass(frozen=True)
class GenerationReport:
    """What `evaluate_class_conditional` measured.

    real: one random half of the real images against the other; its classified share is of all of them.
    frechet_real_same_count: distance of as many random real images as were generated to the rest of the real
    ones: about what a perfect generator gets at this count. None where more than half the real images would
    be needed.
    """

    generated: SetFigures
    reconstructions: SetFigures | None
    real: SetFigures
    frechet_real_same_count: Measurement | None
    neighbours: int
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def frechet_ratio(self) -> float | None:
        """Fréchet distance of the generated images over that of the reconstructions (None without these)."""
        if self.reconstructions is None or self.reconstructions.frechet.value == 0:
            return None
        return self.generated.frechet.value / self.reconstructions.frechet.value

    def to_json(self) -> str:
        """The report as JSON: every figure as {value, samples, reference}."""
        return json.dumps(asdict(self) | {"frechet_ratio": self.frechet_ratio}, indent=2, allow_nan=False)

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text, its header first: a figure's name, then generated, reconstructions (if any),
        real.
        """
        sets = [
            ("Generated", self.generated),
            ("Reconstructions", self.reconstructions),
            ("Real images", self.real),
        ]
        columns = [(title, figures) for title, figures in sets if figures is not None]
        rows: list[tuple[str, ...]] = [("Figure", *(title for title, _ in columns))]
        if any(figures.classified for _, figures in columns):
            rows.append(("Classified as asked", *(_cell(f.classified, "{:.1%}") for _, f in columns)))
        rows.append(("Fréchet distance", *(_cell(f.frechet, "{:.3f}") for _, f in columns)))
        rows.append(("Precision", *(_cell(f.precision, "{:.3f}") for _, f in columns)))
        rows.append(("Recall", *(_cell(f.recall, "{:.3f}") for _, f in columns)))
        rows.append(("Inception score", *(_cell(f.inception_score, "{:.2f}") for _, f in columns)))
        for label in sorted({label for _, figures in columns for label in figures.per_class}):
            name = self.class_names[label] if self.class_names else f"class {label}"
            rows.append((f"  {name}", *(_cell(f.per_class.get(label), "{:.1%}") for _, f in columns)))
        return rows

    def table(self) -> Table:
        """The report as a rich table; the number of images stands behind each figure."""
        from rich.table import Table

        header, *rows = self.rows()
        table = Table(title="Generated images against real ones", caption="\n".join(self.notes) or None)
        for index, title in enumerate(header):
            table.add_column(title, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            # Two counts beside a figure would not leave room for three columns in 80 characters.
            table.add_row(*(cell.replace(" (", "\n(") if " / " in cell else cell for cell in row))
        return table


def _cell(figure: Measurement | None, pattern: str) -> str:
    if figure is None:
        return "-"
    count = f"{figure.samples:,}" if figure.reference is None else f"{figure.samples:,} / {figure.reference:,}"
    return f"{pattern.format(figure.value)} ({count})"
