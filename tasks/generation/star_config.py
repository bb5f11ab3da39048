"""STAR's configuration, and the released sizes.

Ma et al. 2024 (arXiv 2406.10797); official code Davinci-XLab/STAR-T2I.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.star_transformer import STARBlocksConfig
from nextscale.tasks.generation.text import TextEncoderConfig
from nextscale.tasks.tokenizers.residual_vq import SCHEDULE_256, SCHEDULE_512, SCHEDULE_1024

SampleVersion = Literal["1024", "new", "old"]

OLD_SCHEDULE_512 = ScaleSchedule.squares(1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 24, 32)
"""Of an earlier model for 512 pixels."""

CLIP_H = TextEncoderConfig(
    "stabilityai/stable-diffusion-2-1", kind="clip", max_length=77, folders=("tokenizer", "text_encoder")
)
"""The text tower that Stable Diffusion 2.1 holds, 1,024 channels."""


@dataclass(frozen=True)
class STARConfig:
    """Attributes:

    vocabulary, code_channels: of the tokenizer's codes.
    schedule: scales in training and, where none are given, in sampling.
    rotary: positions by rotation; else a learned table, for this list of scales only.
    rotary_base, rotary_span: see :func:`nextscale.tasks.generation.star_transformer.rotation_of`.
    add_levels: add the level embedding to the tokens; only where levels modulate the blocks can it be left out.
    head_norm: normalise the last features before the scores.
    stable_from: first scale of the stable sampler, by its place in the list; None: there is no sampling head.
    sample_version: how the stable sampler goes about it, see
        :class:`nextscale.tasks.generation.star_sampling.STAREmitter`.
    text: the encoder that the model was trained with.
    text_drop: probability that a text is replaced by the empty one in training, for guidance.
    guidance, temperature: to sample with where none are asked for.
    """

    transformer: STARBlocksConfig
    vocabulary: int = 4096
    code_channels: int = 32
    schedule: ScaleSchedule = SCHEDULE_256
    rotary: bool = True
    rotary_base: float = 10_000.0
    rotary_span: float | None = 64.0
    add_levels: bool = True
    head_norm: bool = True
    stable_from: int | None = None
    sample_version: SampleVersion = "1024"
    text: TextEncoderConfig = CLIP_H
    text_drop: float = 0.1
    guidance: float = 4.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.add_levels and self.transformer.conditioning != "shared":
            raise ValueError(
                "add_levels is False and conditioning 'none': nothing would tell the scales apart; with conditioning "
                "'shared' levels need not be added"
            )
        if self.sample_version not in ("1024", "new", "old"):
            raise ValueError(f"sample_version is {self.sample_version!r}, expected '1024', 'new' or 'old'")
        if self.stable_from is not None and not 0 <= self.stable_from < len(self.schedule):
            raise ValueError(
                f"stable_from is {self.stable_from}, and the list has {len(self.schedule)} scales: give the place of "
                "one of them, counted from 0"
            )

    @property
    def text_width(self) -> int:
        """Channels of the text encoder's features."""
        return self.transformer.text_width

    @classmethod
    def of_depth(cls, depth: int, schedule: ScaleSchedule, stable_from: int | None = None) -> STARConfig:
        """The paper's family: width 64 d, d heads, drop path 0.1 d / 24."""
        return cls(
            STARBlocksConfig(64 * depth, depth, depth, drop_path=0.1 * depth / 24),
            schedule=schedule,
            stable_from=stable_from,
        )


PRESETS: dict[str, STARConfig] = {
    "star-d16-256": STARConfig.of_depth(16, SCHEDULE_256),
    "star-d30-256": STARConfig.of_depth(30, SCHEDULE_256),
    "star-d30-512": STARConfig.of_depth(30, SCHEDULE_512),
    "star-d30-1024": STARConfig.of_depth(30, SCHEDULE_1024),
    "star-d30-1024-sampler": STARConfig.of_depth(30, SCHEDULE_1024, stable_from=9),
}
"""Released models, by name; made anew, every row of a batch attends to its own text."""


def fitting(config: STARConfig, schedule: ScaleSchedule | None) -> ScaleSchedule:
    """The scales, or the configured ones.

    Raises:
        ValueError: the model has no levels or positions for them.
    """
    own = config.schedule
    if schedule is None:
        return own
    if len(schedule) > len(own) or schedule.lengths[0] != own.lengths[0]:
        raise ValueError(
            f"the model has {len(own)} levels and begins with {own.lengths[0]} token(s), which the scales '{schedule}' "
            "do not fit"
        )
    if not config.rotary and schedule.lengths != own.lengths[: len(schedule)]:
        raise ValueError(f"this model has positions for the scales '{own}' only, not for '{schedule}'")
    return schedule
