"""The state-dict layout of the published SAR3D files: names, shapes, derived buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.checkpoint import CheckpointError, KeyMap, find_state_dict
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.official_layout import (
    DERIVED,
    MODEL_RULES,
    derived_buffers,
    from_layout,
    to_layout,
)
from nextscale.tasks.shapes.sar3d_fields import FieldConfig
from nextscale.tasks.shapes.sar3d_planes import PLANES, PlanesConfig
from nextscale.tasks.shapes.sar3d_views import ViewsConfig
from nextscale.tasks.tokenizers.residual_vq import autoencoder_rules

# --- the transformer ----------------------------------------------------------------------------------

TRANSFORMER_NESTED = (("trainer", "var_wo_ddp"), ("state_dict",), ("model",))

_CROSS = "transformer.blocks.*.cross_attention"
_TRANSFORMER = KeyMap(
    [
        ("pooled_embedding", "pooler_emb"),
        ("plane_embedding", "plane_embed"),
        (f"{_CROSS}.query.bias", "blocks.*.cross_attn.q_bias"),
        (f"{_CROSS}.query.weight", "blocks.*.cross_attn.mat_q.weight"),
        (f"{_CROSS}.key_value", "blocks.*.cross_attn.mat_kv"),
        (f"{_CROSS}.value_bias", "blocks.*.cross_attn.v_bias"),
        (f"{_CROSS}.log_scale", "blocks.*.cross_attn.scale_mul_1H11"),
        (f"{_CROSS}.projection", "blocks.*.cross_attn.proj"),
        ("transformer.blocks.*.cross_norm.gain", "blocks.*.prenorm_ca_dino.g"),
        *MODEL_RULES,
    ]
)


def transformer_from_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under this library's names, in its shapes, without derived buffers."""
    return from_layout(_TRANSFORMER, state, (*DERIVED, "plane_1L"))


def transformer_to_layout(state: Mapping[str, Tensor], schedule: ScaleSchedule) -> dict[str, Tensor]:
    """This library's tensors under their official names and in their shapes, with derived buffers."""
    return to_layout(_TRANSFORMER, state) | derived_buffers(schedule) | {"plane_1L": planes_of(schedule)[None].clone()}


def planes_of(schedule: ScaleSchedule) -> Tensor:
    """int64 (length,): the plane of every position."""
    counts = [scale.height * scale.width for scale in schedule.scales for _ in range(PLANES)]
    return torch.arange(PLANES).repeat(len(schedule)).repeat_interleave(torch.tensor(counts))


# --- the tokenizer ------------------------------------------------------------------------------------

_RECOGNISED = "decoder.superresolution.quantize.embedding.weight"
_SUPER = "decoder.superresolution"
_USAGE, _UNUSED = f"{_SUPER}.quantize.ema_vocab_hit_SV", "decoder.w_avg"
_VIEWS, _MIDDLE = "encoder.middle.attention", "encoder.mid.attn_1"
_BLOCK = ("blocks.*", "transformer_blocks.*")


