"""Replaying one case: find the system's adapter, run the operation, judge what it gives."""

from __future__ import annotations

import importlib
import importlib.util
import re
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nextscale.parity.case import Case, Error, read_case

Operation = Callable[[Case], Mapping[str, Any]]


class Operations(dict[str, Operation]):
    """The operations of one system, by name; used as a decorator it adds a function under its own name.

    An operation takes a case and returns {output name: array or tensor}. It takes every value from the case.
    """

    def __call__(self, function: Operation) -> Operation:
        self[function.__name__] = function
        return function


class ReplayError(ValueError):
    """A case that cannot be replayed: unknown system, unknown operation, or a value that nothing read."""


@dataclass
class Result:
    """The outcome of one case. ``problems`` are failures that belong to no single output."""

    name: str
    system: str = ""
    operation: str = ""
    errors: list[Error] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    trace: str = ""

    @property
    def passed(self) -> bool:
        return not self.problems and bool(self.errors) and all(error.passed for error in self.errors)

    @property
    def worst(self) -> Error | None:
        """The output that takes the largest share of its tolerance."""
        return max(self.errors, key=lambda error: error.share, default=None)


def operations_of(system: str) -> Operations:
    """The operations that ``nextscale/parity/SYSTEM.py`` offers.

    Raises:
        ReplayError: there is no such adapter.
    """
    name = f"{__package__}.{system}"
    known = re.fullmatch(r"[a-z][a-z0-9_]*", system) and importlib.util.find_spec(name) is not None
    found = getattr(importlib.import_module(name), "operations", None) if known else None
    if not isinstance(found, Operations):
        raise ReplayError(f"unknown system {system!r}: there is no adapter for it")
    return found


def replay(path: str | Path, announce: Callable[[Case], None] | None = None) -> Result:
    """Replay one file. Whatever goes wrong is in the result; only an interrupt is raised.

    Args:
        announce: called with the case once it is read, before its operation runs.
    """
    result = Result(Path(path).stem)
    start = time.perf_counter()
    try:
        case = read_case(path)
        result.system, result.operation = case.system, case.operation
        if announce:
            announce(case)
        operations = operations_of(case.system)
        operation = operations.get(case.operation)
        if operation is None:
            raise ReplayError(f"unknown operation {case.operation!r} of {case.system}; known: {', '.join(operations)}")
        outputs = operation(case)
        result.errors = case.errors(outputs)
        if unused := case.unused():
            result.problems.append("given by the case, but nothing read it: " + ", ".join(unused))
    except Exception as error:
        result.trace = traceback.format_exc()
        result.problems.append(_line(error))
    result.seconds = time.perf_counter() - start
    return result


def _line(error: Exception) -> str:
    """The error in one line, with its type and place where it is not one that speaks for itself."""
    text = str(error).strip().split("\n", 1)[0]
    if isinstance(error, ReplayError) or type(error).__module__.startswith("nextscale"):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}"
