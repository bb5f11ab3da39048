"""FlowAR's emitter: a small transformer that turns noise into the latents of one scale, by flow matching.

Ren et al. 2024 (arXiv 2412.15205, section 3.3); flow matching after Lipman et al. 2022 (arXiv 2210.02747). On the
straight path x_t = (1 - t) x + t noise the network gives the velocity noise - x; drawing follows it from t = 1 to 0.
Official code OliverRensu/FlowAR, ``models/flowmodel.py`` and ``models/sampler.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.attention import attend
from nextscale.core.fused import linear
from nextscale.core.rotary import Rotation, rotate
from nextscale.core.sampling import Emission, ScaleContext
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import Modulation
from nextscale.tasks.generation.flowar_transformer import (
    FlowARBlock,
    FlowARBlocksConfig,
    GatedFeedForward,
    RootMeanSquareNorm,
    RotaryAttention,
    gated_ratio,
    rotation_of,
)

WAVES = 128
"""Frequencies of a time's embedding, each as cosine and sine."""


@dataclass(frozen=True)
class FlowConfig:
    """Attributes:

    heads: None: one per 64 channels, rounded down.
    mlp_ratio: None: about 8 / 3, as published.
    cross: blocks attend to the conditioning between their two branches, and only the second of these is modulated by
        it; False: both are, and nothing attends to it.
    truncate_time: a time is embedded as the whole number below 1000 t, as published; False: as 1000 t.
    """

    width: int = 1024
    depth: int = 2
    heads: int | None = None
    mlp_ratio: float | None = None
    cross: bool = False
    truncate_time: bool = False

    @property
    def blocks(self) -> FlowARBlocksConfig:
        """Sizes of the blocks."""
        heads = self.heads or self.width // 64
        ratio = gated_ratio(self.width) if self.mlp_ratio is None else self.mlp_ratio
        return FlowARBlocksConfig(self.width, self.depth, heads, ratio, key_query_bias=False)


class Moment(NamedTuple):
    """What depends on a time alone.

    Attributes:
        embedding: (rows, 1, width).
        modulations: of each block's first branch, (rows, 1, 3, width); empty where the conditioning takes part in it.
    """

    embedding: Tensor
    modulations: tuple[Tensor, ...]

    def row(self, index: int) -> Moment:
        """One of the rows, for all images."""
        return Moment(self.embedding[index : index + 1], tuple(part[index : index + 1] for part in self.modulations))


class Conditioned(NamedTuple):
    """What depends on the conditioning alone.

    Attributes:
        embedding: (rows, tokens, width).
        memories: keys, already rotated, and values of each block, (rows, tokens, heads, head size); empty without
            cross-attention.
    """

    embedding: Tensor
    memories: tuple[tuple[Tensor, Tensor], ...]

    def first(self, rows: int) -> Conditioned:
        """Of the first rows."""
        return Conditioned(self.embedding[:rows], tuple((key[:rows], value[:rows]) for key, value in self.memories))


class PlainFlowBlock(FlowARBlock):
    """Both branches modulated per token by time and conditioning together."""

    def __init__(self, config: FlowARBlocksConfig, condition_width: int) -> None:
        super().__init__(config, config.width, 0.0)

    def run(self, x: Tensor, moment: Moment, given: Conditioned, layer: int, rotation: Rotation) -> Tensor:
        """The block; ``layer`` is its place in the tables."""
        assert self.modulation is not None
        mixed = linear(self.modulation.linear, F.silu(moment.embedding + given.embedding))
        return self(x, mixed.unflatten(-1, (6, -1)), rotation=rotation)


