"""What a VARGPT needs of memory, counted from its sizes before anything is loaded."""

from __future__ import annotations

import torch

from nextscale.tasks.generation.vargpt import VARGPT
from nextscale.tasks.generation.vargpt_config import VARGPTConfig
from nextscale.tasks.tokenizers.bitwise_vq import BitwiseVQ
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ

GROUP_BYTES = 4 / 64
"""Bytes of step and lowest value beside each packed weight: two of two bytes for every 64 weights."""


def cache_sizes(
    config: VARGPTConfig, prompt: int, images: int = 1, width: int = 2, guided: bool = True
) -> dict[str, int]:
    """Bytes of keys and values while images are drawn, by what holds them.

    Language model: 2 x layers x key heads x head size x (prompt, start and image); decoder: 2 x blocks x width x
    (image), for every row, of which guidance has two.

    Args:
        prompt: tokens of each.
        images: at once.
        width: bytes of a number.
    """
    language, blocks, length = config.language, config.decoder.transformer, config.schedule.length
    heads = language.get("num_key_value_heads") or language["num_attention_heads"]
    size = language.get("head_dim") or language["hidden_size"] // language["num_attention_heads"]
    read = prompt + 1 + length
    rows = images * (2 if guided else 1)
    return {
        "language cache": 2 * language["num_hidden_layers"] * heads * size * read * images * width,
        "decoder cache": 2 * blocks.depth * blocks.width * length * rows * width,
    }


def planned_bytes(config: VARGPTConfig, prompt: int, bits: int = 16, images: int = 1) -> dict[str, float]:
    """Bytes of weights and caches for drawing, folded, half precision but for packed layers, and their ``sum``.

    Args:
        prompt: tokens of each conversation.
        bits: 16, or 8 or 4 for the linear layers of language model and decoder.
        images: at once.

    Raises:
        ValueError: there are no weights of so many bits.
    """
    if bits not in (16, 8, 4):
        raise ValueError(f"weights have 16, 8 or 4 bits, not {bits}")
    with torch.device("meta"):
        model = VARGPT(config, ResidualVQ() if config.var is not None else BitwiseVQ()).fold()
    packed = ("language.text.layers.", "decoder.transformer.blocks.")
    found = {"language model": 0.0, "vision": 0.0, "decoder": 0.0}
    for name, parameter in model.named_parameters():
        part = "vision" if name.startswith(("language.vision.", "language.reader.")) else (
            "language model" if name.startswith("language.") else "decoder")  # fmt: skip
        few = bits < 16 and parameter.ndim == 2 and name.startswith(packed)
        found[part] += parameter.numel() * (bits / 8 + GROUP_BYTES if few else 2)
    found |= {name: float(size) for name, size in cache_sizes(config, prompt, images).items()}
    return {**found, "sum": sum(found.values())}