def _tokenizer_rules() -> list[tuple[str, str]]:
    views = {
        "norm1": "norm1",
        "norm2": "norm2",
        "norm3": "norm3",
        "across.qkv": "attn1.qkv",
        "across.projection": "attn1.to_out.0",
        "within.qkv": "attn2.qkv",
        "within.projection": "attn2.to_out.0",
        "expand": "ff.net.0.proj",
        "contract": "ff.net.2",
    }
    blocks = {
        "qkv": "attn.qkv",
        "projection": "attn.proj",
        "expand": "mlp.mlp.0",
        "contract": "mlp.mlp.2",
        "modulation": "adaLN_modulation.1",
    }
    fields = {
        "network": "net",
        "distance": "net_sdf",
        "colour": "net_rgb",
        "deformation": "net_deformation",
        "weight": "net_weight",
    }
    encoder = [rule for rule in autoencoder_rules() if rule[0].startswith("encoder.")]
    upsampler = [
        (f"upsampler{ours.removeprefix('decoder')}", f"{_SUPER}.conv_sr{theirs.removeprefix('decoder')}")
        for ours, theirs in autoencoder_rules()
        if ours.startswith("decoder.")
    ]
    return [
        *((f"{_VIEWS}.blocks.*.{o}", f"{_MIDDLE}.transformer_blocks.*.{t}") for o, t in views.items()),
        (f"{_VIEWS}.enter", f"{_MIDDLE}.proj_in"),
        (f"{_VIEWS}.leave", f"{_MIDDLE}.proj_out"),
        ("encoder.fusion", "encoder.fusion_layer"),
        *encoder,
        *upsampler,
        ("upsampler", f"{_SUPER}.conv_sr"),
        ("quant_conv", f"{_SUPER}.quant_conv"),
        ("post_quant_conv", f"{_SUPER}.post_quant_conv"),
        ("quantizer.codebook", f"{_SUPER}.quantize.embedding"),
        ("patch_embedding.conv", f"{_SUPER}.ldm_upsample.proj"),
        ("decoder.position_embedding", "decoder.vit_decoder.pos_embed"),
        *((f"decoder.blocks.*.{o}", f"decoder.vit_decoder.blocks.*.{t}") for o, t in blocks.items()),
        *((f"field.{o}", f"decoder.triplane_decoder.decoder.{t}") for o, t in fields.items()),
    ]


_SMOOTHERS = {
    "shared": ("quantizer.smoothers.0.conv", f"{_SUPER}.quantize.quant_resi.qresi"),
    "some": ("quantizer.smoothers.*.conv", f"{_SUPER}.quantize.quant_resi.qresi_ls.*"),
    "separate": ("quantizer.smoothers.*.conv", f"{_SUPER}.quantize.quant_resi.*"),
}
"""Names of the smoothing convolutions where one serves all scales, where a few do, and where each scale has its own."""
_KEYS = {kind: KeyMap([*_tokenizer_rules(), smoother]) for kind, smoother in _SMOOTHERS.items()}

