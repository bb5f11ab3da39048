"""FlowAR's official state dict: names, sizes read from it, derived buffers.

Official code OliverRensu/FlowAR, ``models/flowar.py`` and ``models/flowmodel.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nextscale.core.checkpoint import CheckpointError, KeyMap, find_state_dict
from nextscale.core.schedule import ScaleSchedule
from nextscale.datasets.imagenet import IMAGENET
from nextscale.tasks.generation.flowar_config import PRESETS, FlowARConfig
from nextscale.tasks.generation.flowar_flow import FlowConfig
from nextscale.tasks.generation.flowar_transformer import FlowARBlocksConfig
from nextscale.tasks.tokenizers.kl_autoencoder import DOUBLING

NESTED = (("model_ema",), ("model",))
"""Where training checkpoints keep weights; the averaged ones, which are released, come first."""


def _block_rules(ours: str, theirs: str) -> list[tuple[str, str]]:
    parts = {
        "attention.qkv": "attn.qkv",
        "attention.projection": "attn.proj",
        "feed_forward.gate": "mlp.fc1_g",
        "feed_forward.expand": "mlp.fc1_x",
        "feed_forward.contract": "mlp.fc2",
    }
    return [(f"{ours}.*.{own}", f"{theirs}.*.{official}") for own, official in parts.items()]


_FLOW, _OFFICIAL_FLOW = "flow.blocks", "flownet.res_blocks"
_KEYS = KeyMap(
    [
        ("class_embedding", "class_emb"),
        ("latent_embedding", "z_proj"),
        ("input_norm", "z_proj_ln"),
        ("encoder_places", "encoder_pos_embed_learned"),
        ("decoder_places", "decoder_pos_embed_learned"),
        ("flow_places", "diffusion_pos_embed_learned"),
        ("between", "decoder_embed"),
        *(
            rule
            for stack in ("encoder", "decoder")
            for rule in (
                (f"{stack}.blocks.*.modulation.linear", f"{stack}_blocks.*.ada_lin.1"),
                *_block_rules(f"{stack}.blocks", f"{stack}_blocks"),
            )
        ),
        *_block_rules(_FLOW, _OFFICIAL_FLOW),
        (f"{_FLOW}.*.modulation.linear", f"{_OFFICIAL_FLOW}.*.ada_lin"),
        (f"{_FLOW}.*.time_modulation.linear", f"{_OFFICIAL_FLOW}.*.ada_lin_attn"),
        (f"{_FLOW}.*.token_modulation", f"{_OFFICIAL_FLOW}.*.ada_lin_mlp"),
        (f"{_FLOW}.*.cross_norm", f"{_OFFICIAL_FLOW}.*.norm2_1"),
        (f"{_FLOW}.*.memory_norm", f"{_OFFICIAL_FLOW}.*.norm2_2"),
        (f"{_FLOW}.*.query", f"{_OFFICIAL_FLOW}.*.crossattn.q"),
        (f"{_FLOW}.*.key_value", f"{_OFFICIAL_FLOW}.*.crossattn.kv"),
        (f"{_FLOW}.*.projection", f"{_OFFICIAL_FLOW}.*.crossattn.proj"),
        ("flow.time_embedding", "flownet.time_embed.mlp"),
        ("flow.condition_embedding", "flownet.cond_embed"),
        ("flow.input_projection", "flownet.input_proj"),
        ("flow.modulation", "flownet.final_layer.adaLN_modulation.1"),
        ("flow.output_projection", "flownet.final_layer.linear"),
    ]
)


def find_weights(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The flat state dict in an official file's content.

    Raises:
        CheckpointError: there is none.
    """
    return find_state_dict(content, NESTED, "flownet.time_embed.mlp.0.weight")


def from_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under this library's names, without derived buffers."""
    return {_KEYS.from_official(name): value for name, value in state.items() if not _is_derived(name)}


def _is_derived(name: str) -> bool:
    return name == "mask" or name.endswith("rope.freqs")


