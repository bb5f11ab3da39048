"""The state-dict layout of the published Infinity files: names, shapes, chunks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextscale.core.checkpoint import CheckpointError, KeyMap
from nextscale.tasks.generation.official_layout import block_rules

NESTED = (("trainer", "gpt_fsdp"), ("trainer", "gpt_wo_ddp"), ("state_dict",), ("model",))
RECOGNISED_BY = "text_proj_for_sos.ca.mat_q"
LEGACY = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")
"""Buffers of early files, which the official code discards too."""

_BLOCK = "transformer.blocks.*"
_KEYS = KeyMap(
    [
        ("null_text", "cfg_uncond"),
        ("pool.query", "text_proj_for_sos.ca.mat_q"),
        ("pool.key_value", "text_proj_for_sos.ca.mat_kv"),
        ("pool.value_bias", "text_proj_for_sos.ca.v_bias"),
        ("pool.projection", "text_proj_for_sos.ca.proj"),
        ("memory", "text_proj_for_ca"),
        ("start_position", "pos_start"),
        ("word_embedding", "word_embed"),
        ("level_embedding", "lvl_embed"),
        ("transformer.shared_modulation.linear", "shared_ada_lin.1"),
        *((ours, theirs.replace(".attn.", ".sa.")) for ours, theirs in block_rules()),
        (f"{_BLOCK}.cross_attention.query", "blocks.*.ca.mat_q"),
        (f"{_BLOCK}.cross_attention.key_value", "blocks.*.ca.mat_kv"),
        (f"{_BLOCK}.cross_attention.value_bias", "blocks.*.ca.v_bias"),
        (f"{_BLOCK}.cross_attention.projection", "blocks.*.ca.proj"),
        (f"{_BLOCK}.cross_norm", "blocks.*.ca_norm"),
        (f"{_BLOCK}.cross_gate", "blocks.*.ca_gamma"),
        ("head.modulation.linear", "head_nm.ada_lin.1"),
        ("head.linear", "head"),
    ]
)
_CHUNKED = re.compile(r"block_chunks\.(\d+)\.module\.(\d+)\.")


def _chunk_sizes(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """(chunks, blocks in each); (1, 0) where blocks are not chunked."""
    found = [(int(match[1]), int(match[2])) for key in state if (match := _CHUNKED.match(key))]
    if not found:
        return 1, 0
    return 1 + max(chunk for chunk, _ in found), 1 + max(block for _, block in found)


def unchunked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With blocks named by their place in the whole stack."""
    _, size = _chunk_sizes(state)
    return {
        _CHUNKED.sub(lambda match: f"blocks.{int(match[1]) * size + int(match[2])}.", key): value
        for key, value in state.items()
    }


def from_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under this library's names, in its shapes, without derived buffers."""
    own: dict[str, Tensor] = {}
    for name, value in unchunked(state).items():
        if name in LEGACY or name.endswith("zero_k_bias"):
            continue
        if name.endswith("scale_mul_1H11"):
            value = value.reshape(-1)
        elif name.endswith("ada_gss"):
            value = value.reshape(value.shape[2:])
        own[_KEYS.from_official(name)] = value
    return own


def to_layout(state: Mapping[str, Tensor], depth: int, chunks: int) -> dict[str, Tensor]:
    """This library's tensors under their official names and in their shapes, with the key biases, which are zero."""
    official: dict[str, Tensor] = {}
    size = depth // chunks
    for own, value in state.items():
        name = _KEYS.to_official(own)
        if chunks > 1 and (match := re.match(r"blocks\.(\d+)\.", name)):
            chunk, block = divmod(int(match[1]), size)
            name = f"block_chunks.{chunk}.module.{block}.{name[match.end() :]}"
        if name.endswith("scale_mul_1H11"):
            value = value.view(1, -1, 1, 1)
        elif name.endswith("ada_gss"):
            value = value[None, None]
        elif name.endswith("v_bias"):
            official[name.replace("v_bias", "zero_k_bias")] = torch.zeros_like(value)
        official[name] = value
    return official


@dataclass(frozen=True)
class Sizes:
    """What an official state dict tells, as fields of the configurations of the blocks and of the model."""

    blocks: dict[str, Any]
    model: dict[str, Any]


def sizes(state: Mapping[str, Tensor]) -> Sizes:
    """Sizes from keys and shapes.

    Raises:
        CheckpointError: an entry that sizes are read from is missing.
    """
    chunks, _ = _chunk_sizes(state)
    flat = unchunked(state)
    try:
        width, token_bits = flat["word_embed.weight"].shape
        text_length, text_width = flat["cfg_uncond"].shape
        blocks = {
            "width": width,
            "depth": 1 + max(int(key.split(".")[1]) for key in flat if key.startswith("blocks.")),
            "heads": flat["blocks.0.sa.scale_mul_1H11"].numel(),
            "mlp_ratio": flat["blocks.0.ffn.fc1.weight"].shape[0] / width,
            "chunks": chunks,
            "cross_gate": 1.0 if "blocks.0.ca_gamma" in flat else None,
        }
        model = {
            "text_width": text_width,
            "text_length": text_length,
            "pool_heads": flat["text_proj_for_sos.ca.mat_q"].shape[1],
            "token_bits": token_bits,
            "levels": flat["lvl_embed.weight"].shape[0],
        }
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"the state dict lacks an entry of Infinity: {error}") from None
    return Sizes(blocks, model)
