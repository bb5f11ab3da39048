"""DepthART's official state dict: the transformer's names, the tokenizer inside, and what follows from the sizes.

Read off bulatko/DepthART, ``mde/models/train_models/var_utils``. The file holds the whole tokenizer as ``vae_proxy.*``
and its quantiser once more as ``vae_quant_proxy.*``; a safetensors file can hold only one of the two names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nextscale.core.checkpoint import CheckpointError, KeyMap, find_state_dict
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.official_layout import (
    DERIVED,
    MODEL_RULES,
    from_layout,
    to_layout,
    transformer_config,
)
from nextscale.tasks.generation.var import schedule_from_official
from nextscale.tasks.tokenizers.image_tokenizer import ImageTokenizer
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ

if TYPE_CHECKING:
    from nextscale.tasks.depth.depthart import DepthARTConfig

TOKENIZER, QUANTIZER = "vae_proxy.", "vae_quant_proxy."
NESTED = (("state_dict",), ("model",))
NORMALIZER = ("normalizer.alpha", "normalizer.beta")
SCALES = "attn.scale_mul_1H11"
_KEYS = KeyMap(MODEL_RULES)
_MASK = "attn_bias_for_masking"


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is a DepthART or DepthVAR, in the official layout."""
    try:
        state = find(content)
    except CheckpointError:
        return False
    return "class_emb.weight" in state and any(name.startswith((TOKENIZER, QUANTIZER)) for name in state)


def find(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The flat state dict in a file's content."""
    return find_state_dict(content, NESTED, "pos_1LC")


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The transformer's own entries, and the tokenizer's under the names it has alone, whichever copy there is."""
    own = {name: value for name, value in state.items() if not name.startswith((TOKENIZER, QUANTIZER))}
    copies = {f"quantize.{n.removeprefix(QUANTIZER)}": v for n, v in state.items() if n.startswith(QUANTIZER)}
    return own, copies | {n.removeprefix(TOKENIZER): v for n, v in state.items() if n.startswith(TOKENIZER)}


def sizes(state: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration is told by a file's keys and shapes, and by ``given`` where they are silent.

    Raises:
        CheckpointError: an entry that sizes are read from is missing, or the scale list cannot be told.
    """
    unused = f"blocks.0.{SCALES}" in state
    names = ("heads", "norm_eps", "drop_path", "attention_scale")
    told = {"drop_path": 1 / 15, **{name: given[name] for name in names if given.get(name) is not None}}
    if unused:  # the release scales by 1 where these are, and then does not read them
        told.setdefault("attention_scale", 1.0)
    transformer = transformer_config(state, **told, attention="dot")
    try:
        code_channels = state["word_embed.weight"].shape[1]
        classes, vocabulary = state["class_emb.weight"].shape[0] - 1, state["head.weight"].shape[0]
        schedule = given.get("schedule") or schedule_from_official(state)
    except KeyError as error:
        raise CheckpointError(f"the state dict lacks an entry of DepthART: {error}") from None
    training = given.get("training") or ("plain" if _MASK in state else "refined")
    normalizer = given.get("normalizer")
    found = {
        "transformer": transformer,
        "training": training,
        "classes": classes,
        "vocabulary": vocabulary,
        "code_channels": code_channels,
        "schedule": ScaleSchedule.parse(schedule),
        "unused_scales": unused,
    }
    if normalizer is None and all(name in state for name in NORMALIZER):
        from nextscale.tasks.depth.depthart_normalizer import DepthNormalizer

        alpha, beta = (float(state[name]) for name in NORMALIZER)
        found["normalizer"] = DepthNormalizer(alpha=alpha, beta=beta)
    return found


def find_tokenizer(
    inner: Mapping[str, Tensor],
    given: ImageTokenizer | str | Path | None,
    schedule: ScaleSchedule,
    overrides: Mapping[str, Any],
) -> ImageTokenizer:
    """The tokenizer that is given, else the one inside the file.

    Raises:
        CheckpointError: there is none.
    """
    if isinstance(given, ImageTokenizer):
        return given
    told = {name: overrides.get(name) for name in ("unit_norm", "smoothing", "beta", "norm_groups")}
    if given is not None:
        return ResidualVQ.load(given, **({} if Path(given).is_dir() else {**told, "schedule": schedule}))
    if "quant_conv.weight" not in inner:
        raise CheckpointError(
            "the file holds no tokenizer (vae_proxy.*): give VAR's, vae_ch160v4096z32.pth: tokenizer=PATH in Python, "
            "--tokenizer PATH on the command line"
        )
    return ResidualVQ.from_official(inner, schedule=schedule, **told)


def from_official(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's entries under this library's names, without what follows from sizes or is never read."""
    ignored = {*DERIVED, *NORMALIZER, *(name for name in own if name.endswith(SCALES))}
    return from_layout(_KEYS, own, ignored)


def to_official(
    config: DepthARTConfig, own: Mapping[str, Tensor], tokenizer: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The whole official state dict.

    Args:
        own: the transformer's state dict; ``tokenizer`` the tokenizer's, in its official layout.

    Raises:
        ValueError: the official code has no such network.
    """
    if config.transformer.attention == "cosine":
        raise ValueError("this model has cosine attention, which DepthART's code does not compute: it has no such form")
    state = to_layout(_KEYS, own)
    if config.unused_scales:
        blocks, heads = config.transformer.depth, config.transformer.heads
        state |= {f"blocks.{block}.{SCALES}": torch.full((1, heads, 1, 1), 4.0).log() for block in range(blocks)}
    state["lvl_1L"] = config.schedule.levels()[None].clone()
    if config.training == "plain":
        state[_MASK] = _mask(config.schedule)
    if config.normalizer.affine:
        values = (config.normalizer.alpha, config.normalizer.beta)
        state |= {name: torch.tensor(float(value)) for name, value in zip(NORMALIZER, values, strict=True)}
    state |= {f"{TOKENIZER}{name}": value for name, value in tokenizer.items()}
    inside = {n.removeprefix("quantize."): v for n, v in tokenizer.items() if n.startswith("quantize.")}
    return state | {f"{QUANTIZER}{name}": value for name, value in inside.items()}


def _mask(schedule: ScaleSchedule) -> Tensor:
    """DepthVAR's buffer, (2 length, 2 length): 0 where a row sees a column, else -inf."""
    length = schedule.length
    mask = torch.full((2 * length, 2 * length), -math.inf)
    mask[:, :length] = 0
    mask[:length, length] = 0
    mask[length:, length:].masked_fill_(schedule.mask(), 0)
    return mask