def to_layout(config: FlowARConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of :func:`from_layout`, with derived buffers.

    Raises:
        ValueError: the official code has no place for a part of it.
    """
    if config.encoder.conditioning != "block" or config.decoder.conditioning != "block":
        raise ValueError("the official FlowAR has no modulation that blocks share; train with conditioning block")
    official = {_KEYS.to_official(name): value for name, value in state.items()}
    length, mask = config.schedule.length, config.schedule.mask()
    official["mask"] = torch.zeros(length, length).masked_fill_(~mask, -torch.inf)[None, None]
    stacks = {"encoder_blocks": config.encoder, "decoder_blocks": config.decoder, _OFFICIAL_FLOW: config.flow.blocks}
    for prefix, blocks in stacks.items():
        half = blocks.head_size // 2
        frequencies = 1.0 / (10_000 ** (torch.arange(0, half, 2).float() / half))
        kinds = ("attn", "crossattn") if prefix == _OFFICIAL_FLOW and config.flow.cross else ("attn",)
        for index in range(blocks.depth):
            for kind in kinds:
                official[f"{prefix}.{index}.{kind}.rope.freqs"] = frequencies.clone()
    return official


def config_from_official(state: Mapping[str, Tensor], **overrides: Any) -> FlowARConfig:
    """The configuration that an official state dict's keys and shapes imply; times are truncated, as published.

    Raises:
        CheckpointError: an entry that sizes are read from is missing, or heads or scales cannot be told.
    """
    heads = overrides.get("heads")
    pair = heads if isinstance(heads, Sequence) else (heads, heads)
    try:
        encoder, decoder = (
            _blocks(state, f"{name}_blocks", each) for name, each in zip(("encoder", "decoder"), pair, strict=True)
        )
        flow = _flow(state)
        classes, channels = state["class_emb.weight"].shape[0] - 1, state["z_proj.weight"].shape[1]
        length = state["encoder_pos_embed_learned"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"the state dict lacks an entry of FlowAR: {error}") from None
    schedule = ScaleSchedule.parse(overrides["schedule"]) if overrides.get("schedule") else _schedule(state, length)
    if schedule.length != length:
        raise CheckpointError(f"the file has {length} positions, the scales '{schedule}' have {schedule.length}")
    names = IMAGENET if classes == len(IMAGENET) else None
    config = FlowARConfig(encoder, decoder, flow, classes, channels, schedule, class_names=names)
    published = (
        each for each in PRESETS.values() if (each.encoder, each.decoder, each.flow) == (encoder, decoder, flow)
    )
    usual = next(published, config)
    sampling = {name: getattr(usual, name) for name in ("guidance", "guidance_bound", "ode_steps")}
    given = {name: overrides[name] for name in sampling if overrides.get(name) is not None}
    return replace(config, **sampling | given)


def _blocks(state: Mapping[str, Tensor], prefix: str, heads: int | None) -> FlowARBlocksConfig:
    width = state["z_proj.weight"].shape[0]
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith(f"{prefix}."))
    hidden = state[f"{prefix}.0.mlp.fc2.weight"].shape[1]
    frequencies = state.get(f"{prefix}.0.attn.rope.freqs")
    if heads is None and frequencies is None:
        raise CheckpointError(
            f"the file has no {prefix}.0.attn.rope.freqs, which would tell the number of heads: give heads"
        )
    heads = heads or width // (4 * len(frequencies))  # type: ignore[arg-type]
    return FlowARBlocksConfig(width, depth, heads, hidden / width, dropout=0.1, attention_dropout=0.1)


def _flow(state: Mapping[str, Tensor]) -> FlowConfig:
    width = state["flownet.input_proj.weight"].shape[0]
    depth = 1 + max(int(key.split(".")[2]) for key in state if key.startswith(f"{_OFFICIAL_FLOW}."))
    hidden = state[f"{_OFFICIAL_FLOW}.0.mlp.fc2.weight"].shape[1]
    frequencies = state.get(f"{_OFFICIAL_FLOW}.0.attn.rope.freqs")
    heads = width // 64 if frequencies is None else width // (4 * len(frequencies))
    usual = FlowConfig(width, depth)
    return FlowConfig(
        width,
        depth,
        None if heads == width // 64 else heads,
        None if hidden == round(width * usual.blocks.mlp_ratio) else hidden / width,
        cross=f"{_OFFICIAL_FLOW}.0.crossattn.q.weight" in state,
        truncate_time=True,
    )


def _schedule(state: Mapping[str, Tensor], length: int) -> ScaleSchedule:
    """The scales: from the mask's steps, else the published list."""
    if "mask" in state:
        visible = (state["mask"][0, 0] == 0).sum(-1).tolist()
        stops = sorted(set(visible))
        sides = [math.isqrt(stop - start) for start, stop in zip([0, *stops], stops, strict=False)]
        if sum(side * side for side in sides) == length:
            return ScaleSchedule.squares(*sides)
    if length == DOUBLING.length:
        return DOUBLING
    raise CheckpointError(
        f"the file has {length} positions, which is no published list, and no mask that would tell the sides; name "
        'them with schedule="1 2 4 ..."'
    )
