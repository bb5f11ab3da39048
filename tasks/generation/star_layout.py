"""The state-dict layout of the published STAR files: names, sizes, what a file cannot tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from nextscale.core.checkpoint import CheckpointError, KeyMap, find_state_dict
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.official_layout import block_rules, from_layout, to_layout, transformer_config
from nextscale.tasks.generation.star_config import OLD_SCHEDULE_512, STARConfig
from nextscale.tasks.generation.star_head import BLOCKS
from nextscale.tasks.generation.star_transformer import STARBlocksConfig
from nextscale.tasks.generation.text import TextEncoderConfig
from nextscale.tasks.tokenizers.residual_vq import SCHEDULE_256, SCHEDULE_512, SCHEDULE_1024

NESTED = (("trainer", "var_wo_ddp"), ("state_dict",), ("model",))
RECOGNISED_BY = "encoder_proj.weight"
CLASSES = 1001
"""Rows of a class embedding that official files hold and nothing reads."""

_CROSS = "transformer.blocks.*.cross_attention"
_KEYS = KeyMap(
    [
        ("start_position", "pos_start"),
        ("position_embedding", "pos_1LC"),
        ("word_embedding", "word_embed"),
        ("text_embedding", "encoder_proj"),
        ("level_embedding", "lvl_embed"),
        ("level_projection", "lvl_embed_proj"),
        ("transformer.shared_modulation.linear", "lvl_embed_adaln.1"),
        *block_rules(),
        (f"{_CROSS}.log_scale", "blocks.*.cross_attn.scale_mul_1H11"),
        (f"{_CROSS}.query.bias", "blocks.*.cross_attn.q_bias"),
        (f"{_CROSS}.query", "blocks.*.cross_attn.mat_q"),
        (f"{_CROSS}.key_value", "blocks.*.cross_attn.mat_kv"),
        (f"{_CROSS}.value_bias", "blocks.*.cross_attn.v_bias"),
        (f"{_CROSS}.projection", "blocks.*.cross_attn.proj"),
        ("head", "head_logits"),
        ("stable.start_position", "pos_start_last"),
        ("stable.text_embedding", "encoder_proj2"),
        ("stable.word_embedding", "word_embed_head"),
        ("stable.level_embedding", "lvl_embed_2"),
        ("stable.join", "head_proj"),
        ("stable.head", "head_logits2"),
        *block_rules("stable.transformer.blocks", "feat_extract_blocks"),
    ]
)
_UNREAD = re.compile(r"class_emb\.weight|feat_extract_blocks\.\d+\.ada_gss")
"""What official files hold and the official code never reads."""


def own_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under this library's names, in its shapes, without what is never read."""
    return from_layout(_KEYS, state, [name for name in state if _UNREAD.fullmatch(name)])


def official_state(state: Mapping[str, Tensor], config: STARConfig) -> dict[str, Tensor]:
    """This library's tensors under their official names and in their shapes; zeros for what is never read."""
    official = to_layout(_KEYS, state)
    like = official["word_embed.weight"]
    width = config.transformer.width
    official["class_emb.weight"] = like.new_zeros(CLASSES, width)
    if config.stable_from is not None and config.transformer.conditioning == "shared":
        for block in range(BLOCKS):
            official[f"feat_extract_blocks.{block}.ada_gss"] = like.new_zeros(1, 1, 6, width)
    return official


def config_from_official(
    state: Mapping[str, Tensor], content: Mapping[str, Any] | None = None, **overrides: Any
) -> STARConfig:
    """The configuration that an official state dict's keys and shapes imply.

    Args:
        content: the training file around it, which tells the list of scales.
        overrides: see :meth:`nextscale.tasks.generation.star.STAR.from_official`.

    Raises:
        CheckpointError: an entry that sizes are read from is missing, or the scale list cannot be told.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    base = transformer_config(state, heads=given.get("heads"), norm_eps=given.get("norm_eps"))
    sizes = {each.name: getattr(base, each.name) for each in fields(base)}
    try:
        sizes["text_width"] = state[RECOGNISED_BY].shape[1]
        model: dict[str, Any] = {
            "vocabulary": state["head_logits.weight"].shape[0],
            "code_channels": state["word_embed.weight"].shape[1],
        }
        schedule = given.get("schedule")
        scales = ScaleSchedule.parse(schedule) if schedule is not None else _schedule(state, content or {})
    except KeyError as error:
        raise CheckpointError(f"the state dict lacks an entry of STAR: {error}") from None
    sizes["conditioning"] = "shared" if "lvl_embed_adaln.1.weight" in state else "none"
    reads = "blocks.0.cross_attn.mat_q.weight" in state
    sizes["cross_attention"] = given.get("cross_attention", "first") if reads else "none"
    for name in ("rotary_base", "rotary_span", "add_levels", "head_norm", "sample_version", "guidance"):
        if name in given:
            model[name] = given[name]
    if model.get("rotary_span", 1) <= 0:
        model["rotary_span"] = None
    if "text_encoder" in given:
        model["text"] = TextEncoderConfig(str(given["text_encoder"]), max_length=77)
    return STARConfig(
        STARBlocksConfig(**sizes),
        schedule=scales,
        rotary="pos_1LC" not in state,
        stable_from=given.get("stable_from", 9) if "head_logits2.weight" in state else None,
        **model,
    )


def _schedule(state: Mapping[str, Tensor], content: Mapping[str, Any]) -> ScaleSchedule:
    """The scale list: as the trainer noted it, else the known list of so many levels and positions."""
    trainer = content.get("trainer")
    noted = trainer.get("config") if isinstance(trainer, Mapping) else None
    sides = noted.get("patch_nums") if isinstance(noted, Mapping) else None
    levels = state["lvl_embed.weight"].shape[0]
    if isinstance(sides, list | tuple) and len(sides) == levels:
        return ScaleSchedule.squares(*(int(side) for side in sides))
    known = [each for each in (SCHEDULE_256, SCHEDULE_512, OLD_SCHEDULE_512, SCHEDULE_1024) if len(each) == levels]
    if "pos_1LC" in state:
        known = [each for each in known if each.length == state["pos_1LC"].shape[1]]
    if len(known) == 1:
        return known[0]
    which = " or ".join(f"'{each}'" for each in known) or "no published list"
    raise CheckpointError(
        f"the file has {levels} levels, which is {which}, and tells no more about its scales: name them with "
        'schedule="1 2 3 ..."'
    )


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is a STAR transformer, in the official layout."""
    try:
        state = find_state_dict(content, NESTED, RECOGNISED_BY)
    except CheckpointError:
        return False
    return {"head_logits.weight", "word_embed.weight", "pos_start", "lvl_embed.weight"} <= set(state)
