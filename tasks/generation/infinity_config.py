"""Infinity's configuration, and the sizes of the paper.

Han et al. 2024 (arXiv 2412.04431); official code FoundationVision/Infinity.
"""

from __future__ import annotations

from dataclasses import dataclass

from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.infinity_transformer import InfinityBlocksConfig, Positions
from nextscale.tasks.generation.text import TextEncoderConfig
from nextscale.tasks.tokenizers.bitwise_schedules import schedule_of
from nextscale.tasks.tokenizers.bitwise_vq import SCHEDULE_1M

LEVELS = 15
FLAN_T5_XL = TextEncoderConfig("google/flan-t5-xl", kind="t5", max_length=512)


@dataclass(frozen=True)
class InfinityConfig:
    """Attributes:

    text_width: channels of the text encoder's features.
    text_length: rows of the learned sequence that stands for no text: the longest text.
    pool_heads: heads that pool the text.
    token_bits: bits per token.
    levels: rows of the level embedding: the most scales.
    positions: see :func:`nextscale.tasks.generation.infinity_transformer.rotation_of`.
    restart_positions: sampling gives every scale the positions of the first tokens of all, as the official code does
        where its fused norm is off; no published figure is made so.
    schedule: scales where neither an aspect ratio nor a list is given.
    text: the encoder that the model was trained with.
    text_drop: probability that a text is replaced by no text in training, for guidance.
    guidance, temperature: to sample with where none are asked for.
    """

    transformer: InfinityBlocksConfig
    text_width: int = 2048
    text_length: int = 512
    pool_heads: int = 16
    token_bits: int = 32
    levels: int = LEVELS
    positions: Positions = "spread"
    restart_positions: bool = False
    schedule: ScaleSchedule = SCHEDULE_1M
    text: TextEncoderConfig = FLAN_T5_XL
    text_drop: float = 0.1
    guidance: float = 4.0
    temperature: float = 0.5

    def __post_init__(self) -> None:
        if self.positions not in ("spread", "shrunk", "plain"):
            raise ValueError(f"positions is {self.positions!r}, expected spread, shrunk or plain")
        if len(self.schedule) > self.levels:
            raise ValueError(f"{len(self.schedule)} scales need as many levels, there are {self.levels}")


def hidden_width(width: int, ratio: float = 4.0) -> int:
    """Of the feed-forward network: the nearest multiple of 256 (of two as near, the even multiple)."""
    return 256 * round(ratio * width / 256)


def blocks(width: int, depth: int, heads: int, chunks: int = 4, drop_path: float = 0.1) -> InfinityBlocksConfig:
    """The blocks of one of the paper's sizes."""
    ratio = hidden_width(width) / width
    return InfinityBlocksConfig(width, depth, heads, ratio, drop_path=drop_path, chunks=chunks)


PRESETS: dict[str, InfinityConfig] = {
    "infinity-125m": InfinityConfig(blocks(768, 12, 8), schedule=schedule_of(1.0, "0.06M")),
    "infinity-layer16": InfinityConfig(blocks(1152, 16, 12)),
    "infinity-1b": InfinityConfig(blocks(1536, 24, 16)),
    "infinity-2b": InfinityConfig(blocks(2048, 32, 16, chunks=8)),
    "infinity-layer32": InfinityConfig(blocks(2080, 32, 20)),
    "infinity-layer40": InfinityConfig(blocks(2688, 40, 24)),
    "infinity-layer48": InfinityConfig(blocks(3360, 48, 28)),
    "infinity-8b": InfinityConfig(blocks(3584, 40, 28, chunks=8), token_bits=56, guidance=3.0, temperature=1.0),
    "infinity-20b": InfinityConfig(blocks(4608, 58, 36, chunks=1, drop_path=0.25), pool_heads=32),
}
"""The paper's sizes, by name."""
