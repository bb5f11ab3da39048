"""What ``nextscale scaling`` leaves behind: the laws as lines, a table, JSON, and a log-log picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nextscale.cli.console import table
from nextscale.cli.generation_report import COLOURS
from nextscale.cli.training_view import duration
from nextscale.core.checkpoint import write_atomically, write_json, write_text
from nextscale.evaluation.power_law import PowerLaw
from nextscale.scaling import FIGURES, UNITS, Law, Rung, fit_laws, to_json

VARIABLES = {"parameters": "N", "compute": "C"}
LABELS = {"parameters": "parameters of the blocks", "compute": "training compute, PFLOPs"}
SHOWN = {"parameters": 1.0, "compute": 1e15}
"""Units of the picture's axes."""


def write_report(heading: str, rungs: Sequence[Rung], out: Path) -> tuple[str, list[Path]]:
    """``scaling.json``, ``scaling.md`` and ``scaling.png``; those of an earlier call are replaced.

    Returns:
        The tables as text, and the files.
    """
    laws = fit_laws(rungs)
    runs, fits = _runs(rungs), _fits(laws)
    markdown = f"{heading}\n\n{_markdown(*runs)}\n\n{_markdown(*fits)}\n"
    files = [
        write_json(out / "scaling.json", to_json(rungs, laws)),
        write_text(markdown, out / "scaling.md"),
        plot(heading, rungs, laws, out / "scaling.png"),
    ]
    return f"{table(*runs)}\n\n{table(*fits)}\nN in billions, C in PFLOPs", files


def _runs(rungs: Sequence[Rung]) -> tuple[list[str], list[list[str]]]:
    names = [name for name in FIGURES if all(name in rung.final for rung in rungs)]
    rows = [
        [
            str(rung.cost.depth),
            str(rung.cost.width),
            f"{rung.cost.parameters:,}",
            f"{rung.curve[-1][0] / UNITS['compute']:.4g}",
            *(f"{rung.final[name]:.4f}" for name in names),
            duration(rung.seconds),
        ]
        for rung in rungs
    ]
    return ["depth", "width", "parameters", "PFLOPs", *names, "time"], rows


def _fits(laws: Sequence[Law]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for each in laws:
        law, variable = each.law, VARIABLES[each.against]
        fitted = ["no law"] + [""] * 3
        if law is not None:
            coefficient = "" if law.coefficient is None else f"{law.coefficient:.4g}"
            fitted = [equation(law, variable), f"{law.exponent:.4f}", coefficient, f"{law.correlation:.4f}"]
        rows.append([each.figure, each.against, str(len(each.points)), *fitted])
    return ["figure", "against", "points", "law", "exponent", "coefficient", "correlation"], rows


def equation(law: PowerLaw, variable: str) -> str:
    """The law as the paper writes it, or by its value at 1 where it is too flat for that."""
    if law.coefficient is None:
        return f"{law.at_one:.4g} {variable}^{law.exponent:.3g}"
    return f"({law.coefficient:.3g} {variable})^{law.exponent:.3g}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def plot(heading: str, rungs: Sequence[Rung], laws: Sequence[Law], path: Path) -> Path:
    """A column for each figure: against parameters, and against compute with every run's curve."""
    from matplotlib.figure import Figure

    figures = list(dict.fromkeys(law.figure for law in laws))
    canvas = Figure(figsize=(3.9 * len(figures), 7), layout="constrained")
    grid = canvas.subplots(2, len(figures), squeeze=False)
    for law in laws:
        axes = grid[list(UNITS).index(law.against)][figures.index(law.figure)]
        if law.against == "compute":
            for number, rung in enumerate(rungs):
                curve = [(flops / SHOWN["compute"], found[law.figure]) for flops, found in rung.curve]
                colour = COLOURS[number % len(COLOURS)]
                axes.plot(*zip(*curve, strict=True), "-", color=colour, linewidth=1, label=f"depth {rung.cost.depth}")
        _draw(axes, law)
    canvas.suptitle(heading, fontsize=9)
    return write_atomically(path, lambda temporary: canvas.savefig(temporary, format="png", dpi=110))


def _draw(axes: Any, law: Law) -> None:
    """Points and the line that was fitted to them."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    places = [place / SHOWN[law.against] for place, _ in law.points]
    axes.plot(places, [value for _, value in law.points], "o", color="#222222", markersize=4)
    if law.law is not None:
        drawn = [law.law(place / UNITS[law.against]) for place, _ in law.points]
        label = f"{equation(law.law, VARIABLES[law.against])}, r = {law.law.correlation:.3f}"
        axes.plot(places, drawn, "--", color="#222222", linewidth=1, label=label)
    axes.set(xlabel=LABELS[law.against], ylabel=law.figure, xscale="log")
    if min(value for _, value in law.points) > 0:
        axes.set_yscale("log")
        # A loss spans less than a decade: a logarithmic axis would otherwise name none of it.
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
