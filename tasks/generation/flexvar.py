"""FlexVAR: class-conditional images of any size, shape and number of steps, each scale a whole image of its own.

Jiao et al. 2025, "FlexVAR: Flexible Visual Autoregressive Modeling without Residual Prediction" (arXiv 2502.20313,
NeurIPS); official code and weights jiaosiyu1999/FlexVAR. The transformer is VAR's, but for its positions: one map,
averaged to every grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.attention import Visibility, visibility_bias
from nextscale.core.checkpoint import CheckpointError, find_state_dict
from nextscale.core.heads import CategoricalEmitter
from nextscale.core.random import Draws
from nextscale.core.sampling import (
    Accepted,
    Branch,
    Control,
    Emission,
    ScaleContext,
    ScaleStep,
    classifier_free,
    sample,
    strength_of_each,
)
from nextscale.core.schedule import Scale, ScaleSchedule
from nextscale.core.training import TrainingTask
from nextscale.datasets.imagenet import IMAGENET
from nextscale.tasks.generation.flexvar_lists import PUBLISHED, list_for
from nextscale.tasks.generation.official_layout import transformer_config
from nextscale.tasks.generation.var import NESTED, VAR, VARConfig, VARSession
from nextscale.tasks.tokenizers.flex_vq import FlexQuantizerConfig, FlexVQ

SYSTEM = "flexvar"
GuidanceForm = Literal["var", "llamagen"]
RAMP = 9
"""Scale from which the official guidance has its full strength; later ones exceed it."""


@dataclass(frozen=True)
class OfficialSampling:
    """What the official sampler does beside drawing; the published figures hang on it.

    Guidance grows to its strength by the tenth scale and beyond it after that. Sides above ``max_side`` have the plain
    strength, and take the likeliest code instead of drawing one; so do sides that are not among ``drawn_sides`` (7, 9,
    11, 12 and 14 in the published lists).
    """

    max_side: int = 16
    drawn_sides: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 23, 24, 32)

    def greedy(self, scale: Scale) -> bool:
        """Whether a scale takes the likeliest codes."""
        side = max(scale.grid)
        return side > self.max_side or side not in self.drawn_sides

    def growth(self, schedule: ScaleSchedule) -> list[float]:
        """What the strength of guidance is multiplied by at each scale."""
        ramp = max(min(len(schedule) - 1, RAMP), 1)
        return [1.0 if max(scale.grid) > self.max_side else index / ramp for index, scale in enumerate(schedule.scales)]


@dataclass(frozen=True)
class FlexVARConfig(VARConfig):
    """Attributes:

    schedule: scales in sampling where none are given; any others may be.
    position_side: of the map that positions are averaged from.
    guidance_form: ``"var"``: (1 + t) conditional - t unconditional, t growing with the scale; ``"llamagen"``:
        unconditional + strength (conditional - unconditional) at every scale.
    official_sampling: the official sampler's rules; None: draw at every scale, guidance growing to its strength at the
        last.
    """

    vocabulary: int = FlexQuantizerConfig.vocabulary
    schedule: ScaleSchedule = PUBLISHED["10"]
    guidance: float = 2.5
    position_side: int = 32
    guidance_form: GuidanceForm = "var"
    official_sampling: OfficialSampling | None = None


PRESETS: dict[str, FlexVARConfig] = {
    f"flexvar-d{depth}": FlexVARConfig.of_depth(depth, class_names=IMAGENET, official_sampling=OfficialSampling())
    for depth in (16, 20, 24)
}
"""Released models, by name."""


class FlexVAR(VAR):
    """The transformer over maps of any sizes, together with the tokenizer that makes and draws them.

    ``generate`` takes what ``steps`` takes: ``schedule``, ``guidance_form`` and ``invalid_ids``.
    """

    system = SYSTEM
    config_class = FlexVARConfig
    tokenizer_class = FlexVQ
    config: FlexVARConfig
    uncompiled = ("_entered",)  # lists change from step to step: one graph serves all

    def make_places(self) -> None:
        config, width = self.config, self.config.transformer.width
        self.start_position = nn.Parameter(torch.empty(1, config.schedule.lengths[0], width))
        self.position_embedding = nn.Parameter(torch.empty(1, width, config.position_side, config.position_side))
        self._placed: tuple[Any, Tensor] | None = None

    def place(self, schedule: ScaleSchedule, start: int, stop: int) -> Float[Tensor, "1 positions width"]:
        """The position map averaged to each grid, for the flat positions [start, stop)."""
        return self.positions(schedule)[:, start:stop]

    def positions(self, schedule: ScaleSchedule) -> Float[Tensor, "1 length width"]:
        """The position map on the grids of a list; kept while neither list nor map changes, and no gradient is asked.

        Grids finer than the map repeat its values.
        """
        table = self.position_embedding
        if torch.is_grad_enabled() and table.requires_grad:
            return averaged(table, schedule)
        key = (schedule, table.data_ptr(), table._version, table.dtype, table.device)
        if self._placed is None or self._placed[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._placed = key, averaged(table, schedule)
        return self._placed[1]

    # --- teacher forcing ---------------------------------------------------------------------------------

    def forward(
        self,
        inputs: Float[Tensor, "batch rest channels"],
        labels: Int[Tensor, " batch"],
        schedule: ScaleSchedule | None = None,
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Logits of all scales at once.

        Args:
            inputs: the tokenizer's ``teacher_inputs``: of scales 1, 2, ….
            labels: 0 to ``classes``; ``classes`` is "no class".
            schedule: any that begins with as many tokens as the model's; the model's own by default.
        """
        x, condition, visible = self._entered(inputs, labels, schedule)
        x = self.transformer(x, self.transformer.modulate(condition), visible)
        return self.head(x, self.head.modulate(condition))

    def _entered(
        self, inputs: Tensor, labels: Tensor, schedule: ScaleSchedule | None
    ) -> tuple[Tensor, Tensor, Visibility]:
        """What depends on the list."""
        schedule = schedule or self.config.schedule
        self._check(schedule)
        x, condition = self.enter(inputs, labels, schedule)
        return x, condition, visibility_bias(schedule.segments).to(x.device) if self.training else schedule.segments

    def training_task(self) -> TrainingTask:
        from nextscale.tasks.generation.flexvar_training import FlexVARTraining

        return FlexVARTraining(self)

    # --- sampling ----------------------------------------------------------------------------------------

    def start(self, conditions: Int[Tensor, " rows"], schedule: ScaleSchedule) -> VARSession:
        self._check(schedule)
        return VARSession(self, conditions, schedule)

    def _check(self, schedule: ScaleSchedule) -> None:
        first = self.start_position.shape[1]
        if schedule.lengths[0] != first or any(scale.planes * scale.streams > 1 for scale in schedule.scales):
            raise ValueError(
                f"the list '{schedule}' does not suit: it must begin with '{self.config.schedule[0]}', and its scales "
                "are heights and widths, such as '1 2 4x6'"
            )

    def schedule_for(self, size: tuple[int, int] | None = None, steps: int | None = None) -> ScaleSchedule:
        """A list that leads to images of a size in so many steps.

        Args:
            size: (height, width) in pixels; None: that of the model's own list.
            steps: None: as many as the model's own list has, or fewer where the size has no room for them.

        Raises:
            ValueError: the size is no multiple of the tokenizer's stride, or has no room for so many steps.
        """
        own, stride = self.config.schedule, self.tokenizer.stride
        height, width = size or self.tokenizer.image_size(own)
        if height % stride or width % stride or min(height, width) < stride:
            raise ValueError(f"images of {height} x {width} pixels are not possible: sides are multiples of {stride}")
        grid = height // stride, width // stride
        if steps is None:
            steps = min(len(own), max(grid))
            if grid == own.final.grid:
                return own
        return list_for(grid, steps)

    def steps(
        self,
        labels: Int[Tensor, " batch"],
        *,
        draws: Draws,
        emitter: CategoricalEmitter | None = None,
        guidance: float | Sequence[float] | None = None,
        controls: Sequence[Control] = (),
        accepted: Accepted | None = None,
        stop: int | None = None,
        schedule: ScaleSchedule | str | None = None,
        guidance_form: GuidanceForm | None = None,
        invalid_ids: Sequence[int] = (),
    ) -> Iterator[ScaleStep]:
        """Sample, scale by scale: the lower-level form of :meth:`generate`.

        Args:
            labels: one class per image; ``classes`` is "no class".
            guidance: strength, one number or one per scale; None: the configuration's.
            guidance_form: the formula (:class:`FlexVARConfig`); None: the configuration's.
            accepted, stop: begin later or end earlier (:func:`nextscale.core.sampling.sample`).
            schedule: the scales to draw; None: the configuration's.
            invalid_ids: codes that are not drawn.
        """
        schedule = ScaleSchedule.parse(schedule or self.config.schedule)
        strength = self.config.guidance if guidance is None else guidance
        branches = self.branches(labels, strength, schedule, guidance_form or self.config.guidance_form)
        emitter = self.emitter(emitter or CategoricalEmitter(), schedule, invalid_ids)
        return sample(self, self.tokenizer.quantizer, schedule, branches, emitter, draws, controls, accepted, stop)

    def branches(
        self,
        labels: Int[Tensor, " batch"],
        strength: float | Sequence[float],
        schedule: ScaleSchedule,
        form: GuidanceForm,
    ) -> list[Branch]:
        """The conditional and the unconditional pass, and how much each counts at each scale.

        Raises:
            ValueError: there is no such formula, or there is not one strength for each scale.
        """
        unconditional = torch.full_like(labels, self.config.classes)
        if form not in ("var", "llamagen"):
            raise ValueError(f"guidance_form is {form!r}; expected var or llamagen")
        official = self.config.official_sampling
        if form == "var" and official is None:
            return classifier_free(labels, unconditional, strength, schedule)
        strengths = strength_of_each(strength, schedule)
        if form == "llamagen":
            weights = [(each, 1 - each) for each in strengths]
        else:
            assert official is not None
            grown = [each * factor for each, factor in zip(strengths, official.growth(schedule), strict=True)]
            weights = [(1 + t, -t) for t in grown]
        parts = zip((labels, unconditional), zip(*weights, strict=True), strict=True)
        return [Branch(condition, part) for condition, part in parts if any(part)]

    def emitter(
        self, emitter: CategoricalEmitter, schedule: ScaleSchedule, invalid_ids: Sequence[int] = ()
    ) -> CategoricalEmitter:
        """The emitter with what the configuration and ``invalid_ids`` add to it.

        Raises:
            ValueError: there is no such code.
        """
        for code in invalid_ids:
            if not 0 <= code < self.config.vocabulary:
                raise ValueError(f"invalid_ids has {code}; codes are 0 to {self.config.vocabulary - 1}")
        official = self.config.official_sampling
        if official is not None:
            top_k = emitter.top_k if isinstance(emitter.top_k, Sequence) else (emitter.top_k,) * len(schedule)
            pairs = zip(schedule.scales, top_k, strict=True)
            emitter = replace(emitter, top_k=tuple(1 if official.greedy(scale) else k for scale, k in pairs))
        if not invalid_ids:
            return emitter
        return WithoutCodes(emitter.top_k, emitter.top_p, emitter.temperature, emitter.smooth, tuple(invalid_ids))

    # --- the official checkpoint -------------------------------------------------------------------------

    def to_official(self) -> dict[str, Tensor]:
        """The transformer's official state dict; loads strictly into the official code."""
        state = super().to_official()
        del state["lvl_1L"]  # it has no levels
        return state

    @property
    def official_name(self) -> str:
        """The file name that the official repository gives such a model, but for the epoch."""
        return f"FlexVARd{self.config.transformer.depth}.pth"

    @classmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[FlexVARConfig, dict[str, Tensor]]:
        """Configuration and flat state dict in an official file's content; overrides as for :meth:`from_official`."""
        state = find_state_dict(content, NESTED, "pos_1LC")
        return config_from_official(state, **overrides), state


