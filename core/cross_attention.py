"""Attention from tokens to a memory of other things: a text, the features of an image.

Texts have various lengths. They are kept packed, end to end, so that nothing is computed for padding; only the keys and
values are laid out as a batch. What depends on the memory alone is computed once (:meth:`CrossAttention.remember`)
and serves all scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nextscale.core.attention import attend_visible
from nextscale.core.fused import linear
from nextscale.core.transformer import MAX_LOG_SCALE, to_length


@dataclass(frozen=True, eq=False)
class Packed:
    """Sequences of various length, joined end to end.

    Attributes:
        values: of all sequences.
        lengths: of each.

    Raises:
        ValueError: the lengths are not those of the values, or one is empty.
    """

    values: Float[Tensor, "total channels"]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if sum(self.lengths) != len(self.values) or min(self.lengths, default=0) < 1:
            raise ValueError(
                f"{len(self.values)} positions cannot be sequences of the lengths {list(self.lengths)}: the lengths "
                "must sum to them, and each must be at least 1"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def join(cls, parts: Iterable[Packed]) -> Self:
        """The sequences of several, in order."""
        parts = list(parts)
        return cls(torch.cat([part.values for part in parts]), tuple(n for part in parts for n in part.lengths))

    def split(self) -> tuple[Float[Tensor, "length channels"], ...]:
        """Each sequence."""
        return self.values.split(self.lengths)

    def select(self, indices: Sequence[int]) -> Self:
        """The sequences with these numbers, in this order; a number may come more than once."""
        parts = self.split()
        chosen = [parts[index] for index in indices]
        return type(self)(torch.cat(chosen), tuple(len(part) for part in chosen))

    def map(self, values: Tensor) -> Self:
        """Other values for the same positions."""
        return replace(self, values=values)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        return self.map(self.values.to(device=device, dtype=dtype))

    def padded(self) -> Float[Tensor, "batch longest channels"]:
        """One row per sequence, zeros behind its end."""
        longest = max(self.lengths)
        if min(self.lengths) == longest:
            return self.values.unflatten(0, (len(self.lengths), -1))  # as they are: nothing is copied
        # One copy for all sequences, forth and back.
        places = [row * longest + place for row, length in enumerate(self.lengths) for place in range(length)]
        blank = self.values.new_zeros(len(self.lengths) * longest, self.values.shape[1])
        filled = blank.index_copy(0, torch.tensor(places, device=self.values.device), self.values)
        return filled.unflatten(0, (-1, longest))

    def visible(self) -> Bool[Tensor, "batch longest"] | None:
        """Which of :meth:`padded`'s positions belong to a sequence; None: all."""
        longest = max(self.lengths)
        if min(self.lengths) == longest:
            return None
        counts = torch.tensor(self.lengths, device=self.values.device)
        return torch.arange(longest, device=self.values.device) < counts[:, None]


@dataclass(frozen=True, eq=False)
class Memory:
    """Keys and values of what is attended to.

    Attributes:
        visible: see :meth:`Packed.visible`.
        rows: which of the texts each row of a batch attends to; None: row i to text i.
    """

    key: Float[Tensor, "texts longest heads size"]
    value: Float[Tensor, "texts longest heads size"]
    visible: Bool[Tensor, "texts longest"] | None = None
    rows: Int[Tensor, " batch"] | None = None

    def of_rows(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and what is visible of each row of the batch."""
        if self.rows is None:
            return self.key, self.value, self.visible
        visible = None if self.visible is None else self.visible[self.rows]
        return self.key[self.rows], self.value[self.rows], visible


class CrossAttention(nn.Module):
    """Multi-head attention from tokens to a memory; queries and values have biases, keys have none.

    Args:
        cosine: unit queries and keys with a learned scale per head, instead of a scaled dot product.
        scale: of the dot product; None: 1 / sqrt(head size).
    """

    uncompiled = ("remember",)  # lengths differ from batch to batch: each would be a graph of its own

    def __init__(
        self, width: int, heads: int, memory_width: int, *, cosine: bool = False, scale: float | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(memory_width, 2 * width, bias=False)
        self.value_bias = nn.Parameter(torch.zeros(width))
        self.projection = nn.Linear(width, width)
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(4.0))) if cosine else None
        self.scale = 1.0 if cosine else scale or 1 / math.sqrt(width // heads)

    def remember(self, memory: Packed) -> Memory:
        """Keys and values: depend on the memory alone, so once per call serves all scales."""
        bias = torch.cat((torch.zeros_like(self.value_bias), self.value_bias))
        packed = memory.map(linear(self.key_value, memory.values, bias))
        key, value = packed.padded().unflatten(-1, (2, self.heads, -1)).unbind(2)
        if self.log_scale is not None:
            key = to_length(key, torch.ones_like(self.log_scale, dtype=torch.float32)[:, None])
        return Memory(key, value, memory.visible())

    def forward(
        self, x: Float[Tensor, "batch positions width"], memory: Memory | Packed
    ) -> Float[Tensor, "batch positions width"]:
        """Attend to the memory, all positions alike."""
        if isinstance(memory, Packed):
            memory = self.remember(memory)
        query = linear(self.query, x).unflatten(-1, (self.heads, -1))
        if self.log_scale is not None:
            query = to_length(query, self.log_scale.float().clamp(max=MAX_LOG_SCALE).exp()[:, None])
        out = self.attend(query, *memory.of_rows())
        return linear(self.projection, out.flatten(2))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        """The attention itself, (batch, positions, heads, head size)."""
        return attend_visible(query, key, value, self.scale, visible)
