"""The samples of a lane of streamed shards: shuffled, from any place on, and whole where shards are not."""

import logging
import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Any

import numpy as np

from .errors import ShardError, listed
from .shards import Side
from .stream_plan import Range, StreamPlan
from .stream_shards import BrokenShard, StreamShards, read_shard

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample as it lies in its shard. `planned`: the number of the one whose place it takes, mostly its own."""

    planned: int
    index: int
    name: str
    text: str
    data: bytes


class Lanes:
    """Reads shards, what lies beside their images by `side`, through shuffle buffers of `buffer` samples a lane.

    reports: names of what was found broken since they were last taken.
    """

    def __init__(self, shards: StreamShards, side: Side, *, seed: int, buffer: int) -> None:
        self.urls, self.side, self.reports = shards.urls, side, list(shards.damage)
        self._seed, self._buffer = seed, buffer
        self._reported: set[str] = set()
        for text in shards.damage:
            _log.warning("a shard is broken: %s", text)

    def shuffled(self, plan: StreamPlan, epoch: int, lane: int, start: int) -> Iterator[Encoded]:
        from webdataset import shuffle

        def mixed(items: Iterator[Any]) -> Iterator[Any]:
            if self._buffer == 1:
                return items
            draws = random.Random(f"lane {self._seed} {epoch} {lane}")
            ordered: Iterator[Any] = shuffle(self._buffer, initial=self._buffer, rng=draws)(items)
            return ordered

        # The buffer takes its draws whatever passes through it. So a run that goes on first sends mere numbers, sees
        # which samples had been given, and then reads from the earliest one that had not.
        earliest = 0
        if start:
            length = plan.length(lane)
            given = np.zeros(length + 1, bool)
            given[list(islice(mixed(iter(range(length))), start))] = True
            earliest = int(given.argmin())
        read = chain(repeat(None, earliest), self._read(plan, epoch, lane, earliest))
        return islice(mixed(read), start, None)

    def _read(self, plan: StreamPlan, epoch: int, lane: int, start: int) -> Iterator[Encoded]:
        """The samples of a lane from one on, in the order of its shards."""
        for part in plan.ranges(epoch, lane):
            first = part.first + min(start, part.last - part.first)
            start -= first - part.first
            if first == part.last:
                continue
            broken = yield from self.range_of(plan, Range(part.place, part.shard, first, part.last))
            lost = range(max(broken, part.first), part.last)
            for place, other in zip(lost, self.following(plan, epoch, part.place), strict=False):
                if place >= first:
                    planned = plan.first_of(part.shard) + place
                    yield Encoded(planned, other.index, other.name, other.text, other.data)

    def range_of(self, plan: StreamPlan, part: Range) -> Generator[Encoded, None, int]:
        """Samples of one shard, up to where it breaks, which is reported; returns that place, else the end."""
        url, base = self.urls[part.shard], plan.first_of(part.shard)
        try:
            for number, name, text, data in read_shard(url, self.side, part.first, part.last):
                yield Encoded(base + number, base + number, name, text, data)
        except BrokenShard as error:
            self.report(f"{url} (from sample {error.at} on)", f"a shard is broken from sample {error.at} on: {error}")
            return error.at
        return part.last

    def following(self, plan: StreamPlan, epoch: int, place: int) -> Iterator[Encoded]:
        """Samples of the shards behind one in the epoch's order, round and round."""
        order = plan.order(epoch)
        while True:
            given = 0
            for step in range(1, len(order) + 1):
                shard = order[(place + step) % len(order)]
                for sample in self.range_of(plan, Range(place, shard, 0, plan.counts[shard])):
                    given += 1
                    yield sample
            if not given:
                raise ShardError(f"none of {len(order)} shards can be read: {listed(self.urls, 3)}")

    def report(self, name: str, text: str) -> None:
        if name not in self._reported:
            self._reported.add(name)
            self.reports.append(name)
            _log.warning("%s", text)
