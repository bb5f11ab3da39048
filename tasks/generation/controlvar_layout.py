"""ControlVAR's configuration, and what an official file tells of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from nextscale.core.checkpoint import CheckpointError, KeyMap, find_state_dict
from nextscale.core.schedule import ScaleSchedule
from nextscale.datasets.imagenet import IMAGENET
from nextscale.tasks.generation import var
from nextscale.tasks.generation.controls import Extraction
from nextscale.tasks.generation.controlvar_pairs import Halves, paired
from nextscale.tasks.generation.var import VARConfig
from nextscale.tasks.tokenizers.residual_vq import SCHEDULE_256

CONTROL_TYPES = ("mask", "canny", "depth", "normal")
"""What the released models know, in the order of their type embedding; one more row stands for no type."""

PAIRS_256 = paired(SCHEDULE_256)


@dataclass(frozen=True)
class ControlVARConfig(VARConfig):
    """Attributes:

    schedule: two streams per scale.
    control_types: names of the kinds of control; a type may be asked for by its name.
    type_drop: probability that a type is replaced by "no type" in training.
    type_start: the control's first token starts from a vector of its type, not from the class.
    either_order: trained with the control first and with the image first. Without ``type_start`` the first half's
        start is then negated where the control comes first, and the second half's where the image does.
    half_embedding: a vector for control and one for image is added to every token.
    halves: what the two maps of one scale see of each other.
    extractions: how controls were made of photographs in training, where that is known.
    """

    schedule: ScaleSchedule = PAIRS_256
    guidance: float = 4.0
    control_types: tuple[str, ...] = CONTROL_TYPES
    type_drop: float = 0.1
    type_start: bool = True
    either_order: bool = False
    half_embedding: bool = False
    halves: Halves = "joined"
    extractions: tuple[Extraction, ...] = ()

    def __post_init__(self) -> None:
        if any(scale.streams != 2 for scale in self.schedule.scales):
            raise ValueError(f"the scales '{self.schedule}' are no pairs; make them so with paired(schedule)")


def _released(depth: int) -> ControlVARConfig:
    config = ControlVARConfig.of_depth(depth, class_names=IMAGENET)
    # Of the released files the largest alone has a learned attention scale.
    return replace(config, transformer=replace(config.transformer, attention="cosine" if depth == 30 else "dot"))


PRESETS: dict[str, ControlVARConfig] = {f"controlvar-d{depth}": _released(depth) for depth in (12, 16, 20, 24, 30)}
"""Released models, by name."""


# --- the official checkpoint --------------------------------------------------------------------------

NESTED = (("model_state_dict",), ("state_dict",), ("model",))
BUFFERS = ("type_1L", "type_1L_")
"""Those that follow from the scale list, beside VAR's."""

KEYS = KeyMap([("type_embedding", "cond_embed"), ("half_embedding", "type_embed")])
"""The names of what VAR does not have."""


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is a ControlVAR, in the official layout: a VAR that starts with pairs of tokens."""
    try:
        state = find_state_dict(content, NESTED, "pos_1LC")
    except CheckpointError:
        return False
    if not {"lvl_embed.weight", "class_emb.weight", "word_embed.weight", "pos_start"} <= set(state):
        return False
    # Half of what VAR starts with is a square number of tokens; so is the whole for no pair.
    return bool({"cond_embed.weight", "type_embed.weight"} & set(state)) or state["pos_start"].shape[1] == 2


def config_from_official(state: Mapping[str, Tensor], **overrides: Any) -> ControlVARConfig:
    """The configuration that an official state dict's keys and shapes imply.

    Raises:
        CheckpointError: an entry that sizes are read from is missing, the scale list cannot be told, or the model has
            separator tokens.
    """
    if "special_embed.weight" in state:
        raise CheckpointError("this ControlVAR has separator tokens (special_embed), which no published code can run")
    # Every other position of a pair's sequence: as many as one half has, at the same scales.
    half = {name: state[name][:, ::2] for name in ("pos_1LC", "lvl_1L") if name in state}
    base = var.config_from_official({**state, **half}, **overrides)
    rows = len(state["cond_embed.weight"]) if "cond_embed.weight" in state else 1 + len(CONTROL_TYPES)
    names = overrides.get("control_types")
    if names is None:
        names = CONTROL_TYPES if rows == 1 + len(CONTROL_TYPES) else tuple(f"type {i}" for i in range(rows - 1))
    if len(names) != rows - 1:
        raise CheckpointError(f"the file knows {rows - 1} control types, {len(names)} names were given")
    values = {f.name: getattr(base, f.name) for f in fields(base) if f.name not in ("schedule", "guidance")}
    return ControlVARConfig(
        **values,
        schedule=paired(base.schedule),
        control_types=tuple(names),
        type_drop=base.label_drop,
        type_start="cond_embed.weight" in state,
        half_embedding="type_embed.weight" in state,
        either_order=bool(overrides.get("either_order", False)),
        halves=overrides.get("halves") or _halves(state),
    )


def _halves(state: Mapping[str, Tensor]) -> Halves:
    """What the halves of a scale see of each other: from the mask, where the file holds it."""
    if "attn_bias_for_masking" not in state:
        return "joined"
    first, last = state["attn_bias_for_masking"][0, 0, 0], state["attn_bias_for_masking"][0, 0]
    count = state["pos_start"].shape[1]
    if first[count - 1] == 0:
        return "joined"
    return "one-way" if last[count - 1, 0] == 0 else "apart"
