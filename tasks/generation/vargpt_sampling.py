"""VARGPT in the middle of a conversation: what the language model has read, and an image being drawn at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.core.cross_attention import Memory, Packed
from nextscale.core.sampling import Branch, classifier_free
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.vargpt_config import Variant

if TYPE_CHECKING:
    from nextscale.tasks.generation.vargpt import VARGPT

Noise = Callable[[Sequence[int], torch.device], Tensor]


@dataclass
class State:
    """A batch of conversations that a language model has read.

    Attributes:
        cache: of transformers: keys and values of all that was read.
        mask: 1 where what was read counts, in the order of the cache.
        next: position of the next token of text.
        states: hidden states of the text and of the images in it, which v1.1 draws by, with what of them counts.
    """

    cache: Any
    mask: Int[Tensor, "batch read"]
    next: Int[Tensor, " batch"]
    states: list[tuple[Float[Tensor, "batch some width"], Tensor]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.mask)

    def select(self, rows: Sequence[int]) -> State:
        """Some of the conversations, any number of times each; the cache is taken over, not copied.

        This state is of no use any more where not all are taken in order.
        """
        if list(rows) == list(range(len(self))):
            return self
        index = torch.tensor(list(rows), device=self.mask.device)
        self.cache.batch_select_indices(index)
        chosen = [(states[index], counts[index]) for states, counts in self.states]
        return State(self.cache, self.mask[index], self.next[index], chosen)

    def read(self) -> list[Tensor]:
        """The hidden states that count, of every conversation."""
        states = torch.cat([states for states, _ in self.states], dim=1)
        counts = torch.cat([counts for _, counts in self.states], dim=1)
        return [row[counted] for row, counted in zip(states, counts, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of the cache's keys and values."""
        return cache_bytes(self.cache)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache of transformers holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def branches(
    guidance: float | Sequence[float],
    rows: int,
    schedule: ScaleSchedule,
    variant: Variant,
    device: torch.device,
) -> list[Branch]:
    """What is drawn by the prompt, and what it is weighed against; see :meth:`VARGPT.steps`.

    Raises:
        ValueError: there is not one weight for each scale.
    """
    wanted = torch.arange(rows, device=device)
    if not isinstance(guidance, Sequence):
        if variant == "v1":
            return classifier_free(wanted, wanted + rows, guidance, schedule)
        guidance = [guidance] * len(schedule)
    if len(guidance) != len(schedule):
        raise ValueError(f"{len(guidance)} weights of guidance were given for {len(schedule)} scales: give one each")
    if all(weight == 1 for weight in guidance):
        return [Branch(wanted, tuple(guidance))]
    return [Branch(wanted, tuple(guidance)), Branch(wanted + rows, tuple(1 - weight for weight in guidance))]


class Painting:
    """A network for the loop over scales: what it draws goes through the language model at the end of a conversation.

    Args:
        guided: a second row per conversation stands for no prompt.
        noise: v1: what stands for hidden states of no prompt, by shape and device.
        null: v1: as many conversations that ask for no image in particular, which the second row then goes on from.
    """

    def __init__(self, model: VARGPT, state: State, guided: bool, noise: Noise, null: State | None = None) -> None:
        self.model, self.state, self.guided, self.noise, self.null = model, state, guided, noise, null

    def start(self, conditions: Int[Tensor, " rows"], schedule: ScaleSchedule) -> PaintingSession:
        """See :class:`nextscale.core.sampling.ScaleNetwork`."""
        return PaintingSession(self, schedule)


class PaintingSession:
    """See :class:`nextscale.core.sampling.Session`."""

    def __init__(self, painting: Painting, schedule: ScaleSchedule) -> None:
        self._painting, self._schedule = painting, schedule
        model, rows = painting.model, len(painting.state)
        # Conditions are (label, no label); the published v1 draws both rows without.
        wanted = 0 if model.config.labelled or model.config.infinity is not None else 1
        other = 1 if painting.null is None else wanted
        labels = [wanted] * rows + ([other] * rows if painting.guided else [])
        found = model.conditions().of(torch.tensor(labels, device=model.device))
        self._starts, self._modulations, self._head = found
        self.cache = model.decoder.transformer.allocate_cache(len(labels), schedule.length, self._starts.dtype)
        self._memory = self._remember() if model.config.infinity is not None else None
        # The language model counts on from what it has read, whatever positions its images have.
        self._begin = painting.state.mask.sum(1)
        self._null_begin = None if painting.null is None else painting.null.mask.sum(1)

    def _remember(self) -> list[Memory]:
        """What v1.1's blocks attend to: what was read, and the beginning of what stands for no prompt."""
        model: Any = self._painting.model
        states = self._painting.state.read()
        lengths = tuple(len(each) for each in states)
        texts = [Packed(model.from_language(torch.cat(states)), lengths)]
        if self._painting.guided:
            texts.append(model.decoder.no_text(lengths))
        memory: list[Memory] = model.decoder.transformer.remember(Packed.join(texts))
        return memory

    def step(self, index: int, inputs: Tensor | None, first: int | None = None) -> Tensor:
        model, schedule, state = self._painting.model, self._schedule, self._painting.state
        begin, rows = index if first is None else first, len(state)
        given = None if inputs is None else inputs.to(model.device)
        x = model.embed(self._starts[:rows], given, schedule, begin, index + 1)
        states = self._go_on(state, self._begin, x, schedule.ranges[begin][0])
        parts = [model.from_language(states)]
        if self._painting.guided:
            parts.append(model.from_language(self._without_prompt(given, begin, index + 1, states)))
        return model.decode(torch.cat(parts), self._modulations, schedule, begin, index + 1, self._memory, self.cache)

    def _go_on(self, state: State, begin: Tensor, x: Tensor, offset: int) -> Tensor:
        """Hidden states of a part of the image, ``offset`` tokens after its beginning, behind what was read."""
        model: Any = self._painting.model
        rows, count = x.shape[:2]
        state.mask = torch.cat((state.mask, state.mask.new_ones(rows, count)), dim=1)
        positions = model.language.flat(begin + offset, count)
        states: Tensor = model.language(model.to_language(x), positions, state.mask, state.cache)
        return states

    def _without_prompt(self, inputs: Tensor | None, begin: int, end: int, like: Tensor) -> Tensor:
        """Hidden states of no prompt: noise in v1, or a prompt that asks for no image in particular; in v1.1 each scale
        alone, read with nothing before it."""
        model, schedule, rows, null = self._painting.model, self._schedule, len(like), self._painting.null
        if null is not None and self._null_begin is not None:
            x = model.embed(self._starts[rows:], inputs, schedule, begin, end)
            return self._go_on(null, self._null_begin, x, schedule.ranges[begin][0])
        if model.config.infinity is None:
            return self._painting.noise(like.shape, like.device).to(like.dtype)
        x = model.to_language(model.embed(self._starts[rows:], inputs, schedule, begin, end))
        nothing = torch.zeros(rows, dtype=torch.long, device=x.device)
        parts = x.split(schedule.lengths[begin:end], dim=1)
        return torch.cat([model.language(part, model.language.flat(nothing, part.shape[1])) for part in parts], dim=1)

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        return self._painting.model.decoder.head(hidden[rows], self._head[rows])
