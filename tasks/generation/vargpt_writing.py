"""VARGPT writing text: token by token, for a batch of conversations of various length."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nextscale.core.heads import filter_logits
from nextscale.tasks.generation.vargpt_sampling import State

if TYPE_CHECKING:
    from nextscale.tasks.generation.vargpt import VARGPT


@dataclass(frozen=True)
class Choice:
    """How the next token of text is chosen.

    Attributes:
        seeds: one per conversation, so that each gets the same draws alone and in any batch.
        temperature: 0 takes the likeliest.
        top_k, top_p: see :func:`nextscale.core.heads.filter_logits`.
    """

    seeds: Sequence[int]
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature of text is {self.temperature}; 0 takes the likeliest word, more draws")
        object.__setattr__(self, "_generators", [torch.Generator().manual_seed(seed) for seed in self.seeds])

    def select(self, rows: Sequence[int]) -> Choice:
        """Of some of the conversations, which go on drawing where they are."""
        chosen = Choice([self.seeds[row] for row in rows], self.temperature, self.top_k, self.top_p)
        generators: list[torch.Generator] = object.__getattribute__(self, "_generators")
        object.__setattr__(chosen, "_generators", [generators[row] for row in rows])
        return chosen

    def __call__(self, logits: Float[Tensor, "batch words"], active: Bool[Tensor, " batch"]) -> Tensor:
        """One token per row; draws are consumed by the active ones alone."""
        if self.temperature == 0:
            return logits.argmax(-1)
        chances = filter_logits(logits.float() / self.temperature, self.top_k, self.top_p).softmax(-1).cpu()
        generators: list[torch.Generator] = object.__getattribute__(self, "_generators")
        tokens = torch.zeros(len(logits), dtype=torch.long)
        for row in active.nonzero()[:, 0].tolist():
            tokens[row] = torch.multinomial(chances[row], 1, generator=generators[row])
        return tokens.to(logits.device)


@dataclass
class Written:
    """What was written.

    Attributes:
        tokens: of each conversation, the one that it stopped at included.
        last: hidden state of the last token that was read, of each.
        stopped: whether each came to a token it was to stop at.
    """

    tokens: list[list[int]]
    last: Float[Tensor, "batch width"]
    stopped: list[bool] = field(default_factory=list)


def read(
    model: VARGPT,
    ids: Int[Tensor, "batch length"],
    mask: Int[Tensor, "batch length"],
    pixels: Tensor | None = None,
    grids: Tensor | None = None,
) -> tuple[State, Float[Tensor, "batch length width"]]:
    """Read conversations, padded on the left; what was read, and every hidden state.

    Args:
        pixels, grids: of all images, in the order of their marks; see :meth:`LanguageModel.see`.
    """
    from transformers import DynamicCache

    features = model.language.see(pixels, grids) if pixels is not None and grids is not None and len(pixels) else None
    if grids is None:
        grids = torch.zeros(0, 3, dtype=torch.long)
    positions, after = model.language.positions(ids, mask, grids)
    state = State(DynamicCache(), mask.long(), after)
    states = model.language(model.language.embed(ids, features), positions, state.mask, state.cache)
    remember(model, state, states, mask.bool())
    return state, states


def add(
    model: VARGPT, state: State, x: Float[Tensor, "batch some width"], counts: Bool[Tensor, "batch some"]
) -> Float[Tensor, "batch some width"]:
    """Read more, at the end of every conversation; where ``counts`` is False nothing is read."""
    steps = counts.long().cumsum(1) - 1
    positions = (state.next[:, None] + steps.clamp_min(0)).expand(model.language.axes, -1, -1)
    state.mask = torch.cat((state.mask, counts.long()), dim=1)
    state.next = state.next + counts.sum(1)
    return model.language(x, positions, state.mask, state.cache)


def remember(model: VARGPT, state: State, states: Tensor, counts: Tensor) -> None:
    """Keep hidden states that v1.1's decoder draws by."""
    if model.config.infinity is not None:
        state.states.append((states, counts))


def write(
    model: VARGPT,
    state: State,
    last: Float[Tensor, "batch width"],
    choose: Callable[[Tensor, Tensor], Tensor],
    limit: int,
    stops: Sequence[int],
) -> Written:
    """:func:`writing`, to its end."""
    words = writing(model, state, last, choose, limit, stops)
    while True:
        try:
            next(words)
        except StopIteration as end:
            written: Written = end.value
            return written


def writing(
    model: VARGPT,
    state: State,
    last: Float[Tensor, "batch width"],
    choose: Callable[[Tensor, Tensor], Tensor],
    limit: int,
    stops: Sequence[int],
) -> Generator[tuple[int, int], None, Written]:
    """Write until every conversation comes to a token of ``stops``, which is read too, or to the limit.

    Args:
        last: hidden state behind which the first token comes.
        limit: most tokens of each conversation.

    Yields:
        Every conversation's number and token, as it comes. The generator's value is a :class:`Written`.
    """
    rows, ends = len(state), torch.tensor(list(stops), dtype=torch.long, device=last.device)
    tokens: list[list[int]] = [[] for _ in range(rows)]
    active = torch.ones(rows, dtype=torch.bool, device=last.device)
    for _ in range(limit):
        chosen = choose(model.language.words(last), active)
        for row in active.nonzero()[:, 0].tolist():
            tokens[row].append(int(chosen[row]))
            yield row, int(chosen[row])
        ended = torch.isin(chosen, ends)
        x = model.language.embedding(torch.where(active, chosen, model.config.marks.empty))[:, None]
        # The start of an image, and the end of an answer, are nothing to draw by.
        drawn_by = active & ~ended
        states = add(model, state, x, active[:, None])
        remember(model, state, states, drawn_by[:, None])
        last = torch.where(active[:, None], states[:, 0], last)
        active = drawn_by
        if not active.any():
            break
    return Written(tokens, last, (~active).tolist())
