"""What a training run writes down: means of its metrics, as JSON lines and TensorBoard events."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nextscale.core.checkpoint import write_text

Metrics = dict[str, Tensor | float]


class Means:
    """Running means of metrics, without waiting for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        return {name: float(total) / self._counts[name] for name, total in self._sums.items()}

    def clear(self) -> None:
        self._sums, self._counts = {}, {}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])


class RunLog:
    """``log.jsonl`` and TensorBoard events; rows after the step a run resumes from are dropped.

    Every process lists what it could not read in the same ``skipped.txt``; the rest is the first one's.
    """

    def __init__(self, folder: Path, step: int, enabled: bool) -> None:
        self._path = folder / "log.jsonl" if enabled else None
        self._skipped_path = folder / "skipped.txt"
        self._known = self.skipped
        if self._path is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        rows = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        kept = [row for row in rows if _step_of(row) <= step]
        write_text("".join(row + "\n" for row in kept), self._path)
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    @property
    def skipped(self) -> set[str]:
        """Names of the samples and shards that no process could read, or not whole."""
        if not self._skipped_path.exists():
            return set()
        return set(self._skipped_path.read_text(encoding="utf-8").splitlines())

    def skip(self, names: Iterable[str]) -> None:
        """Remember samples that could not be read."""
        for name in (" ".join(name.splitlines()) for name in names):  # one line each, as they are read back
            if name not in self._known:
                self._known.add(name)
                self._skipped_path.parent.mkdir(parents=True, exist_ok=True)
                with self._skipped_path.open("a", encoding="utf-8") as file:
                    file.write(name + "\n")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in metrics.items()}}) + "\n")
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()


def _step_of(row: str) -> float:
    try:
        return float(json.loads(row)["step"])
    except (json.JSONDecodeError, KeyError):
        return math.inf
