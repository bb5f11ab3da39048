"""The processes of one distributed run: what they agree on, how they wait for each other, how a lost one is told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(days=365)
"""How long one process waits for another that is at work: sample sheets and validation take their time."""

_LOST = re.compile(r"Connection (closed|reset)|Broken pipe|Socket ?Timeout|Timed out|NCCL|gloo|remote process", re.I)


class ProcessLost(OSError):
    """A process of the run ended before the others."""


class Word(IntEnum):
    """What a process has to say at the end of a step; of several the greatest counts."""

    GO_ON = 0
    STOP = 1
    FAILED = 2


class Processes:
    """Talk between the processes of a run, on the CPU, apart from what the devices exchange.

    Attributes:
        rank, count: this process's number, and how many there are.
        distributed: whether there is a process group at all, even of one.
    """

    def __init__(self) -> None:
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if self.distributed else (0, 1)
        self._talk = dist.new_group(backend="gloo", timeout=PATIENCE) if self.distributed else None
        self._asked: tuple[Any, torch.Tensor] | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def new_group(self) -> Any:
        """Another group of all, for talk from another thread; None where there is one process alone."""
        return dist.new_group(backend="gloo", timeout=PATIENCE) if self.distributed else None

    def wait(self) -> None:
        """Until all are here."""
        if self.distributed:
            dist.barrier(group=self._talk)

    def agree(self, word: Word) -> Word:
        """The greatest word of all, now; all call this."""
        if not self.distributed:
            return word
        said = torch.tensor(int(word))
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self._talk)
        return Word(int(said))

    def hear(self, word: Word) -> Word:
        """The greatest word of all at the last call; all call this once per step, which costs them no waiting."""
        if not self.distributed:
            return word
        heard = Word.GO_ON
        if self._asked is not None:
            work, said = self._asked
            work.wait()
            heard = Word(int(said))
        said = torch.tensor(int(word))
        self._asked = dist.all_reduce(said, dist.ReduceOp.MAX, group=self._talk, async_op=True), said
        return heard

    def hush(self) -> None:
        """End what :meth:`hear` has begun, before anything else is said."""
        if self._asked is not None:
            self._asked[0].wait()
            self._asked = None

    def gathered(self, value: Any) -> list[Any]:
        """A plain value of each process, in their order."""
        if not self.distributed:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._talk)
        return values

    def means(self, values: dict[str, Any]) -> dict[str, Any]:
        """Of numbers by name, means over the processes that have them."""
        if not self.distributed:
            return values
        told = self.gathered({name: float(value) for name, value in values.items()})
        names = dict.fromkeys(name for each in told for name in each)
        found = {name: [each[name] for each in told if name in each] for name in names}
        return {name: sum(each) / len(each) for name, each in found.items()}

    def raise_first(self, error: OSError | None) -> None:
        """Where any process has an error, all raise the first one's; all call this."""
        for message in self.gathered(None if error is None else str(error)):
            if message is not None:
                raise OSError(message) from error


@contextmanager
def lost_processes_named(advice: str) -> Iterator[None]:
    """Turns what communication says when another process is gone into one sentence.

    Args:
        advice: what the user is to do then.

    Raises:
        ProcessLost: communication failed.
    """
    try:
        yield
    except RuntimeError as error:
        if not (dist.is_available() and dist.is_initialized()):
            raise
        if not isinstance(error, dist.DistError) and not (type(error) is RuntimeError and _LOST.search(str(error))):
            raise
        reason = str(error).splitlines()[0]
        raise ProcessLost(
            f"process {dist.get_rank()} of {dist.get_world_size()} stops: another one has ended ({reason}). {advice}"
        ) from error


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """A tensor's mean over all processes, each of which calls this; outside of differentiation."""
    if dist.is_available() and dist.is_initialized():
        value = value.detach().clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def rows_of_processes(value: torch.Tensor) -> torch.Tensor:
    """The rows of all processes one after the other; each calls this, with as many."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)
