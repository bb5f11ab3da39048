"""What commands say: results to standard output, everything on the way to standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


def say(text: str) -> None:
    """A result."""
    print(text, flush=True)


def note(text: str) -> None:
    """A remark on the way."""
    print(f"note: {text}", file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
    """A function to be called with (done, in all): a bar with the time left on a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Plain text columns, which also a program can read."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def pairs(rows: Sequence[tuple[str, object]]) -> str:
    """``name  value`` lines."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def size_text(count: float, unit: str = "B") -> str:
    """A number of bytes or of parameters, shortened: 1.2 GB, 310.3 M."""
    for prefix in ("", "k", "M", "G"):
        if count < 1000 or prefix == "G":
            break
        count /= 1000
    prefix = "B" if prefix == "G" and not unit else prefix
    return f"{count:.0f} {unit}".strip() if not prefix else f"{count:.1f} {prefix}{unit}"
