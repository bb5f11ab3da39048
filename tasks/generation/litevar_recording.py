"""What calibration sees of a model while it draws: attention, and all that a batch can be run again with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.heads import CategoricalEmitter
from nextscale.core.rotary import rotate
from nextscale.core.sampling import Emission, ScaleContext, Session
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import SelfAttention
from nextscale.tasks.generation.litevar import find_transformer


class Recorder:
    """Adds up what is to be known of a model's attention, over batches.

    Args:
        summary: of the attention of one block and scale, averaged over a batch, (heads, queries, keys): what to keep.
        share_from: the scale from which the first guidance branch's attention alone counts; None: all count alike.
        floor: attention below it, averaged over a batch, counts as none.

    Attributes:
        images: rows of a branch in the step that is run; None: not known.
    """

    def __init__(
        self,
        schedule: ScaleSchedule,
        summary: Callable[[Tensor, ScaleSchedule, int], list[Tensor]],
        share_from: int | None = None,
        floor: float = 0.0,
    ) -> None:
        self.schedule, self._summary, self._share_from, self._floor = schedule, summary, share_from, floor
        self._sums: dict[tuple[int, int], list[Tensor]] = {}
        self._batches = 0
        self.images: int | None = None

    def add(self, layer: int, index: int, query: Tensor, key: Tensor, scale: float) -> None:
        """One block's queries of one scale and all keys so far, (rows, positions, heads, size)."""
        shared = self._share_from is not None and index >= self._share_from and self.images
        rows = self.images if shared and self.images else len(query)
        weights = query.new_zeros(query.shape[2], query.shape[1], key.shape[1], dtype=torch.float32)
        for row in range(rows):
            scores = torch.einsum("qhd,khd->hqk", query[row].float(), key[row].float())
            weights += (scores * scale).softmax(-1)
        weights = weights / rows
        parts = self._summary(torch.where(weights < self._floor, 0, weights), self.schedule, index)
        earlier = self._sums.get((layer, index), [torch.zeros(()) for _ in parts])
        self._sums[layer, index] = [a + b.cpu() for a, b in zip(earlier, parts, strict=True)]
        self._batches += layer == index == 0

    def average(self, index: int) -> list[Float[Tensor, "blocks heads *rest"]]:
        """The summaries of one scale, averaged over batches, block by block.

        Raises:
            ValueError: nothing was recorded of this scale.
        """
        layers = 1 + max((layer for layer, _ in self._sums), default=-1)
        if not layers or any((layer, index) not in self._sums for layer in range(layers)):
            raise ValueError(
                f"no attention of scale {index} was seen: windows are for models that run their scales one by one"
            )
        blocks = [self._sums[layer, index] for layer in range(layers)]
        return [torch.stack(parts) / self._batches for parts in zip(*blocks, strict=True)]


# --- one batch, to be run again -----------------------------------------------------------------------


@dataclass
class Run:
    """A drawn batch.

    Attributes:
        begin: starts the network again under the same conditions.
        steps: the arguments of each step of the session.
        weights: of the guidance branches, for each step.
    """

    begin: Callable[[], Session] | None
    steps: list[tuple[int, Tensor | None, int | None]]
    weights: list[list[float]]

    @property
    def branches(self) -> int:
        return len(self.weights[0])

    @torch.inference_mode()
    def log_probabilities(self) -> list[Float[Tensor, "images tokens symbols"]]:
        """What would be drawn from at every step, were all before as it was: of the model as it now is."""
        assert self.begin is not None
        session, result = self.begin(), []
        for step, weights in zip(self.steps, self.weights, strict=True):
            logits = session.logits(session.step(*step), slice(None)).float().chunk(len(weights))
            result.append(sum(w * part for w, part in zip(weights, logits, strict=True)).log_softmax(-1))  # type: ignore[union-attr]
        return result


def divergences(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[float]:
    """Kullback-Leibler divergence of what is drawn from at each step, in nats, summed over its tokens for an image."""
    return [
        float(F.kl_div(new, old, reduction="sum", log_target=True)) / len(old)
        for old, new in zip(before, after, strict=True)
    ]


class _RecordingSession:
    def __init__(self, session: Session, run: Run, recorder: Recorder) -> None:
        self._session, self._run, self._recorder = session, run, recorder

    def step(self, index: int, inputs: Tensor | None, first: int | None = None) -> Tensor:
        self._run.steps.append((index, inputs, first))
        self._recorder.images = None if inputs is None else len(inputs)
        return self._session.step(index, inputs, first)

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        return self._session.logits(hidden, rows)


@dataclass(frozen=True)
class _RecordingEmitter(CategoricalEmitter):
    run: Run | None = None

    def emit(self, context: ScaleContext) -> Emission:
        assert self.run is not None
        self.run.weights.append([branch.weights[context.index] for branch in context.branches])
        return super().emit(context)


@torch.inference_mode()
def draw_recorded(model: Any, count: int, seed: int, recorder: Recorder) -> Run:
    """Draw pictures of random classes, recording attention and all that is needed to run the batch again.

    Raises:
        ValueError: the model draws no classes, or does not draw by starting a session of its own.
    """
    if not hasattr(model.config, "classes"):
        raise ValueError(f"this {type(model).__name__} draws no classes, of which pictures are drawn here")
    run = Run(None, [], [])
    original = model.start

    def start(*arguments: Any, **options: Any) -> Session:
        run.begin = lambda: cast(Session, original(*arguments, **options))
        return _RecordingSession(run.begin(), run, recorder)

    draws = model.draws(range(seed, seed + count))
    labels = draws.integers(model.config.classes, count).to(model.device)
    # Shadows the class's method for as long as the pictures are drawn.
    model.start = start
    try:
        with _recording_attention(model, recorder):
            for _ in model.steps(labels, draws=draws, emitter=_RecordingEmitter(900, 0.96, run=run)):
                pass
    finally:
        del model.start
    if run.begin is None or len(run.steps) != len(model.config.schedule):
        raise ValueError(
            f"this {type(model).__name__} does not draw its scales one by one by itself; calibrate its parts"
        )
    return run


@contextmanager
def _recording_attention(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Every block's attention also shows its queries and keys to the recorder."""
    places = {place: index for index, place in enumerate(recorder.schedule.ranges)}
    kept: dict[int, Tensor] = {}

    def hook(layer: int) -> Callable[..., None]:
        def seen(attention: SelfAttention, inputs: Any, options: dict[str, Any], output: Any) -> None:
            query, key, _ = attention.project(inputs[0])
            rotation = options.get("rotation")
            if rotation is not None:
                query, key = rotate(query, rotation), rotate(key, rotation)
            if layer in kept:
                key = torch.cat((kept[layer], key), dim=1)
            kept[layer] = key
            index = places.get((key.shape[1] - query.shape[1], key.shape[1]))
            if index is not None:
                recorder.add(layer, index, query, key, attention.scale)

        return seen

    blocks = find_transformer(model).blocks
    handles = [
        block.attention.register_forward_hook(hook(layer), with_kwargs=True) for layer, block in enumerate(blocks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
