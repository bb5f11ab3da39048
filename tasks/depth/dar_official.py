"""Recognising DAR in official files, and reading its sizes from their keys and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from nextscale.core.checkpoint import CheckpointError, find_state_dict
from nextscale.tasks.depth.dar_bins import OrdinalBins
from nextscale.tasks.depth.dar_decoder import DARDecoderConfig
from nextscale.tasks.depth.dar_diffusion import CLASSIFIER, DiffusionEncoderConfig
from nextscale.tasks.depth.dar_encoders import PatchEncoderConfig
from nextscale.tasks.depth.dar_transformer import DARTransformerConfig
from nextscale.tasks.depth.dar_vit import ViTConfig

MARK = "decoder.update.query_tokens"
NESTED = (("model",), ("state_dict",))

State = Mapping[str, Tensor]


def find_official(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The flat state dict in an official file's content.

    Raises:
        CheckpointError: it is not a DAR.
    """
    return find_state_dict(content, NESTED, MARK)


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is a DAR, in the official layout."""
    try:
        find_official(content)
    except CheckpointError:
        return False
    return True


def read_config(state: State) -> tuple[DARDecoderConfig, PatchEncoderConfig | DiffusionEncoderConfig]:
    """The sizes of decoder and encoder; not the depth range, the grids and the heads, which no file tells.

    Raises:
        CheckpointError: an entry that sizes are read from is missing.
    """
    try:
        encoder = patch_config(state) if "encoder.projects.0.weight" in state else diffusion_config(state)
        return decoder_config(state), encoder
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"the state dict lacks an entry of DAR: {error}") from None


def _count(state: State, prefix: str) -> int:
    """Entries of a numbered list."""
    found = {int(match[1]) for key in state if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", key))}
    return 1 + max(found)


def decoder_config(state: State, prefix: str = "decoder.update.") -> DARDecoderConfig:
    """Sizes of the depth decoder."""

    def shape(name: str) -> tuple[int, ...]:
        return tuple(state[f"{prefix}{name}"].shape)

    block = "transdecoder.mid_block.0"
    width, token_width = shape("transdecoder.mid_proj_in.weight")
    blocks = _count(state, f"{prefix}transdecoder.mid_block")
    up: list[tuple[int, ...]] = []
    while f"{prefix}decoder.deconv_layers.{3 * len(up)}.weight" in state:
        up.append(shape(f"decoder.deconv_layers.{3 * len(up)}.weight"))
    channels, inputs = shape("gru.convz1.weight")[:2]
    bin_width, bins = shape("encoder.convd1.weight")[:2]
    return DARDecoderConfig(
        DARTransformerConfig(
            width,
            blocks,
            token_width=token_width,
            memory_width=shape(f"{block}.context_norm.weight")[0],
            mlp_ratio=shape(f"{block}.mlp.fc1.weight")[0] / width,
            attention_bias=f"{prefix}{block}.self_attn.qkv.bias" in state,
            long_skips=f"{prefix}transdecoder.mid_block.{blocks - 1}.skip_linear.weight" in state,
            heads=8 if width % 8 == 0 else 1,
        ),
        OrdinalBins(count=bins),
        causal=False,
        context_width=inputs - channels - bin_width,
        bin_width=bin_width,
        width=channels,
        up_widths=tuple(layer[1] for layer in up),
        up_kernels=tuple(layer[2] for layer in up),
        unread_layers=f"{prefix}last_layer_depth.0.weight" in state,
    )


def patch_config(state: State, prefix: str = "encoder.") -> PatchEncoderConfig:
    """Sizes of DINOv2 and its neck."""
    tokens, width = state[f"{prefix}backbone.pos_embed"].shape[1:]
    return PatchEncoderConfig(
        ViTConfig(
            width,
            _count(state, f"{prefix}backbone.blocks"),
            width // 64 or 1,
            patch=state[f"{prefix}backbone.patch_embed.proj.weight"].shape[-1],
            grid=round((tokens - 1) ** 0.5),
            mlp_ratio=state[f"{prefix}backbone.blocks.0.mlp.fc1.weight"].shape[0] / width,
            branch_scale=f"{prefix}backbone.blocks.0.ls1.gamma" in state,
            mask_token=f"{prefix}backbone.mask_token" in state,
        ),
        tuple(state[f"{prefix}projects.{index}.weight"].shape[0] for index in range(4)),
        state[f"{prefix}scratch.layer1_rn.weight"].shape[0],
        state[f"{prefix}out_layer.0.weight"].shape[0],
        unread_layers=f"{prefix}scratch.output_conv1.weight" in state,
    )


def diffusion_config(state: State, prefix: str = "encoder.") -> DiffusionEncoderConfig:
    """Stable Diffusion is what it is; scenes, their hidden layer and the joined tokens differ."""
    hidden, classes = state[f"{prefix}cide_module.fc.0.weight"].shape
    return DiffusionEncoderConfig(
        classifier=replace(CLASSIFIER, classes=classes),
        scenes=state[f"{prefix}cide_module.embeddings"].shape[0],
        scene_hidden=hidden,
        outputs=state[f"{prefix}out_layer.0.weight"].shape[0],
        unread_layers=f"{prefix}encoder_vq.post_quant_conv.weight" in state,
    )
