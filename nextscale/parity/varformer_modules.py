"""VarFormer's building blocks, each replayed on its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.core.checkpoint import KeyMap
from nextscale.parity.case import Case
from nextscale.parity.replay import ReplayError
from nextscale.parity.tracking import Tracked
from nextscale.tasks.restoration import varformer_layout as names
from nextscale.tasks.restoration.varformer_adjust import ChannelAttention, Warp
from nextscale.tasks.restoration.varformer_parts import AnchorAttention, LatentBlock, Mixer, Selector, WindowGroup
from nextscale.tasks.restoration.varformer_prior import SteeringAttention, packed

NORM_GROUPS = 32
"""Of all published group norms."""


def replayed(case: Case) -> Mapping[str, Any]:
    """Every building block on its own."""
    outputs: dict[str, Tensor] = {}
    with torch.inference_mode():
        for part, block in BLOCKS.items():
            found = block(case, case.config[part])
            outputs |= {f"{part}.{name}": value for name, value in found.items()}
    return outputs


def _filled(case: Case, part: str, module: nn.Module, rules: list[tuple[str, str]]) -> Any:
    """The module with the case's weights of that part."""
    keys = KeyMap(rules)
    module.load_state_dict({keys.from_official(name): value for name, value in case.state_dict(part).items()})
    return module.eval()


def _only(arguments: Tracked, **usual: Any) -> None:
    """Raises:

    ReplayError: an argument that no published network changes is changed.
    """
    for name, value in usual.items():
        if arguments[name] != value:
            raise ReplayError(f"{arguments.path}.{name} is {arguments[name]!r}; only {value!r} is known")


def _side(arguments: Tracked) -> int:
    return min(arguments["input_resolution"])


def _cross_attention(case: Case, arguments: Tracked) -> dict[str, Tensor]:
    arguments.ignore("block_idx", "attn_l2_norm", "flash_if_available", "attn_drop", "proj_drop")
    module = SteeringAttention(arguments["dim"], arguments["num_heads"], scrambled=True)
    _filled(case, "cross_attention", module, names.attention_rules("", ""))
    query, memory = case.tensor("cross_attention.query"), case.tensor("cross_attention.memory")
    return {"out": module(query, packed(memory)), "alone": module(query[:1], packed(memory[:1]))}


def _latent_block(case: Case, arguments: Tracked) -> dict[str, Tensor]:
    arguments.ignore("drop_out_rate")
    expansion = arguments["DW_Expand"], arguments["FFN_Expand"]
    module = LatentBlock(arguments["c"], arguments["split_group"], arguments["n_curve"], expansion)
    _filled(case, "latent_block", module, names.enhancement_rules("", ""))
    return {"out": module(case.tensor("latent_block.x"))}


def _window_group(case: Case, arguments: Tracked) -> dict[str, Tensor]:
    arguments.ignore("drop", "attn_drop", "drop_path", "use_checkpoint", "img_size")
    _only(arguments, qkv_bias=True, qk_scale=None, downsample=None, resi_connection="1conv", patch_size=4)
    module = WindowGroup(
        arguments["dim"],
        arguments["num_heads"],
        _side(arguments),
        depth=arguments["depth"],
        window=arguments["window_size"],
        mlp_ratio=arguments["mlp_ratio"],
        unused=True,
    )
    _filled(case, "window_group", module, names.group_rules("", ""))
    return {f"{name}_out": module(case.tensor(f"window_group.{name}")) for name in ("x", "other")}


def _selector(case: Case, arguments: Tracked) -> dict[str, Tensor]:
    scales = arguments["dim_out"]
    module = Selector(
        arguments["dim_in"],
        arguments["out_dim"],
        scales,
        arguments["prior_channels"] // scales,
        arguments["up_r"],
        arguments["num_heads"],
        _side(arguments),
        depth=arguments["depth"],
        window=arguments["window_size"],
        weigh_first=True,
        unused=True,
    )
    _filled(case, "selector", module, names.selector_rules("", ""))
    return {"out": module(case.tensor("selector.x"), case.tensor("selector.prior"))}


def _mixer(case: Case, arguments: Tracked) -> dict[str, Tensor]:
    sizes = {"depth": arguments["depth"], "window": arguments["window_size"]}
    module = Mixer(arguments["dim"], arguments["num_heads"], _side(arguments), **sizes, unused=True)
    _filled(case, "mixer", module, names.selector_rules("", ""))
    x, prior = case.tensor("mixer.x"), case.tensor("mixer.prior")
    return {"out": module(x, prior), "logit": module.logits(x, prior)[:, :1]}


def _anchor(case: Case, arguments: Tracked) -> dict[str, Tensor]:
    module = AnchorAttention(arguments["in_channels1"], arguments["in_channels2"], NORM_GROUPS)
    _filled(case, "anchor", module, names.anchor_rules("", ""))
    return {"out": module(case.tensor("anchor.x"), case.tensor("anchor.prior"))}


def _channel_attention(case: Case, arguments: Tracked) -> dict[str, Tensor]:
    module = ChannelAttention(arguments["c"], arguments["num_heads"])
    _filled(case, "channel_attention", module, names.channel_rules("", ""))
    x, guide = module(case.tensor("channel_attention.x"), case.tensor("channel_attention.guide"))
    return {"x_out": x, "guide_out": guide}


def _warp(case: Case, arguments: Tracked) -> dict[str, Tensor]:
    previous = arguments["previous_offset_channel"]
    module = Warp(
        arguments["channel"], arguments["cond_channels"], arguments["deformable_groups"], previous, NORM_GROUPS
    )
    _filled(case, "warp", module, names.warp_rules("", ""))
    given = case.tensor("warp.previous") if previous else None
    out, offset = module(case.tensor("warp.x"), case.tensor("warp.guide"), given)
    return {"out": out, "offset": offset}


BLOCKS = {
    "cross_attention": _cross_attention,
    "latent_block": _latent_block,
    "window_group": _window_group,
    "selector": _selector,
    "mixer": _mixer,
    "anchor": _anchor,
    "channel_attention": _channel_attention,
    "warp": _warp,
}
"""By the name that cases give them."""
