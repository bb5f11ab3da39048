"""VarFormer's official files: names, what configures a model in them, and what nothing reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nextscale.core.checkpoint import CheckpointError, KeyMap, find_state_dict
from nextscale.tasks.generation import var
from nextscale.tasks.generation.official_layout import MODEL_RULES, derived_buffers, from_layout, to_layout
from nextscale.tasks.generation.var import VARConfig
from nextscale.tasks.restoration.varformer_parts import relative_positions, shift_mask
from nextscale.tasks.tokenizers import residual_vq
from nextscale.tasks.tokenizers.residual_vq import ResidualVQConfig, autoencoder_rules

if TYPE_CHECKING:
    from nextscale.tasks.restoration.varformer import VarFormerConfig

NESTED = (("params_ema",), ("params",), ("state_dict",), ("model",))
"""Where training files keep the weights; the averaged ones are those that are used."""

_MARK = "cross_attn_blocks.0.mat_kv.weight"
_USAGE = "quantize.ema_vocab_hit_SV"
_DERIVED = ("attn_mask", "relative_position_index", "zero_k_bias")


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is a VarFormer, of either stage, in the official layout."""
    try:
        state = find_state_dict(content, NESTED, _MARK)
    except CheckpointError:
        return False
    return {"encoder.conv_in.weight", "quantize.embedding.weight", "pos_1LC"} <= set(state)


# --- names --------------------------------------------------------------------------------------------


def attention_rules(ours: str, theirs: str) -> list[tuple[str, str]]:
    """Names of a steering attention."""
    names = {
        "query.weight": "mat_q.weight",
        "query.bias": "q_bias",
        "key_value.weight": "mat_kv.weight",
        "value_bias": "v_bias",
        "projection": "proj",
    }
    return _joined(ours, theirs, names)


def enhancement_rules(ours: str, theirs: str) -> list[tuple[str, str]]:
    """Names of a latent block."""
    parts = {
        "pooled": "sca2.1",
        "near": "sca1.conv0",
        "far": "sca1.conv_spatial",
        "large": "sca1.conv1",
        "curves.predict.*": "IMAC.predictA*",
        "curves.convs.*": "IMAC.conv*",
        **{name: name for name in ("conv1", "conv2", "conv3", "conv4", "conv5", "norm1", "norm2", "beta", "gamma")},
    }
    return _joined(ours, theirs, parts)


def group_rules(ours: str, theirs: str) -> list[tuple[str, str]]:
    """Names of a window group."""
    parts = {
        "bias_table": "attn.relative_position_bias_table",
        "qkv": "attn.qkv",
        "projection": "attn.proj",
        "expand": "mlp.fc1",
        "contract": "mlp.fc2",
        "norm1": "norm1",
        "norm2": "norm2",
    }
    blocks = [
        (_join(ours, f"blocks.*.{own}"), _join(theirs, f"residual_group.blocks.*.{official}"))
        for own, official in parts.items()
    ]
    others = {"conv": "conv", "patch": "patch_embed.proj"}
    return blocks + _joined(ours, theirs, others)


def selector_rules(ours: str, theirs: str) -> list[tuple[str, str]]:
    """Names of a selector, and of a mixer."""
    names = {"upsample": "upsample.conv", "conv1x1": "conv1x1", "conv_out": "conv_out"}
    return _joined(ours, theirs, names) + group_rules(_join(ours, "groups.*"), _join(theirs, "swin_blocks.*"))


def anchor_rules(ours: str, theirs: str) -> list[tuple[str, str]]:
    """Names of an anchor attention."""
    names = {"projection": "proj_out", **{name: name for name in ("norm_q", "q", "norm_kv", "kv", "norm_a", "a")}}
    return _joined(ours, theirs, names)


def channel_rules(ours: str, theirs: str) -> list[tuple[str, str]]:
    """Names of a channel attention."""
    names = {
        "norm_x": "norm_d",
        "norm_guide": "norm_g",
        "query": "d_proj1",
        "key": "g_proj1",
        "value_x": "d_proj2",
        "value_guide": "g_proj2",
        **{name: name for name in ("scale", "beta", "gamma")},
    }
    return _joined(ours, theirs, names)


