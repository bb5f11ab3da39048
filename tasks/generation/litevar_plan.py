"""What a compressed model saves: windows, precision, sharing and cache, in a few kilobytes of its own."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.core.checkpoint import CheckpointError, read_folder, save_folder
from nextscale.core.config import from_json, to_json
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.litevar_attention import Form
from nextscale.tasks.generation.litevar_search import TileKeys
from nextscale.tasks.generation.litevar_windows import ALL, Window, tile_size, visible_mask

SYSTEM = "litevar-plan"

TileBias = dict[int, Float[Tensor, "blocks heads tiles keys"]]
"""For each late scale: what is added to the scores of the keys that a tile's queries see; 0 of the others."""

Offsets = dict[int, Float[Tensor, "blocks heads queries size"]]
"""For each late scale: what is added to what its queries take from their keys."""


@dataclass(frozen=True)
class LiteConfig:
    """What a model saves, but for its windows.

    Attributes:
        schedule: the scales that the windows belong to.
        precision: bits of the weights of each linear layer that is named: 4, 8, or 16 for as they are.
        activation_bits: 8 multiplies layers of 8-bit weights with inputs rounded to 8 bits, 16 with inputs as they are.
        cache_bits: of a stored key or value: 8, or 16 for as computed.
        share_from: the first scale at which guidance branches use the first branch's attention; None: they never do.
        form: what keys outside of a window are.
        temperatures: by which logits of each scale are divided in drawing; None: by none. Guidance multiplies what the
            branches differ by, and with it what windows change in them: without this, draws are too sure.
        fingerprint: of the model that was calibrated; None: the plan is for any.
        measured: what calibration found.
        tile: neighbouring queries that share their keys; None: half a row of each map.
        attention: False: attention and cache stay the model's own, whatever is said of them above.
    """

    schedule: ScaleSchedule
    precision: dict[str, int] = field(default_factory=dict)
    activation_bits: int = 16
    cache_bits: int = 8
    share_from: int | None = 0
    form: Form = "absent"
    temperatures: tuple[float, ...] | None = None
    fingerprint: str | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    tile: int | None = None
    attention: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (
            ("activation_bits", (8, 16)),
            ("cache_bits", (8, 16)),
            ("form", ("absent", "logits", "probabilities")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {allowed}")
        if self.temperatures is not None and (
            len(self.temperatures) != len(self.schedule) or min(self.temperatures) <= 0
        ):
            raise ValueError(f"temperatures {self.temperatures} are not one above 0 for each of '{self.schedule}'")
        if wrong := [f"{name}: {bits}" for name, bits in self.precision.items() if bits not in (4, 8, 16)]:
            raise ValueError(f"{wrong[0]} bits; weights take 4, 8 or 16")


@dataclass(frozen=True)
class LitePlan:
    """What a model saves.

    Attributes:
        widths: of the window of each block, head, query scale and key scale, as published; what lies above the diagonal
            of scales has no meaning.
        keys: in place of widths: for each late scale, the keys that the tiles of its queries see.
        bias: with keys, added to their scores: the logarithm of how much each counts, standing in for those left out
            (:mod:`nextscale.tasks.generation.litevar_stand_ins`); None: each as one.
        offsets: with keys, for each late scale what is added to what the heads take from them; None: nothing.
            The published forms have neither.
    """

    config: LiteConfig
    widths: Int[Tensor, "blocks heads scales scales"] | None = None
    keys: TileKeys | None = None
    bias: TileBias | None = None
    offsets: Offsets | None = None

    def save(self, folder: str | Path) -> Path:
        """Write the plan: windows as safetensors (keys as bits, bias of those that are kept), all else as JSON."""
        state = {} if self.widths is None else {"widths": self.widths.to(torch.int16)}
        for index, kept in (self.keys or {}).items():
            state[f"keys.{index}"] = torch.from_numpy(np.packbits(kept.numpy(), axis=-1))
            if self.bias is not None:
                state[f"bias.{index}"] = self.bias[index][kept]
            if self.offsets is not None:
                state[f"offsets.{index}"] = self.offsets[index]
        return save_folder(folder, state, {"system": SYSTEM, "config": to_json(self.config)})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> LitePlan:
        """What :meth:`save` wrote.

        Raises:
            CheckpointError: the folder holds no plan, or a damaged one.
        """
        state, content = read_folder(Path(folder))
        if content.get("system") != SYSTEM:
            raise CheckpointError(
                f"{folder} holds a saved {content.get('system')!r}, expected the plan that `nextscale calibrate` writes"
            )
        config = from_json(LiteConfig, content["config"])
        schedule = config.schedule
        widths, keys = state.get("widths"), dict[int, Tensor]()
        if widths is not None and (widths.ndim != 4 or widths.shape[2:] != (len(schedule), len(schedule))):
            raise CheckpointError(f"{folder}: widths of shape {tuple(widths.shape)} do not fit the scales '{schedule}'")
        for name, bits in state.items():
            if name.startswith("keys."):
                index = int(name.removeprefix("keys."))
                stop, tiles = (
                    schedule.ranges[index][1],
                    -(-schedule.lengths[index] // tile_size(schedule, index, config.tile)),
                )
                if bits.shape[2:] != (tiles, -(-stop // 8)) or bits.dtype != torch.uint8:
                    raise CheckpointError(f"{folder}: {name} of shape {tuple(bits.shape)} does not fit '{schedule}'")
                keys[index] = torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=stop)).bool()
        bias, offsets = dict[int, Tensor](), dict[int, Tensor]()
        for index, kept in keys.items():
            counted, offset = state.get(f"bias.{index}"), state.get(f"offsets.{index}")
            if counted is not None:
                if counted.shape != (int(kept.sum()),):
                    raise CheckpointError(f"{folder}: bias.{index} of shape {tuple(counted.shape)} is not of its keys")
                bias[index] = counted.new_zeros(kept.shape).masked_scatter(kept, counted)
            if offset is not None:
                if offset.ndim != 4 or offset.shape[:3] != (*kept.shape[:2], schedule.lengths[index]):
                    raise CheckpointError(f"{folder}: offsets.{index} of shape {tuple(offset.shape)} do not fit")
                offsets[index] = offset
        return cls(config, widths, keys or None, bias or None, offsets or None)

    @property
    def sizes(self) -> tuple[int, int] | None:
        """Blocks and heads that the windows are for; None without windows."""
        given = [*(self.keys or {}).values(), *([] if self.widths is None else [self.widths])]
        return (given[0].shape[0], given[0].shape[1]) if given else None

    def windows(self, block: int) -> list[Window | None]:
        """One block's windows, scale by scale; empty where there are none."""
        if self.sizes is None:
            return []
        return [self._window(block, index) for index in range(len(self.config.schedule))]

    def _window(self, block: int, index: int) -> Window | None:
        schedule, exact = self.config.schedule, self.config.form != "absent"
        queries, tile = schedule.lengths[index], tile_size(schedule, index, self.config.tile)
        if self.keys is not None:
            if index not in self.keys:
                return None
            kept = self.keys[index][block]
            if not exact:
                bias = None if self.bias is None else self.bias[index][block]
                offset = None if self.offsets is None else self.offsets[index][block]
                return Window.from_tiles(kept, queries, tile, bias, offset)
            mask = kept.repeat_interleave(tile, dim=1)[:, :queries]
        else:
            assert self.widths is not None
            widths = self.widths[block, :, index]
            if bool((widths[:, : index + 1] == ALL).all()):
                return None
            mask = visible_mask(schedule, index, widths)
        if not bool(mask.any(2).all()):
            raise ValueError(f"the windows of block {block} leave queries of scale {index} without any key")
        return Window.from_mask(mask, tile, exact)