@dataclass(frozen=True)
class WithoutCodes(CategoricalEmitter):
    """Draws from guided logits in which some codes are as good as impossible (the official ``invalid_ids``)."""

    invalid: tuple[int, ...] = ()

    def emit(self, context: ScaleContext) -> Emission:
        logits = context.guided_logits()
        logits = logits.index_fill(-1, torch.tensor(self.invalid, device=logits.device), -100.0)
        tokens, codes = self.draw(logits, context.pyramid.vectors, context.draws, context.index, context.ratio)
        return Emission(tokens, codes, logits)


def averaged(table: Float[Tensor, "1 width high wide"], schedule: ScaleSchedule) -> Float[Tensor, "1 length width"]:
    """A position map on every grid of a list, one after another."""
    maps = [F.interpolate(table, size=scale.grid, mode="area").flatten(2) for scale in schedule.scales]
    return torch.cat(maps, dim=2).mT


def waves(width: int, side: int) -> Float[Tensor, "1 width side side"]:
    """The position map before training: sines of the row in even channels, cosines of the column in odd ones.

    PE[row, column, 2 m] = sin(row w_m), PE[row, column, 2 m + 1] = cos(column w_m), w_m = 10000^(-2 m / width).
    """
    places = torch.arange(side, dtype=torch.float32)[:, None]
    angles = places * (1 / 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    rows = angles.sin()[:, None].expand(-1, side, -1)
    columns = angles.cos()[None].expand(side, -1, -1)
    return torch.stack((rows, columns), dim=-1).flatten(2)[:, :, :width].permute(2, 0, 1)[None].contiguous()


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is a FlexVAR transformer, in the official layout."""
    try:
        state = find_state_dict(content, NESTED, "pos_1LC")
    except CheckpointError:
        return False
    needed = {"class_emb.weight", "word_embed.weight", "head_nm.ada_lin.1.weight"}
    return state["pos_1LC"].ndim == 4 and needed <= set(state)


def config_from_official(state: Mapping[str, Tensor], **overrides: Any) -> FlexVARConfig:
    """The configuration that an official state dict's keys and shapes imply; the official sampler's rules are on.

    Raises:
        CheckpointError: an entry that sizes are read from is missing.
    """
    transformer = transformer_config(state, heads=overrides.get("heads"), norm_eps=overrides.get("norm_eps"))
    try:
        code_channels, side = state["word_embed.weight"].shape[1], state["pos_1LC"].shape[-1]
        classes, vocabulary = state["class_emb.weight"].shape[0] - 1, state["head.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(f"the state dict lacks an entry of FlexVAR: {error}") from None
    return FlexVARConfig(
        transformer,
        classes,
        vocabulary,
        code_channels,
        ScaleSchedule.parse(overrides.get("schedule") or PUBLISHED["10"]),
        overrides.get("label_drop", 0.1),
        IMAGENET if classes == len(IMAGENET) else None,
        position_side=side,
        official_sampling=OfficialSampling(),
    )