def warp_rules(ours: str, theirs: str) -> list[tuple[str, str]]:
    """Names of a warp."""
    names = {
        "compare": "offset_conv1",
        "refine": "offset_conv2",
        "conv.offset": "dcn.conv_offset",
        "conv.weight": "dcn.weight",
        "conv.bias": "dcn.bias",
    }
    return _joined(ours, theirs, names)


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _joined(ours: str, theirs: str, names: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(_join(ours, own), _join(theirs, official)) for own, official in names.items()]


def _fusion_rules(ours: str, theirs: str) -> list[tuple[str, str]]:
    at, level = f"{ours}.fusions.*", "Level_*"
    return [
        (f"{at}.norm", f"{theirs}.cat_rec_syn_bf_nm.{level}"),
        (f"{at}.conv", f"{theirs}.cat_rec_syn_bf.{level}"),
        *selector_rules(f"{at}.selector", f"{theirs}.cat_rec_syn.{level}"),
        *selector_rules(f"{at}.mixer", f"{theirs}.DAE.{level}"),
        *anchor_rules(f"{at}.anchors", f"{theirs}.AFT.{level}"),
    ]


def _adjustment_rules(ours: str, theirs: str) -> list[tuple[str, str]]:
    return [
        *channel_rules(f"decoder.adjustments.{ours}.attention", f"main_decoder.off_attn.{theirs}"),
        *warp_rules(f"decoder.adjustments.{ours}.warp", f"main_decoder.align_func_dict.{theirs}"),
        (f"decoder.adjustments.{ours}.join", f"main_decoder.cat_convs.{theirs}"),
    ]


def key_map(tokenizer: ResidualVQConfig) -> KeyMap:
    """Names of a whole model's weights."""
    trunk = [(ours, theirs) for ours, theirs in autoencoder_rules()]
    main = [(f"encoder.trunk{o.removeprefix('encoder')}", f"Main{t}") for o, t in trunk if o.startswith("encoder")]
    main += [(o, f"main_{t}") for o, t in trunk if o.startswith("decoder")]
    simple = {
        "encoder.trunk": "Mainencoder",
        "decoder.share": "main_decoder.theta",
        "decoder.input_share": "main_decoder.input_w",
        "decoder.unused": "main_decoder.conv1__w",
        **{f"decoder.{name}": f"main_decoder.{name}" for name in ("conv_in", "norm_out", "conv_out")},
    }
    own_tokenizer = residual_vq.key_map(tokenizer)
    parts = ("encoder", "decoder", "quant_conv", "post_quant_conv")
    quantizer = ["quantizer.codebook", *(f"quantizer.smoothers.{i}.conv" for i in range(tokenizer.quantizer.smoothers))]
    return KeyMap(
        [
            *_adjustment_rules("middle", "af_quant"),
            *_adjustment_rules("*", "Level_*"),
            *_fusion_rules("encoder", "Mainencoder"),
            *_fusion_rules("decoder", "main_decoder"),
            *main,
            *simple.items(),
            *attention_rules("steering.*", "cross_attn_blocks.*"),
            *enhancement_rules("enhancement.*", "ft_layers.blks.*"),
            *((f"prior.{ours}", theirs) for ours, theirs in MODEL_RULES),
            *((f"prior.tokenizer.{ours}", theirs) for ours, theirs in trunk),
            *((f"prior.tokenizer.{name}", own_tokenizer.to_official(name)) for name in quantizer),
            *((f"prior.tokenizer.{name}", name) for name in parts),
        ]
    )


