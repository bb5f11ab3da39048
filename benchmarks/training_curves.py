"""Figures of several training runs over their steps, in one picture and one table.

    python benchmarks/training_curves.py RUN [RUN ...] --figures validation/abs_rel validation/d1 --out FOLDER

RUN is a run's folder (its log.jsonl is read) or NAME=FOLDER. Writes curves.png, table.md (each figure's last value) and
curves.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nextscale.core.checkpoint import write_atomically, write_json, write_text

COLOURS = ("#2450b8", "#c2410c", "#15803d", "#7e22ce", "#525252", "#b91c1c")

Curve = list[tuple[int, float]]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--figures", nargs="+", required=True, help="as log.jsonl names them")
    parser.add_argument("--titles", nargs="+", help="what stands over them; their names unless given")
    parser.add_argument("--out", required=True)
    return parser


def read_curves(folder: Path, figures: Sequence[str]) -> dict[str, Curve]:
    """(step, value) of each figure.

    Raises:
        ValueError: there is no log, or it does not have one of them.
    """
    log = folder / "log.jsonl"
    if not log.is_file():
        raise ValueError(f"{folder} is no training run: it holds no log.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    curves = {name: [(int(row["step"]), float(row[name])) for row in rows if name in row] for name in figures}
    if missing := [name for name, curve in curves.items() if not curve]:
        known = sorted({name for row in rows for name in row} - {"step"})
        raise ValueError(f"{log} has no {', '.join(missing)}; it has {', '.join(known)}")
    return curves


def draw(runs: Mapping[str, Mapping[str, Curve]], titles: Mapping[str, str], path: Path) -> None:
    """One panel per figure, one line per run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(titles), 3.4), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles.items(), strict=True):
        for place, (label, curves) in enumerate(runs.items()):
            steps, values = zip(*curves[name], strict=True)
            axis.plot(steps, values, marker=".", color=COLOURS[place % len(COLOURS)], label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("steps")
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    if options.titles and len(options.titles) != len(options.figures):
        parser.error(f"{len(options.titles)} titles for {len(options.figures)} figures")
    named = [run.split("=", 1) if "=" in run else (Path(run).name, run) for run in options.runs]
    try:
        runs = {name: read_curves(Path(folder), options.figures) for name, folder in named}
    except ValueError as error:
        sys.exit(f"training_curves: {error}")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    draw(runs, dict(zip(options.figures, options.titles or options.figures, strict=True)), out / "curves.png")
    lines = [f"| run | steps | {' | '.join(options.figures)} |", f"|{'---|' * (2 + len(options.figures))}"]
    for name, curves in runs.items():
        last = {figure: curve[-1] for figure, curve in curves.items()}
        steps = max(step for step, _ in last.values())
        lines.append(f"| {name} | {steps:,} | {' | '.join(f'{value:.4g}' for _, value in last.values())} |")
    write_text("\n".join(lines) + "\n", out / "table.md")
    write_json(out / "curves.json", runs)
    print("\n".join(lines))
    print(f"curves.png, table.md and curves.json are in {out}")


if __name__ == "__main__":
    main()
