"""CAR's files: the official layout, and which base an adapter belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextscale.core import checkpoint
from nextscale.core.checkpoint import CheckpointError, KeyMap, find_state_dict
from nextscale.tasks.generation.official_layout import DERIVED, block_rules
from nextscale.tasks.generation.var import VAR, VARConfig

NESTED = (("trainer", "car_wo_ddp"), ("state_dict",), ("model",))
KEYS = KeyMap(
    [
        ("control_encoder", "car_control_convs"),
        ("token_conv", "car_var_conv"),
        ("skips.*.norm", "car_skip_norm.*"),
        ("skips.*.linear", "car_skip_linear.*"),
        *block_rules("control_blocks", "car_blocks"),
    ]
)
_FIRST = "car_control_convs.conv_in.weight"


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is a CAR, adapter or training snapshot, in the official layout."""
    try:
        state = find_state_dict(content, NESTED, _FIRST)
    except CheckpointError:
        return False
    return {"car_var_conv.weight", "car_skip_linear.0.weight"} <= set(state)


def split_official(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapter in a file's content, and the copy of its base that training snapshots hold (else empty).

    Raises:
        CheckpointError: the content is no CAR.
    """
    state = find_state_dict(content, NESTED, _FIRST)
    adapter = {name: value for name, value in state.items() if "car" in name}
    return adapter, {name: value for name, value in state.items() if name not in adapter}


@dataclass(frozen=True)
class AdapterSizes:
    """What an official adapter tells by itself.

    Attributes:
        depth, width: of the base it is for.
        widths: of the control encoder.
    """

    depth: int
    width: int
    widths: tuple[int, ...]


def adapter_sizes(adapter: Mapping[str, Tensor]) -> AdapterSizes:
    """Read from an official adapter's keys and shapes."""
    half = 1 + max((int(name.split(".")[1]) for name in adapter if name.startswith("car_blocks.")), default=-1)
    return AdapterSizes(2 * half, adapter["car_var_conv.weight"].shape[0], encoder_widths(adapter))


def encoder_widths(adapter: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Widths of the control encoder, from an official adapter's shapes."""
    widths = [adapter[_FIRST].shape[0]]
    while (name := f"car_control_convs.blocks.{2 * len(widths) - 1}.weight") in adapter:
        widths.append(adapter[name].shape[0])
    return tuple(widths)


# --- the base ------------------------------------------------------------------------------------------


def fingerprint(base: VAR) -> str:
    """A digest of a transformer's weights: an adapter fits one base only."""
    return checkpoint.fingerprint({k: v for k, v in base.state_dict().items() if not k.startswith("tokenizer.")})


def check_sizes(wanted: VARConfig, base: VAR) -> None:
    """Raises:

    CheckpointError: the base has other sizes than the adapter was made for.
    """
    ours, theirs = wanted.transformer, base.config.transformer
    pairs = {
        "blocks": (ours.depth, theirs.depth),
        "width": (ours.width, theirs.width),
        "heads": (ours.heads, theirs.heads),
        "conditioning": (ours.conditioning, theirs.conditioning),
        "attention": (ours.attention, theirs.attention),
        "classes": (wanted.classes, base.config.classes),
        "codes": (wanted.vocabulary, base.config.vocabulary),
        "scales": (str(wanted.schedule), str(base.config.schedule)),
    }
    wrong = [f"{name} {need} wanted, {have} there" for name, (need, have) in pairs.items() if need != have]
    if wrong:
        raise CheckpointError(
            f"the adapter belongs to another base ({'; '.join(wrong)}); give the VAR it was trained on"
        )


def check_official(adapter: Mapping[str, Tensor], copy: Mapping[str, Tensor], base: VAR) -> None:
    """Raises:

    CheckpointError: the base has other sizes than an official adapter, or is not the one of its snapshot.
    """
    sizes, transformer = adapter_sizes(adapter), base.config.transformer
    if (sizes.depth, sizes.width) != (transformer.depth, transformer.width):
        raise CheckpointError(
            f"the adapter is for a VAR of {sizes.depth} blocks of width {sizes.width}, the base has "
            f"{transformer.depth} of width {transformer.width}; give the VAR it was trained on"
        )
    if copy:
        own = {name: value for name, value in base.to_official().items() if name not in DERIVED}
        other = [k for k, v in own.items() if k in copy and (v.shape != copy[k].shape or not torch.equal(v, copy[k]))]
        if other:
            raise CheckpointError(
                f"the snapshot was trained on another base: {len(other)} of its weights differ, such as {other[0]}; "
                "give the VAR it was trained on"
            )