_SPLIT = (
    ("attn1.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    ("attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
    ("conv_sr.mid.attn_1.qkv", tuple(f"conv_sr.mid.attn_1.{part}" for part in "qkv")),
)
"""One layer here, three in official files."""


def read_tokenizer(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The flat state dict in a file's content.

    Raises:
        CheckpointError: there is none.
    """
    return find_state_dict(content, (("trainer", "vae_local"), ("state_dict",), ("model",)), _RECOGNISED)


def tokenizer_from_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under this library's names, without usage statistics and what is never used."""
    joined = {name: value for name, value in state.items() if name not in (_USAGE, _UNUSED)}
    for name in list(joined):
        for one, three in _SPLIT:
            if f"{three[0]}." in name:
                parts = [joined.pop(name.replace(three[0], part)) for part in three]
                joined[name.replace(three[0], one)] = torch.cat(parts)
    keys = _KEYS[_smoothing_of(state)[0]]
    return {keys.from_official(name): value for name, value in joined.items()}


def tokenizer_to_layout(state: Mapping[str, Tensor], scales: int, separate: bool = False) -> dict[str, Tensor]:
    """This library's tensors under their official names.

    Args:
        separate: name the smoothing convolutions as those of one scale each.
    """
    count = sum(name.startswith("quantizer.smoothers.") for name in state) // 2
    keys = _KEYS["separate" if separate else "shared" if count == 1 else "some"]
    official: dict[str, Tensor] = {_UNUSED: torch.zeros(512)}
    for own, value in state.items():
        name = keys.to_official(own)
        three = next(((one, parts) for one, parts in _SPLIT if f"{one}." in name), None)
        if three is None:
            official[name] = value
        else:
            for part, piece in zip(three[1], value.chunk(3), strict=True):
                official[name.replace(three[0], part)] = piece.clone()
    # Usage statistics: the official file has them, they carry no information for inference.
    official[_USAGE] = torch.zeros(scales, state["quantizer.codebook.weight"].shape[0])
    return official


def _smoothing_of(state: Mapping[str, Tensor]) -> tuple[str, int]:
    """How the smoothing convolutions are named, and how many there are."""
    prefix = f"{_SUPER}.quantize.quant_resi."
    names = {name.removeprefix(prefix).rsplit(".", 1)[0] for name in state if name.startswith(prefix)}
    if names == {"qresi"}:
        return "shared", 1
    return ("separate" if names and all(name.isdigit() for name in names) else "some"), len(names)


@dataclass(frozen=True)
class Found:
    """What a tokenizer file tells.

    Attributes:
        scales: how many.
        cells: of the finest scale of one plane.
        parts: of :class:`nextscale.tasks.shapes.sar3d_tokenizer.TriplaneVQConfig`.
    """

    scales: int
    cells: int
    parts: dict[str, Any]


def tokenizer_config_values(state: Mapping[str, Tensor], given: Mapping[str, Any]) -> Found:
    """Sizes and options, from keys and shapes, and from what a file cannot tell.

    Raises:
        CheckpointError: an entry that sizes are read from is missing.
    """
    try:
        vocabulary, codes = state[_RECOGNISED].shape
        kind, smoothers = _smoothing_of(state)
        attention = f"{_MIDDLE}.transformer_blocks"
        inner = state[f"{_MIDDLE}.proj_in.weight"].shape[0]
        view_heads = given.get("view_heads") or 8
        position = state["decoder.vit_decoder.pos_embed"]
        width, depth = position.shape[2], _count(state, "decoder.vit_decoder.blocks.")
        hidden = state["decoder.vit_decoder.blocks.0.mlp.mlp.0.weight"].shape[0]
        groups = given.get("norm_groups") or 32
        latent, image_channels = state["encoder.conv_out.weight"].shape[0], state["encoder.conv_in.weight"].shape[1]
        channels = state[f"{_SUPER}.conv_sr.conv_out.weight"].shape[0]
        mesh = "decoder.triplane_decoder.decoder.net_sdf.0.weight" in state
        first = f"decoder.triplane_decoder.decoder.{'net_sdf' if mesh else 'net'}.0.weight"
        return Found(
            state[_USAGE].shape[0] if _USAGE in state else 0,
            position.shape[1] // PLANES,
            {
                "encoder": _autoencoder(state, "encoder", "down", latent, image_channels, groups, attention=False),
                "views": ViewsConfig(
                    state["encoder.fusion_layer.weight"].shape[1] // latent,
                    view_heads,
                    inner // view_heads,
                    _count(state, f"{attention}."),
                ),
                "quantizer": QuantizerConfig(
                    vocabulary,
                    codes,
                    beta=given.get("beta", 0.25),
                    unit_norm=True,
                    smoothing=given.get("smoothing", 0.5) if smoothers else 0.0,
                    smoothers=smoothers,
                ),
                "separate_smoothers": kind == "separate",
                "decoder": PlanesConfig(width, depth, given.get("heads") or max(width // 64, 1), hidden / width),
                "upsampler": _autoencoder(state, f"{_SUPER}.conv_sr", "up", width, channels, groups),
                "head": FieldConfig(
                    "mesh" if mesh else "density", channels, state[first].shape[0], given.get("grid", 128)
                ),
            },
        )
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"the state dict lacks an entry of the SAR3D tokenizer: {error}") from None


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix))


def _autoencoder(
    state: Mapping[str, Tensor],
    prefix: str,
    level: str,
    latent: int,
    image: int,
    groups: int,
    attention: bool = True,
) -> AutoencoderConfig:
    """Sizes of an encoder or a decoder of images."""
    levels = _count(state, f"{prefix}.{level}.")
    blocks = _count(state, f"{prefix}.{level}.0.block.")
    widths = [state[f"{prefix}.{level}.{i}.block.{blocks - 1}.conv2.weight"].shape[0] for i in range(levels)]
    entry = state[f"{prefix}.conv_in.weight"].shape[0]
    # A decoder does not tell its unit; published ones have their narrowest level's width.
    channels = entry if level == "down" else min(widths)
    return AutoencoderConfig(
        channels,
        tuple(width // channels for width in widths),
        blocks if level == "down" else blocks - 1,
        latent,
        image,
        attention=attention,
        norm_groups=groups,
        level_attention=() if attention else None,
    )
