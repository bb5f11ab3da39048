"""What calibration sees of a model: drawn batches that can be run again, and what attention works with in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nextscale.core.cache import GradientCache
from nextscale.core.heads import CategoricalEmitter
from nextscale.core.rotary import rotate
from nextscale.core.sampling import Emission, ScaleContext, Session
from nextscale.core.transformer import SelfAttention
from nextscale.tasks.generation.litevar import find_transformer

# --- attention ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What one block attends with at one scale.

    Attributes:
        layer, index: of the block and the scale.
        query, key, value: of all rows, branch by branch, (rows, positions, heads, size); the latter of all scales so
            far.
        shared: the first rows, if theirs is the attention of all.
    """

    layer: int
    index: int
    attention: SelfAttention
    query: Tensor
    key: Tensor
    value: Tensor
    shared: int | None

    def weights(self) -> Float[Tensor, "rows heads queries keys"]:
        """Attention of each row to all keys, float32."""
        scores = torch.einsum("bqhd,bkhd->bhqk", self.query.float(), self.key.float())
        return (scores * self.attention.scale).softmax(-1)


class _EnoughSeen(Exception):
    """What comes after the block that is watched is not run."""


@contextmanager
def watching(
    model: Any, see: Callable[[Seen], None], images: int, share_from: int | None = None, block: int | None = None
) -> Iterator[None]:
    """Every block's attention, or one's, shows what it works with while a batch is run once, scale by scale.

    Where it is one block's, a step ends with it, by :class:`_EnoughSeen`.

    Args:
        images: rows of a guidance branch.
        share_from: the scale from which the first branch's attention alone counts; None: all count alike.
    """
    places = {place: index for index, place in enumerate(model.config.schedule.ranges)}
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def hook(layer: int) -> Callable[..., None]:
        def seen(attention: SelfAttention, inputs: Any, options: dict[str, Any], output: Any) -> None:
            query, key, value = attention.project(inputs[0])
            rotation = options.get("rotation")
            if rotation is not None:
                query, key = rotate(query, rotation), rotate(key, rotation)
            if layer in kept:
                key, value = (torch.cat(pair, dim=1) for pair in zip(kept[layer], (key, value), strict=True))
            kept[layer] = key, value
            index = places.get((key.shape[1] - query.shape[1], key.shape[1]))
            if index is not None:
                shared = images if share_from is not None and index >= share_from else None
                see(Seen(layer, index, attention, query, key, value, shared))
            if layer == block:
                raise _EnoughSeen

        return seen

    blocks = find_transformer(model).blocks
    handles = [
        each.attention.register_forward_hook(hook(layer), with_kwargs=True)
        for layer, each in enumerate(blocks)
        if block in (None, layer)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- one batch, to be run again -----------------------------------------------------------------------


@dataclass
class Run:
    """A drawn batch.

    Attributes:
        begin: starts the network again under the same conditions, as it then is.
        steps: the arguments of each step of the session.
        weights: of the guidance branches, for each step.
        images: in the batch.
    """

    begin: Callable[[], Session] | None
    steps: list[tuple[int, Tensor | None, int | None]]
    weights: list[list[float]]
    images: int

    @property
    def branches(self) -> int:
        return len(self.weights[0])

    @torch.inference_mode()
    def watch(
        self, model: Any, see: Callable[[Seen], None], share_from: int | None = None, block: int | None = None
    ) -> None:
        """Run the batch again and show what attention works with; arguments as of :func:`watching`."""
        assert self.begin is not None
        with watching(model, see, self.images, share_from, block):
            session = self.begin()
            for step in self.steps:
                # Every step's inputs are recorded: none depends on how far the one before has come.
                with suppress(_EnoughSeen):
                    session.step(*step)

    def log_gradients(
        self, model: Any, see: Callable[[int, int, SelfAttention, Tensor], None], generator: torch.Generator
    ) -> None:
        """Show the gradients of the log-probability of symbols drawn anew, in what attention gives.

        Args:
            see: called with block, scale, the attention, and (rows, positions, width).
            generator: on the CPU, of the symbols.
        """
        assert self.begin is not None
        transformer = find_transformer(model)
        given, places, likely = list[Tensor](), list[tuple[int, int, SelfAttention]](), list[Tensor]()

        def hook(layer: int) -> Callable[..., Tensor]:
            def seen(attention: SelfAttention, inputs: Any, output: Tensor) -> Tensor:
                output = output if output.requires_grad else output.requires_grad_()
                given.append(output)
                places.append((layer, len(likely), attention))
                return output

            return seen

        handles = [block.attention.register_forward_hook(hook(n)) for n, block in enumerate(transformer.blocks)]
        # Shadows the class's method: an allocation that is written over has no gradients.
        transformer.allocate_cache = lambda *sizes: GradientCache(len(transformer.blocks))  # type: ignore[method-assign]
        try:
            with torch.enable_grad():
                session = self.begin()
                for (index, inputs, first), weights in zip(self.steps, self.weights, strict=True):
                    hidden = session.step(index, _anew(inputs), first)
                    logits = _guided(session.logits(hidden, slice(None)), weights)
                    chances = logits.detach().softmax(-1).flatten(0, 1).cpu()
                    symbols = torch.multinomial(chances, 1, generator=generator).view(*logits.shape[:2], 1)
                    likely.append(logits.gather(-1, symbols.to(logits.device)).sum())
                gradients = torch.autograd.grad(sum(likely, torch.zeros((), device=logits.device)), given)
        finally:
            del transformer.allocate_cache
            for handle in handles:
                handle.remove()
        for place, gradient in zip(places, gradients, strict=True):
            see(*place, gradient)

    @torch.inference_mode()
    def log_probabilities(self) -> list[Float[Tensor, "images tokens symbols"]]:
        """What would be drawn from at every step, were all before as it was: of the model as it now is."""
        assert self.begin is not None
        session, result = self.begin(), []
        for step, weights in zip(self.steps, self.weights, strict=True):
            result.append(_guided(session.logits(session.step(*step), slice(None)), weights))
        return result


def _guided(logits: Tensor, weights: Sequence[float]) -> Float[Tensor, "images tokens symbols"]:
    """Log-probabilities of the branches' weighted sum."""
    parts = logits.float().chunk(len(weights))
    return sum(w * part for w, part in zip(weights, parts, strict=True)).log_softmax(-1)  # type: ignore[union-attr]


def divergences(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[float]:
    """Kullback-Leibler divergence of what is drawn from at each step, in nats, summed over its tokens for an image."""
    return [
        float(F.kl_div(new, old, reduction="sum", log_target=True)) / len(old)
        for old, new in zip(before, after, strict=True)
    ]


class _RecordingSession:
    def __init__(self, session: Session, run: Run) -> None:
        self._session, self._run = session, run

    def step(self, index: int, inputs: Tensor | None, first: int | None = None) -> Tensor:
        self._run.steps.append((index, inputs, first))
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


def _anew(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@torch.inference_mode()
def draw_recorded(model: Any, count: int, seed: int) -> Run:
    """Draw pictures of random classes, recording all that is needed to run the batch again.

    Raises:
        ValueError: the model draws no classes, or does not draw by starting a session of its own.
    """
    if not hasattr(model.config, "classes"):
        raise ValueError(f"this {type(model).__name__} draws no classes, of which pictures are drawn here")
    run = Run(None, [], [], count)
    original = model.start

    def start(*arguments: Any, **options: Any) -> Session:
        # Anew each time: what was made without gradients may not be used with them.
        run.begin = lambda: cast(Session, model.start(*(_anew(each) for each in arguments), **options))
        return _RecordingSession(original(*arguments, **options), run)

    draws = model.draws(range(seed, seed + count))
    labels = draws.integers(model.config.classes, count).to(model.device)
    # Shadows the class's method for as long as the pictures are drawn.
    model.start = start
    try:
        for _ in model.steps(labels, draws=draws, emitter=_RecordingEmitter(900, 0.96, run=run)):
            pass
    finally:
        del model.start
    if run.begin is None or len(run.steps) != len(model.config.schedule):
        raise ValueError(
            f"this {type(model).__name__} does not draw its scales one by one by itself; calibrate its parts"
        )
    return run
