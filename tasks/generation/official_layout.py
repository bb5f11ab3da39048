"""The state-dict layout that the published systems of the VAR family share: names, shapes, derived buffers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nextscale.core.checkpoint import CheckpointError, KeyMap
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import TransformerConfig


def block_rules(ours: str = "transformer.blocks", theirs: str = "blocks") -> list[tuple[str, str]]:
    """Names of a stack of AdaLN blocks."""
    parts = {
        "modulation.linear": "ada_lin.1",
        "modulation_offset": "ada_gss",
        "attention.log_scale": "attn.scale_mul_1H11",
        "attention.query_bias": "attn.q_bias",
        "attention.value_bias": "attn.v_bias",
        "attention.qkv": "attn.mat_qkv",
        "attention.projection": "attn.proj",
        "feed_forward.expand": "ffn.fc1",
        "feed_forward.contract": "ffn.fc2",
    }
    return [(f"{ours}.*.{own}", f"{theirs}.*.{official}") for own, official in parts.items()]


MODEL_RULES = [
    ("start_position", "pos_start"),
    ("position_embedding", "pos_1LC"),
    ("word_embedding", "word_embed"),
    ("class_embedding", "class_emb"),
    ("level_embedding", "lvl_embed"),
    ("transformer.shared_modulation.linear", "shared_ada_lin.1"),
    *block_rules(),
    ("head.modulation.linear", "head_nm.ada_lin.1"),
    ("head.linear", "head"),
]
"""Names of a whole class-conditional transformer."""

DERIVED = ("lvl_1L", "attn_bias_for_masking")
"""Buffers that follow from the scale list; they are made anew, never read."""


def from_layout(keys: KeyMap, state: Mapping[str, Tensor], ignored: Iterable[str] = DERIVED) -> dict[str, Tensor]:
    """An official state dict under this library's names, in its shapes, without derived buffers."""
    own: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in ignored or name.endswith("attn.zero_k_bias"):
            continue
        if name.endswith("scale_mul_1H11"):
            value = value.reshape(-1)
        elif name.endswith("ada_gss"):
            value = value.reshape(value.shape[2:])
        own[keys.from_official(name)] = value
    return own


def to_layout(keys: KeyMap, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This library's tensors under their official names and in their shapes, with the key biases, which are zero."""
    official: dict[str, Tensor] = {}
    for own, value in state.items():
        name = keys.to_official(own)
        if name.endswith("scale_mul_1H11"):
            value = value.view(1, -1, 1, 1)
        elif name.endswith("ada_gss"):
            value = value[None, None]
        elif name.endswith("attn.q_bias"):
            official[name.replace("q_bias", "zero_k_bias")] = torch.zeros_like(value)
        official[name] = value
    return official


def derived_buffers(schedule: ScaleSchedule) -> dict[str, Tensor]:
    """:data:`DERIVED`, as official files hold them."""
    bias = torch.zeros(schedule.length, schedule.length).masked_fill_(~schedule.mask(), -torch.inf)
    return {"lvl_1L": schedule.levels()[None].clone(), "attn_bias_for_masking": bias[None, None]}


def transformer_config(state: Mapping[str, Tensor], **overrides: Any) -> TransformerConfig:
    """Sizes and options of the blocks, from the keys and shapes of an official state dict.

    Args:
        overrides: what a file may not tell: ``heads`` of models without cosine attention (None: width / 64), and any
            other field of :class:`nextscale.core.transformer.TransformerConfig`.

    Raises:
        CheckpointError: an entry that sizes are read from is missing.
    """
    try:
        width = state["word_embed.weight"].shape[0]
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        hidden = state["blocks.0.ffn.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"the state dict lacks an entry of the VAR family: {error}") from None
    log_scale = state.get("blocks.0.attn.scale_mul_1H11")
    found: dict[str, Any] = {
        "width": width,
        "depth": depth,
        "heads": width // 64 if log_scale is None else log_scale.numel(),
        "mlp_ratio": hidden / width,
        "conditioning": "shared" if "shared_ada_lin.1.weight" in state else "block",
        "attention": "dot" if log_scale is None else "cosine",
        "drop_path": 0.1 * depth / 24,
    }
    return TransformerConfig(**found | {name: value for name, value in overrides.items() if value is not None})