class CrossFlowBlock(nn.Module):
    """x + gamma1 attention(RMS(x) (1 + scale1) + shift1), by time; x + cross-attention to the conditioning, ungated;
    then the feed-forward network modulated per token by time and conditioning. Chunks are in the order gamma, scale,
    shift.
    """

    def __init__(self, config: FlowARBlocksConfig, condition_width: int) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.scale = config.head_size**-0.5
        self.attention = RotaryAttention(config)
        self.time_modulation = Modulation(width, width, 3)
        self.cross_norm = RootMeanSquareNorm(width)
        self.memory_norm = RootMeanSquareNorm(condition_width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(condition_width, 2 * width, bias=False)
        self.projection = nn.Linear(width, width)
        self.token_modulation = nn.Linear(width, 3 * width)
        self.feed_forward = GatedFeedForward(width, round(width * config.mlp_ratio))
        self.norm = RootMeanSquareNorm(width, weighted=False)

    def remember(self, conditioning: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Keys and values: depend on the conditioning alone, so once per scale serves all steps."""
        projected = linear(self.key_value, self.memory_norm(conditioning))
        key, value = projected.unflatten(-1, (2, self.heads, -1)).unbind(2)
        return rotate(key, rotation), value

    def run(self, x: Tensor, moment: Moment, given: Conditioned, layer: int, rotation: Rotation) -> Tensor:
        """The block; ``layer`` is its place in the tables."""
        gamma, scale, shift = moment.modulations[layer].unbind(2)
        x = torch.addcmul(x, self.attention(torch.addcmul(shift, self.norm(x), 1 + scale), rotation=rotation), gamma)
        key, value = given.memories[layer]
        query = rotate(linear(self.query, self.cross_norm(x)).unflatten(-1, (self.heads, -1)), rotation)
        x = x + linear(self.projection, attend(query, key, value, self.scale).flatten(2))
        mixed = linear(self.token_modulation, F.silu(given.embedding + moment.embedding))
        gamma, scale, shift = mixed.chunk(3, dim=-1)
        return torch.addcmul(x, self.feed_forward(torch.addcmul(shift, self.norm(x), 1 + scale)), gamma)


class FlowNetwork(nn.Module):
    """The velocity of one scale's latents, all tokens together, given a time and the transformer's conditioning."""

    def __init__(self, config: FlowConfig, channels: int, condition_width: int) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.time_embedding = nn.Sequential(nn.Linear(2 * WAVES, width), nn.SiLU(), nn.Linear(width, width))
        self.condition_embedding = nn.Linear(condition_width, width)
        self.input_projection = nn.Linear(channels, width)
        kind = CrossFlowBlock if config.cross else PlainFlowBlock
        self.blocks = nn.ModuleList(kind(config.blocks, condition_width) for _ in range(config.depth))
        self.norm = RootMeanSquareNorm(width, weighted=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.output_projection = nn.Linear(width, channels)

    def fed(self, times: Tensor) -> Tensor:
        """The numbers that times in [0, 1] are embedded as: 1000 t, or the whole number below."""
        scaled = times.float() * 1000
        return scaled.long() if self.config.truncate_time else scaled

    def at(self, times: Float[Tensor, " rows"]) -> Moment:
        """What depends on times in [0, 1] alone: once per run serves all scales."""
        frequencies = torch.exp(
            -math.log(10_000) * torch.arange(WAVES, dtype=torch.float32, device=times.device) / WAVES
        )
        angles = self.fed(times)[:, None].float() * frequencies
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1)
        # A few rows, whose times lie close together; and of two biases with one gradient, both in half precision,
        # PyTorch 2.13's compiler makes C++ that does not compile.
        with torch.autocast(times.device.type, enabled=False):
            embedding = self.time_embedding(waves.to(self.input_projection.weight.dtype))[:, None]
        blocks = [block for block in self.blocks if isinstance(block, CrossFlowBlock)]
        return Moment(embedding, tuple(block.time_modulation(embedding[:, 0]) for block in blocks))

    def condition(self, conditioning: Float[Tensor, "rows tokens condition"], rotation: Rotation) -> Conditioned:
        """What depends on the conditioning alone: once per scale serves all steps."""
        blocks = [block for block in self.blocks if isinstance(block, CrossFlowBlock)]
        memories = tuple(block.remember(conditioning, rotation) for block in blocks)
        return Conditioned(linear(self.condition_embedding, conditioning), memories)

    def forward(
        self, x: Float[Tensor, "rows tokens channels"], moment: Moment, given: Conditioned, rotation: Rotation
    ) -> Float[Tensor, "rows tokens channels"]:
        """The velocity at ``x``.

        Args:
            moment: of one time per row, or of one for all rows.
            rotation: of the scale's tokens.
        """
        x = linear(self.input_projection, x)
        for layer, block in enumerate(cast("Sequence[PlainFlowBlock | CrossFlowBlock]", self.blocks)):
            x = block.run(x, moment, given, layer, rotation)
        shift, scale = linear(self.modulation, F.silu(given.embedding + moment.embedding)).chunk(2, dim=-1)
        return linear(self.output_projection, torch.addcmul(shift, self.norm(x), 1 + scale))


# --- drawing ------------------------------------------------------------------------------------------


def euler_times(steps: int) -> Float[Tensor, " points"]:
    """The times an ODE is solved at, float64, from 1 to 0: one more than there are steps.

    As published, half of them lie in [0.3, 1] and the rest in [0, 0.25]; 25 makes 24 steps of 25 points, and 50 are
    evenly spread. Odd numbers, of which the published rule loses one step, have it here (but for 25).

    Raises:
        ValueError: there is no step.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps were asked for; expected 1 or more")
    if steps in (1, 50):
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    late = steps // 2 + 1 + (steps % 2 if steps != 25 else 0)
    early = torch.linspace(1, 0.3, steps // 2, dtype=torch.float64)
    return torch.cat((early, torch.linspace(0.25, 0, late, dtype=torch.float64)))


class FlowEmitter:
    """Draws a scale's latents: noise that follows the network's velocity, in Euler steps.

    Where a scale's guidance weight w is above 1, from the time ``bound`` on the velocity is
    unconditional + w (conditional - unconditional), at the conditional image; before, and at other scales, it is the
    conditional one alone, and nothing is computed for the other branch.

    Args:
        steps: see :func:`euler_times`.
        bound: latest time with guidance, in [0, 1].

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(self, network: FlowNetwork, steps: int = 25, bound: float = 0.9) -> None:
        if not 0 <= bound <= 1:
            raise ValueError(f"guidance_bound is {bound}; expected a time from 0 to 1")
        self.network, self.bound, self.times = network, bound, euler_times(steps)
        with torch.inference_mode():
            # A row per step, for all scales and images.
            place = next(network.parameters()).device
            self._moments = network.at(self.times[:-1].float().to(place))

    def emit(self, context: ScaleContext) -> Emission:
        """Draw one scale; the emission's logits are the last step's velocity."""
        network, batch, hidden = self.network, context.batch, context.hidden
        weight = context.branches[0].weights[context.index]
        guided = len(context.branches) > 1 and weight > 1
        scale = ScaleSchedule((context.schedule[context.index],))
        rotation = rotation_of(scale, network.config.blocks.head_size, hidden.device)
        given = network.condition(hidden if guided else hidden[:batch], rotation)
        unguided = given.first(batch)
        shape = (batch, scale.length, network.input_projection.in_features)
        noise = context.draws.normal(shape, hidden.device, spare=len(hidden) - batch)
        # The sum of many small steps; Apple's GPUs have no double precision.
        x = noise.to(torch.float32 if noise.device.type == "mps" else torch.float64)
        velocity = torch.zeros_like(x)
        for index, (time, later) in enumerate(pairwise(self.times.tolist())):
            moment, at = self._moments.row(index), x.to(hidden.dtype)
            if guided and time <= self.bound:
                conditional, other = network(at.repeat(2, 1, 1), moment, given, rotation).to(x.dtype).chunk(2)
                velocity = other + weight * (conditional - other)
            else:
                velocity = network(at, moment, unguided, rotation).to(x.dtype)
            x = x + (later - time) * velocity
        latents = x.float()
        return Emission(latents, latents, velocity.float())