def from_official_names(tokenizer: ResidualVQConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under this library's names, without what is derived."""
    kept = {k: v for k, v in state.items() if k.rsplit(".", 1)[-1] not in _DERIVED and k != _USAGE}
    return from_layout(key_map(tokenizer), kept)


def to_official_names(tokenizer: ResidualVQConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This library's tensors under their official names, with the key biases, which are zero."""
    official = to_layout(key_map(tokenizer), state)
    biases = {k: v for k, v in official.items() if k.startswith("cross_attn_blocks.") and k.endswith(".q_bias")}
    return official | {k.replace("q_bias", "zero_k_bias"): torch.zeros_like(v) for k, v in biases.items()}


def official_blanks(config: VarFormerConfig, prior: VARConfig, tokenizer: ResidualVQConfig) -> dict[str, Tensor]:
    """What official files hold beside the weights: levels, masks, positions in windows, and usage statistics."""
    found = derived_buffers(prior.schedule)
    found[_USAGE] = torch.zeros(len(prior.schedule), tokenizer.quantizer.vocabulary)
    if not config.restoration:
        return found
    lowest, side = len(tokenizer.autoencoder.multipliers) - 1, prior.schedule.final.height
    for network in ("Mainencoder", "main_decoder"):
        for level in range(lowest + 1):
            for part in ("cat_rec_syn", "DAE"):
                for group in range(config.window_groups):
                    at = f"{network}.{part}.Level_{level}.swin_blocks.{group}.residual_group.blocks"
                    found |= window_buffers(at, side << (lowest - level), config.window, depth=2)
    return found


def window_buffers(at: str, side: int, window: int, depth: int) -> dict[str, Tensor]:
    """The derived buffers of a window group's blocks for square maps."""
    size = min(window, side)
    found = {f"{at}.{block}.attn.relative_position_index": relative_positions(size).clone() for block in range(depth)}
    if side > window:
        mask = shift_mask(side, side, window, window // 2)
        found |= {f"{at}.{block}.attn_mask": mask.clone() for block in range(1, depth, 2)}
    return found


# --- what a file tells ----------------------------------------------------------------------------------


def read_sizes(
    content: Mapping[str, Any], *, guidance: float | None = None, form: str | None = None, **overrides: Any
) -> tuple[dict[str, Tensor], dict[str, Any], VARConfig, ResidualVQConfig]:
    """The flat state dict of an official file's content, what configures VarFormer, its prior and its tokenizer.

    Args:
        guidance, form: of the model; 0.5 and ``"published"`` by default.
        overrides: ``schedule``, and ``heads``, ``norm_eps`` of the prior; ``unit_norm``, ``smoothing``, ``beta`` of the
            tokenizer.

    Raises:
        CheckpointError: the content is no VarFormer.
    """
    state = find_state_dict(content, NESTED, _MARK)
    given = {name: value for name, value in overrides.items() if value is not None}
    of_prior = {name: value for name, value in given.items() if name in ("schedule", "heads", "norm_eps")}
    prior = var.config_from_official(state, **of_prior)
    of_tokenizer = {name: value for name, value in given.items() if name in ("unit_norm", "smoothing", "beta")}
    tokenizer = residual_vq.config_from_official(state, schedule=prior.schedule, **of_tokenizer)
    table = "{}.cat_rec_syn.Level_1.swin_blocks.0.residual_group.blocks.0.attn.relative_position_bias_table"
    sizes: dict[str, Any] = {
        "steered": _count(state, "cross_attn_blocks.", 1),
        "enhancement": _count(state, "ft_layers.blks.", 2),
        "restoration": "Mainencoder.conv_in.weight" in state,
        "adjust": any(name.startswith("main_decoder.off_attn.") for name in state),
        "guidance": 0.5 if guidance is None else guidance,
        "form": form or "published",
    }
    if sizes["restoration"]:
        try:
            sizes["decoder_blocks"] = _count(state, "main_decoder.up.0.block.", 4)
            for own, network in (("encoder_heads", "Mainencoder"), ("decoder_heads", "main_decoder")):
                rows, sizes[own] = state[table.format(network)].shape
                sizes["window"] = (round(rows**0.5) + 1) // 2
            sizes["window_groups"] = _count(state, "Mainencoder.DAE.Level_1.swin_blocks.", 4)
        except KeyError as error:
            raise CheckpointError(f"the state dict lacks an entry of VarFormer: {error}") from None
    return state, sizes, prior, tokenizer


def _count(state: Mapping[str, Tensor], prefix: str, place: int) -> int:
    """How many numbers a part of the names has, from 0 on."""
    return 1 + max((int(name.split(".")[place]) for name in state if name.startswith(prefix)), default=-1)
