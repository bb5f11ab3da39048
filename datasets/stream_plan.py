"""Which sample of a stream of shards is seen when, by whom: arithmetic over the shards' counts alone.

An epoch is all shards in a shuffled order, one after the other. It is cut into *lanes*: contiguous shares that are
equal to a sample, whatever the shards' sizes, so that a shard on a border is read by two lanes, each its part.
Sample i of the epoch is the next one of lane i modulo `lanes`, and epochs follow each other without a gap. Processes
take turns in that one sequence: with a number of lanes that is a multiple of theirs, each has lanes of its own, and
what is seen at a step does not depend on how many they are. Nothing is padded or dropped: a batch may hold the last
samples of one epoch and the first of the next.
"""

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np

LANES = (24, 12, 8, 6, 4, 3, 2, 1)
"""Numbers of lanes that divide over usual numbers of processes."""


@dataclass(frozen=True)
class Range:
    """Samples `first` to `last` - 1 of a shard; `place`: the shard's in the epoch's order."""

    place: int
    shard: int
    first: int
    last: int


@dataclass(frozen=True)
class StreamPlan:
    """counts: samples of each shard. lanes: see above. seed: of the order of shards."""

    counts: tuple[int, ...]
    lanes: int
    seed: int

    @cached_property
    def total(self) -> int:
        """Samples of an epoch."""
        return sum(self.counts)

    @cached_property
    def _firsts(self) -> list[int]:
        return [0, *accumulate(self.counts)]

    def first_of(self, shard: int) -> int:
        """Number of a shard's first sample, counted through the shards as they are listed."""
        return self._firsts[shard]

    def shard_of(self, number: int) -> int:
        """The shard of a sample by that count."""
        return bisect_right(self._firsts, number) - 1

    def order(self, epoch: int) -> Sequence[int]:
        """The shards in the order of an epoch."""
        return _order(self.counts, self.seed, epoch)[0]

    def length(self, lane: int) -> int:
        """Samples of a lane."""
        return (self.total - lane + self.lanes - 1) // self.lanes

    def locate(self, number: int) -> tuple[int, int, int]:
        """(epoch, lane, place in the lane) of a sample of the endless sequence."""
        epoch, within = divmod(number, self.total)
        place, lane = divmod(within, self.lanes)
        return epoch, lane, place

    def ranges(self, epoch: int, lane: int) -> list[Range]:
        """What a lane reads in an epoch, one after the other."""
        order, ends = _order(self.counts, self.seed, epoch)
        full, more = divmod(self.total, self.lanes)
        begin = lane * full + min(lane, more)
        end = begin + self.length(lane)
        made = []
        place = int(np.searchsorted(ends, begin, "right"))
        while begin < end:
            shard = order[place]
            start = int(ends[place]) - self.counts[shard]
            stop = min(int(ends[place]), end)
            if stop > begin:
                made.append(Range(place, shard, begin - start, stop - start))
                begin = stop
            place += 1
        return made


def lanes_of(shards: int, processes: int, asked: int | None = None) -> int:
    """Lanes to read so many shards in: those asked for, else up to 24, not more than shards; a multiple of processes.

    Raises ValueError.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"lanes is {asked}; expected at least 1")
    return math.lcm(asked or next(lanes for lanes in LANES if lanes <= max(shards, 1)), processes)


@lru_cache(maxsize=4)
def _order(counts: tuple[int, ...], seed: int, epoch: int) -> tuple[list[int], np.ndarray]:
    """The shuffled shards, and how many samples there are up to the end of each."""
    order = list(range(len(counts)))
    random.Random(f"shards {seed} {epoch}").shuffle(order)
    return order, np.cumsum([counts[shard] for shard in order], dtype=np.int64)
