"""What the replay prints: a line per output, and a table of all cases."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nextscale.parity.case import Error
from nextscale.parity.replay import Result


def heading(index: int, count: int, name: str, operation: str = "") -> str:
    """The line that opens a case."""
    width = len(str(count))
    return f"[{index:{width}}/{count}] {name}" + (f"  {operation}" if operation else "")


def details(result: Result) -> list[str]:
    """A line per output, then a line per problem that belongs to none."""
    width = max((len(error.output) for error in result.errors), default=0)
    return [_output(error, width) for error in result.errors] + [f"    FAIL  {text}" for text in result.problems]


def _output(error: Error, width: int) -> str:
    verdict = "ok  " if error.passed else "FAIL"
    figures = f"error {_number(error.largest):>8}  share {_share(error.share):>7}"
    return f"    {verdict}  {error.output:{width}}  {figures}  {error.problem}".rstrip()


def summary(results: Sequence[Result]) -> list[str]:
    """A table with a line per case, and the count of what passed."""
    rows = [("case", "operation", "outputs", "largest share", "of", "seconds", "result")]
    for result in results:
        worst = result.worst
        rows.append(
            (
                result.name,
                f"{result.system} {result.operation}".strip() or "-",
                str(len(result.errors)),
                _share(worst.share) if worst else "-",
                worst.output if worst else "-",
                f"{result.seconds:.1f}",
                "pass" if result.passed else "FAIL",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [_row(row, widths) for row in rows]
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    passed = sum(result.passed for result in results)
    seconds = sum(result.seconds for result in results)
    lines += ["", f"{passed} of {len(results)} cases pass ({seconds:.1f} s)"]
    if failed := [result.name for result in results if not result.passed]:
        lines.append("failed: " + ", ".join(failed))
    return lines


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    numeric = (2, 3, 5)
    cells = [
        cell.rjust(width) if column in numeric else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}" if math.isfinite(value) else str(value)


def _share(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:.2g}"
