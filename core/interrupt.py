"""Stopping a long run cleanly."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A run was stopped from outside; its state is saved."""


@dataclass
class InterruptGuard:
    """Turns the first Ctrl-C or termination signal into a clean stop after the current step.

    Attributes:
        once: a second signal ends the process at once. Of several processes, what starts them sends more than one,
            and kills them in the end.
    """

    signals: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    caught: int | None = None
    once: bool = True
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> InterruptGuard:
        try:
            self._before = {number: signal.signal(number, self._catch) for number in self.signals}
        except ValueError:  # not in the main thread: signals are someone else's
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught is not None and self.once:
            raise KeyboardInterrupt
        self.caught = number
