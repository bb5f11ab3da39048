"""The next-scale transformer: pre-norm blocks modulated by a condition (AdaLN).

The blocks run over the whole flat sequence with next-scale visibility (teacher forcing), or over one scale
at a time with a key-value cache (sampling). What depends on the condition alone, every block's
modulation, is computed once per call by :meth:`NextScaleTransformer.modulate`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nextscale.core.attention import Visibility, attend, attend_segments
from nextscale.core.cache import KeyValueCache
from nextscale.core.fused import linear, linear_gelu
from nextscale.core.random import Draws
from nextscale.core.rotary import Rotation, rotate

MAX_LOG_SCALE = math.log(100)
"""Largest learned logit scale of cosine attention, as a logarithm."""


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options of the blocks.

    Attributes:
        conditioning: ``"block"``: each block projects the condition to its six modulation vectors;
            ``"shared"``: one projection for all blocks plus a learned offset per block; ``"none"``: blocks are not
            modulated.
        attention: ``"cosine"``: unit queries and keys with a learned scale per head; ``"dot"``: scaled dot
            product with ``attention_scale`` (None: 0.25 / sqrt(head size), VAR's).
        drop_path: probability of skipping a branch of the last block in training, rising linearly from 0.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    conditioning: Literal["block", "shared", "none"] = "block"
    attention: Literal["cosine", "dot"] = "cosine"
    attention_scale: float | None = None
    norm_eps: float = 1e-6
    drop_path: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads) < 1:
            raise ValueError(f"width {self.width}, depth {self.depth} and heads {self.heads} must be at least 1")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}, a probability in [0, 1) was expected")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the {self.heads} heads")
        for name, allowed in (("conditioning", ("block", "shared", "none")), ("attention", ("cosine", "dot"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {allowed}")

    @property
    def head_size(self) -> int:
        return self.width // self.heads


class Modulation(nn.Module):
    """Condition -> ``chunks`` vectors of the model's width: Linear(SiLU(condition))."""

    def __init__(self, condition_width: int, width: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(condition_width, chunks * width)

    def forward(self, condition: Float[Tensor, "batch condition"]) -> Float[Tensor, "batch 1 chunks width"]:
        return self.linear(F.silu(condition)).unflatten(-1, (1, self.chunks, -1))


def to_length(x: Float[Tensor, "*batch heads size"], length: Float[Tensor, "heads 1"]) -> Tensor:
    """Vectors scaled to a length (float32, as the norm is), in the vectors' precision."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x * (length / norm.clamp_min(1e-12))).to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head attention; queries and values have biases, keys have none."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_bias = nn.Parameter(torch.zeros(width))
        self.value_bias = nn.Parameter(torch.zeros(width))
        self.projection = nn.Linear(width, width)
        self.dropout = config.dropout
        if config.attention == "cosine":
            self.log_scale: nn.Parameter | None = nn.Parameter(torch.full((config.heads,), math.log(4.0)))
            self.scale = 1.0
        else:
            self.log_scale = None
            self.scale = config.attention_scale or 0.25 / math.sqrt(config.head_size)

    def project(self, x: Float[Tensor, "batch positions width"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, positions, heads, head size), normalised as configured."""
        bias = torch.cat((self.query_bias, torch.zeros_like(self.query_bias), self.value_bias))
        qkv = linear(self.qkv, x, bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        if self.log_scale is not None:
            scale = self.log_scale.float().clamp(max=MAX_LOG_SCALE).exp()[:, None]
            q, k = to_length(q, scale), to_length(k, torch.ones_like(scale))
        return q, k, v

    def forward(
        self,
        x: Tensor,
        segments: Visibility | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Attend to what ``segments`` and ``cache`` hold; with ``rotation``, by rotary positions of these tokens."""
        q, k, v = self.project(x)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        out = attend(q, k, v, self.scale) if segments is None else attend_segments(q, k, v, self.scale, segments)
        return F.dropout(linear(self.projection, out.flatten(2)), self.dropout, self.training)


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(linear(self.contract, linear_gelu(self.expand, x)), self.dropout, self.training)


def drop_path(x: Tensor, probability: float, training: bool, uniform: Tensor | None = None) -> Tensor:
    """Stochastic depth: zero whole samples with ``probability`` and scale up the rest (Huang et al. 2016).

    Args:
        uniform: in [0, 1), one per sample, which decide; drawn where there are none, or not one per row of ``x``.
    """
    if not training or probability == 0:
        return x
    if uniform is None or len(uniform) != len(x):
        uniform = torch.rand(len(x), device=x.device)
    keep = (uniform >= probability).to(x.dtype).view(-1, *(1,) * (x.ndim - 1))
    return x * keep / (1 - probability)


class StochasticDepth(nn.Module):
    """Base of blocks whose branches are skipped at random in training.

    Attributes:
        drop_probability: of each branch and sample.
        path_draws: (branches, batch) in [0, 1), which decide in place of the global generator; see
            :func:`draw_paths`.
    """

    BRANCHES = 3
    """Draws that are kept for a block: as many branches as one has at most."""

    drop_probability: float
    path_draws: Tensor | None = None

    def dropped(self, branch: Tensor, number: int) -> Tensor:
        """A branch's output, skipped for some samples in training."""
        uniform = None if self.path_draws is None else self.path_draws[number]
        return drop_path(branch, self.drop_probability, self.training, uniform)


@contextmanager
def draw_paths(blocks: Sequence[StochasticDepth], draws: Draws | None, batch: int) -> Iterator[None]:
    """Inside, which samples skip which branches is each sample's own draw, the same in any batch and in any process.

    The backward pass belongs inside too: with gradient checkpointing it runs the blocks again.

    Args:
        draws: None: the global generator decides.
    """
    dropping = [block for block in blocks if block.drop_probability > 0]
    if draws is None or not dropping:
        yield
        return
    device = next(dropping[0].parameters()).device
    drawn = draws.uniform((batch, len(dropping), StochasticDepth.BRANCHES), device).permute(1, 2, 0)
    for block, rows in zip(dropping, drawn, strict=True):
        block.path_draws = rows
    try:
        yield
    finally:
        for block in dropping:
            block.path_draws = None


class Block(StochasticDepth):
    """x + gamma1 attention(LN(x) (1 + scale1) + shift1), then the same with the feed-forward network.

    The modulation's chunks come in the order gamma1, gamma2, scale1, scale2, shift1, shift2, which all
    models of the VAR family share (and DiT does not).
    """

    def __init__(self, config: TransformerConfig, condition_width: int, drop_probability: float) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.feed_forward = FeedForward(config.width, round(config.width * config.mlp_ratio), config.dropout)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps, elementwise_affine=False)
        self.drop_probability = drop_probability
        if config.conditioning == "block":
            self.modulation: Modulation | None = Modulation(condition_width, config.width, 6)
        else:
            self.modulation = None
        if config.conditioning == "shared":
            self.modulation_offset = nn.Parameter(torch.randn(6, config.width) / math.sqrt(config.width))

    def modulate(self, condition: Tensor, shared: Tensor | None) -> Float[Tensor, "batch 1 6 width"]:
        """This block's six modulation vectors."""
        if self.modulation is not None:
            return self.modulation(condition)
        assert shared is not None
        return shared + self.modulation_offset

    def forward(
        self,
        x: Float[Tensor, "batch positions width"],
        modulation: Float[Tensor, "batch 1 6 width"] | None,
        segments: Visibility | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        rotation: Rotation | None = None,
    ) -> Float[Tensor, "batch positions width"]:
        if modulation is None:
            branch = self.attention(self.norm(x), segments, cache, layer, rotation=rotation)
            x = x + self.dropped(branch, 0)
            return x + self.dropped(self.feed_forward(self.norm(x)), 1)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        branch = self.attention(
            torch.addcmul(shift1, self.norm(x), 1 + scale1), segments, cache, layer, rotation=rotation
        )
        x = torch.addcmul(x, self.dropped(branch, 0), gamma1)
        branch = self.feed_forward(torch.addcmul(shift2, self.norm(x), 1 + scale2))
        return torch.addcmul(x, self.dropped(branch, 1), gamma2)


class NextScaleTransformer(nn.Module):
    """A stack of :class:`Block` under one condition.

    Attributes:
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(
        self, config: TransformerConfig, condition_width: int | None = None, block: type[Block] = Block
    ) -> None:
        super().__init__()
        self.config = config
        condition_width = condition_width or config.width
        self.shared_modulation = (
            Modulation(condition_width, config.width, 6) if config.conditioning == "shared" else None
        )
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        modules = nn.ModuleList(block(config, condition_width, rate) for rate in rates)
        self.blocks = cast("Sequence[Block]", modules)
        self.gradient_checkpointing = False

    def modulate(self, condition: Float[Tensor, "batch condition"]) -> list[Float[Tensor, "batch 1 6 width"]]:
        """Every block's modulation: depends on the condition alone, so once per call serves all scales.

        Raises:
            ValueError: the blocks are not modulated.
        """
        if self.config.conditioning == "none":
            raise ValueError("these blocks have no modulation (conditioning is 'none'); run them with none")
        shared = self.shared_modulation(condition) if self.shared_modulation is not None else None
        return [block.modulate(condition, shared) for block in self.blocks]

    def allocate_cache(self, batch: int, length: int, dtype: torch.dtype) -> KeyValueCache:
        """A cache for ``length`` positions of ``batch`` rows on the weights' device."""
        config, device = self.config, next(self.parameters()).device
        return KeyValueCache(config.depth, batch, length, config.heads, config.head_size, dtype=dtype, device=device)

    def forward(
        self,
        x: Float[Tensor, "batch positions width"],
        modulations: Sequence[Tensor] | None,
        segments: Visibility | None = None,
        cache: KeyValueCache | None = None,
        rotation: Rotation | None = None,
    ) -> Float[Tensor, "batch positions width"]:
        """Run the blocks.

        Args:
            x: embedded tokens: the whole sequence with ``segments``, or one scale's with ``cache``.
            modulations: from :meth:`modulate`; None: of blocks that are not modulated.
            segments: what each query sees; None: everything given (and everything cached).
            cache: earlier scales' keys and values; this scale's are added.
            rotation: of these tokens, for models with rotary positions.
        """
        given: dict[str, Any] = {} if rotation is None else {"rotation": rotation}
        rows = modulations or (None,) * len(self.blocks)
        for layer, (block, modulation) in enumerate(zip(self.blocks, rows, strict=True)):
            x = self.run_block(block, x, modulation, segments, cache, layer, **given)
        return x

    def run_block(
        self,
        block: Block,
        x: Float[Tensor, "batch positions width"],
        modulation: Float[Tensor, "batch 1 6 width"] | None,
        segments: Visibility | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        **given: Any,
    ) -> Float[Tensor, "batch positions width"]:
        """Run one block: a step of :meth:`forward`, for models that do something between the blocks.

        Args:
            layer: the block's place in the cache.
            given: what the blocks of a subclass take beside.
        """
        if self.gradient_checkpointing and self.training and cache is None:
            arguments = (x, modulation, segments, None, layer)
            return cast(Tensor, checkpoint(block, *arguments, use_reentrant=False, **given))
        return cast(Tensor, block(x, modulation, segments, cache, layer, **given))
