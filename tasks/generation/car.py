"""CAR: a picture that controls every scale of a frozen VAR.

Yao et al. 2024, "CAR: Controllable Autoregressive Modeling for Visual Generation" (arXiv 2410.04671); official
code and weights MiracleDance/CAR. A convolutional encoder turns the control picture, resized for every scale,
into one feature map per scale; half as many blocks as the base has process the maps together with the token
maps; their outputs enter the second half of the base, the last one first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.cache import KeyValueCache
from nextscale.core.checkpoint import CheckpointError, assign, save_folder, weightless
from nextscale.core.config import from_json, to_json
from nextscale.core.heads import CategoricalEmitter
from nextscale.core.random import Draws
from nextscale.core.sampling import Accepted, Control, ScaleStep, classifier_free, sample
from nextscale.core.schedule import ScaleSchedule, Segment
from nextscale.core.transformer import Block
from nextscale.tasks.generation.car_files import (
    KEYS,
    AdapterSizes,
    adapter_sizes,
    check_official,
    check_sizes,
    encoder_widths,
    fingerprint,
    is_official,
    split_official,
)
from nextscale.tasks.generation.car_parts import CARConfig, ControlEncoder, ControlFeatures, Skip, distinct
from nextscale.tasks.generation.car_session import Controlled
from nextscale.tasks.generation.class_conditional import ClassConditional, Condition
from nextscale.tasks.generation.controls import Extraction
from nextscale.tasks.generation.controls_resize import pyramid
from nextscale.tasks.generation.official_layout import from_layout, to_layout
from nextscale.tasks.generation.var import VAR
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ

__all__ = ["CAR", "CARConfig", "is_official"]

SYSTEM = "car"


class CAR(ClassConditional):
    """A frozen VAR and the adapter that controls it.

    Only the adapter has parameters that train, and only it is saved.

    Attributes:
        base: the VAR.
        base_name: where the base comes from, a name or a path, for :meth:`save` to record; None: not known.
        home: the folder the adapter was loaded from, to which the base's path is relative.
    """

    def __init__(self, config: CARConfig, base: VAR, base_name: str | None = None) -> None:
        super().__init__()
        check_sizes(config.base, base)
        transformer = config.base.transformer
        if base.tokenizer.stride != 2 ** (len(config.widths) - 1):
            raise ValueError(
                f"a control encoder of {len(config.widths)} widths makes one token of {2 ** (len(config.widths) - 1)} "
                f"pixels, the base's tokenizer of {base.tokenizer.stride}; give "
                f"{(base.tokenizer.stride - 1).bit_length() + 1} widths"
            )
        self.config, self.base_name = config, base_name
        self.home: Path | None = None
        self.base = base.requires_grad_(False)
        width, half = transformer.width, transformer.depth // 2
        self.control_encoder = ControlEncoder(config.widths, width)
        self.token_conv = nn.Conv2d(width, width, 3, padding=1)
        # The same ramp of stochastic depth as the base's first half.
        rates = [block.drop_probability for block in base.transformer.blocks[:half]]
        modules = nn.ModuleList(Block(transformer, width, rate) for rate in rates)
        self.control_blocks = cast("Sequence[Block]", modules)
        skips = nn.ModuleList(Skip(width) for _ in range(half))
        self.skips = cast("Sequence[Skip]", skips)

    @property
    def tokenizer(self) -> ResidualVQ:
        """The base's."""
        return self.base.tokenizer

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def official_name(self) -> str:
        """What the published file of such an adapter is called."""
        return f"car_{self.config.control_type or 'control'}_d{self.config.base.transformer.depth}.pth"

    @property
    def parts(self) -> dict[str, Any]:
        """The adapter, and what it builds on."""
        return {"adapter": self, **self.base.parts}

    # --- the controlled network --------------------------------------------------------------------------

    def pyramid(self, control: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
        """A control picture in [0, 1], of any size, at every scale's size, in [-1, 1]."""
        grids = [scale.grid for scale in self.config.schedule.scales]
        return pyramid(control.to(self.device), grids, self.tokenizer.stride)

    def features(self, control: Float[Tensor, "batch 3 height width"]) -> ControlFeatures:
        """The control encoder's maps; equal pictures are encoded once.

        Args:
            control: in [0, 1], of any size.

        Raises:
            ValueError: not a batch of pictures with three channels.
        """
        if control.ndim != 4 or control.shape[1] != 3 or not len(control):
            raise ValueError(f"the control is {tuple(control.shape)}, expected (n or 1, 3, height, width) in [0, 1]")
        kept, rows = distinct(control)
        maps = self.encode(self.pyramid(control[kept].float())).maps
        return ControlFeatures(maps, None if len(kept) == len(rows) else torch.tensor(rows, device=self.device))

    def encode(self, scales: Sequence[Float[Tensor, "batch 3 height width"]]) -> ControlFeatures:
        """The same of a :meth:`pyramid`, every picture by itself."""
        return ControlFeatures([self.control_encoder(scale.to(self.dtype)) for scale in scales])

    def streams(
        self,
        inputs: Tensor | None,
        condition: Tensor,
        features: ControlFeatures,
        schedule: ScaleSchedule,
        first: int,
        last: int,
    ) -> tuple[Tensor, Tensor]:
        """What enters the base and the control blocks at some scales, (rows, positions, width) each.

        Args:
            inputs: of the scales from ``max(first, 1)`` to ``last``, one row per image; None: there are none.
            condition: class vectors, branch by branch.
        """
        base, rows = self.base, len(condition)
        tokens: list[Tensor] = []
        controlled: list[Tensor] = []
        if first == 0:
            # The class is in the first scale's tokens: every branch has its own, while all later ones are alike.
            start = base.start_position + condition[:, None]
            tokens.append(start)
            controlled.append(self._join(start, [features.at(0, rows)]))
        if last > 0:
            assert inputs is not None
            words = base.word_embedding(inputs.to(self.dtype))
            maps = [features.at(index, len(words)) for index in range(max(first, 1), last + 1)]
            for parts, part in ((tokens, words), (controlled, self._join(words, maps))):
                parts.append(part.repeat(rows // len(words), 1, 1))
        place = base.place(schedule, schedule.ranges[first][0], schedule.ranges[last][1])
        return torch.cat(tokens, dim=1) + place, torch.cat(controlled, dim=1) + place

    def _join(self, tokens: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Token maps, convolved, plus the control's maps of the same scales."""
        grids = [part.shape[-2:] for part in maps]
        parts = tokens.split([height * width for height, width in grids], dim=1)
        joined = [
            self.token_conv(part.mT.unflatten(-1, grid)) + control
            for part, grid, control in zip(parts, grids, maps, strict=True)
        ]
        return torch.cat([part.flatten(2).mT for part in joined], dim=1)

    def modulate(self, condition: Float[Tensor, "batch width"]) -> list[Float[Tensor, "batch 1 6 width"]]:
        """Modulations of the control blocks, then of the base's, all by the class vector."""
        stack = self.base.transformer
        shared = stack.shared_modulation(condition) if stack.shared_modulation is not None else None
        return [block.modulate(condition, shared) for block in (*self.control_blocks, *stack.blocks)]

    def run(
        self,
        x: Tensor,
        control: Tensor,
        modulations: Sequence[Tensor],
        strength: float = 1.0,
        segments: Sequence[Segment] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch positions width"]:
        """The control blocks, then the base's with their outputs, the last one first.

        Args:
            modulations: from :meth:`modulate`.
            cache: with a layer for every control block, and then one for every block of the base.
        """
        stack, half, outputs = self.base.transformer, len(self.skips), list[Tensor]()
        for layer, (block, modulation) in enumerate(
            zip((*self.control_blocks, *stack.blocks), modulations, strict=True)
        ):
            if layer < half:
                control = stack.run_block(block, control, modulation, segments, cache, layer)
                outputs.append(control)
                continue
            if layer >= 2 * half:
                x = self.skips[layer - 2 * half](x, outputs.pop(), strength)
            x = stack.run_block(block, x, modulation, segments, cache, layer)
        return x

    def forward(
        self,
        inputs: Float[Tensor, "batch rest channels"],
        labels: Int[Tensor, " batch"],
        control: Sequence[Float[Tensor, "batch 3 height width"]] | ControlFeatures,
        schedule: ScaleSchedule | None = None,
        strength: float = 1.0,
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Logits of all scales at once.

        Args:
            inputs: the quantiser's ``teacher_inputs``: of scales 1, 2, ….
            labels: 0 to ``classes``; ``classes`` is "no class".
            control: the control's :meth:`pyramid`, or its :meth:`features`.
            schedule: a prefix of the base's list; the whole list by default.
        """
        schedule, base = schedule or self.config.schedule, self.base
        with torch.autocast(inputs.device.type, enabled=False):
            condition = base.class_embedding(labels)
            features = control if isinstance(control, ControlFeatures) else self.encode(control)
            x, y = self.streams(inputs, condition, features, schedule, 0, len(schedule) - 1)
        x = self.run(x, y, self.modulate(condition), strength, schedule.segments)
        return base.head(x, base.head.modulate(condition))

    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """The next-scale cross-entropy of a batch under its controls, and what to log.

        Args:
            batch: as for VAR, and ``control`` (batch, 3, height, width) in [-1, 1].
        """
        from nextscale.tasks.generation.car_training import CARTraining

        batch = {"uniform": torch.rand(len(batch["label"]), device=self.device), **batch}
        return CARTraining(self).loss(SYSTEM, self, batch, step=0)

    # --- sampling ----------------------------------------------------------------------------------------

    def generate(
        self,
        condition: Condition = None,
        n: int | None = None,
        seed: int | Sequence[int] = 0,
        *,
        control: Float[Tensor, "n 3 height width"] | None = None,
        control_type: str | None = None,
        strength: float = 1.0,
        **options: Any,
    ) -> Float[Tensor, "n 3 height width"]:
        """Images in [0, 1], on the CPU; see :meth:`ClassConditional.generate` for what is not named here.

        Args:
            control: one picture for all images, or one each, in [0, 1], of any size; None: the base alone.
            n: None: as many as there are control pictures or conditions, whichever is more.
            control_type: what the control shows, to be sure: refused where the adapter was made for another.
            strength: how much the control counts: 1 as published, 0 the base alone. Between, each skip's input to
                the base is mixed with what the base itself has there.

        Raises:
            ValueError: the control is of another type, or its number of pictures is neither 1 nor ``n``.
        """
        own = self.config.control_type
        if control_type is not None and own not in (None, control_type):
            raise ValueError(f"this adapter follows {own} controls, not {control_type}")
        if control is None or strength == 0:
            return super().generate(condition, n, seed, **options)
        control = control[None] if control.ndim == 3 else control
        if n is None:
            given = 1 if condition is None or isinstance(condition, int | str) else len(condition)
            n = max(given, len(control))
        if len(control) not in (1, n):
            raise ValueError(f"{len(control)} control pictures were given for {n} images; give one, or {n}")
        with torch.inference_mode():
            shared: Any = self.features(control) if len(control) == 1 else control
        return super().generate(condition, n, seed, control=shared, strength=strength, **options)

    def steps(
        self,
        labels: Int[Tensor, " batch"],
        *,
        draws: Draws,
        emitter: CategoricalEmitter | None = None,
        guidance: float | None = None,
        controls: Sequence[Control] = (),
        accepted: Accepted | None = None,
        stop: int | None = None,
        control: Float[Tensor, "batch 3 height width"] | ControlFeatures | None = None,
        strength: float = 1.0,
    ) -> Iterator[ScaleStep]:
        """Sample, scale by scale: the lower-level form of :meth:`generate`.

        Args:
            control: one picture, or one per image, in [0, 1], or their :meth:`features`; None: the base alone.
        """
        guidance = self.config.guidance if guidance is None else guidance
        given: dict[str, Any] = {"draws": draws, "emitter": emitter, "guidance": guidance, "controls": controls}
        if control is None or strength == 0:
            return self.base.steps(labels, **given, accepted=accepted, stop=stop)
        schedule, quantizer = self.config.schedule, self.tokenizer.quantizer
        branches = classifier_free(labels, torch.full_like(labels, self.config.classes), guidance, schedule)
        with torch.inference_mode():
            features = control if isinstance(control, ControlFeatures) else self.features(control)
        network = Controlled(self, features, strength)
        emitter = emitter or CategoricalEmitter()
        return sample(network, quantizer, schedule, branches, emitter, draws, controls, accepted, stop)

    # --- files -------------------------------------------------------------------------------------------

    def adapter(self) -> dict[str, Tensor]:
        """The state dict without the base."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("base.")}

    def save(self, folder: str | Path) -> Path:
        """Write the adapter, ``model.safetensors`` and ``config.json``, which records the base by place and digest."""
        place = self.base_name or f"var-d{self.config.base.transformer.depth}"
        if (path := (self.home or Path()) / place).exists():
            place = os.path.relpath(path, folder)
        about = {"system": SYSTEM, "config": to_json(self.config), "base": fingerprint(self.base)}
        return save_folder(folder, self.adapter(), {**about, "needs": {"base": place}})

    @classmethod
    def from_saved(cls, state: Mapping[str, Tensor], config: Mapping[str, Any], base: VAR) -> CAR:
        """From the content of a folder written by :meth:`save`, and its base, which becomes as precise as the adapter.

        Raises:
            CheckpointError: the base is another model than the adapter was trained on.
        """
        settings = from_json(CARConfig, config["config"])
        check_sizes(settings.base, base)
        name = config["needs"]["base"]
        if config["base"] != fingerprint(base):
            raise CheckpointError(
                f"the adapter was trained on another base ({name}, with digest {config['base']}; this one has "
                f"{fingerprint(base)}); give that VAR as base"
            )
        return cls._assembled(settings, base, state, name)

    @classmethod
    def _assembled(cls, config: CARConfig, base: VAR, adapter: Mapping[str, Tensor], name: str | None) -> CAR:
        precise = torch.promote_types(base.dtype, adapter["token_conv.weight"].dtype)
        if base.dtype != precise:
            base.to(precise)
        adapter = {key: value.to(precise) for key, value in adapter.items()}
        with weightless():
            model = cls(config, base, name)
        assign(model, {f"base.{k}": v for k, v in base.state_dict().items()} | dict(adapter), "CAR")
        return model.eval()

    def to_official(self) -> dict[str, Tensor]:
        """The adapter's official state dict, without the base; the official loader joins the two."""
        return to_layout(KEYS, self.adapter())

    @classmethod
    def read_official(cls, content: Mapping[str, Any]) -> tuple[AdapterSizes, dict[str, Tensor]]:
        """What an official file's content tells of the adapter, and its weights."""
        adapter, _ = split_official(content)
        return adapter_sizes(adapter), adapter

    @classmethod
    def from_official(cls, content: Mapping[str, Any], base: VAR, **overrides: Any) -> CAR:
        """Build from an official file's content and its base; the encoder's widths are read from the shapes.

        Args:
            content: an adapter, or a training snapshot, whose copy of the base must then be the same.
            overrides: what a file cannot tell: ``control_type``, ``label_drop``, ``guidance``.

        Raises:
            CheckpointError: the content is no CAR, or does not belong to the base.
        """
        adapter, copy = split_official(content)
        check_official(adapter, copy, base)
        given = {name: value for name, value in overrides.items() if value is not None}
        kind = given.pop("control_type", None)
        config = CARConfig(base.config, encoder_widths(adapter), Extraction(kind) if kind else None, **given)
        return cls._assembled(config, base, from_layout(KEYS, adapter), None)
