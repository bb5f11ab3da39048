"""Starting from a trained VAR: other classes, another scale list, low-rank adapters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.core.schedule import Scale, ScaleSchedule
from nextscale.tasks.generation.var import VAR
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021) on every linear layer of the blocks.

    Attributes:
        rank: 0 trains all weights instead.
        alpha: the update is scaled by alpha / rank.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0


def adapt(
    model: VAR,
    *,
    classes: int,
    class_names: tuple[str, ...] | None = None,
    schedule: ScaleSchedule | None = None,
    tokenizer: ResidualVQ | None = None,
) -> tuple[VAR, set[str]]:
    """A model with the same blocks for other data.

    Another number of classes gets new class embeddings around the old ones' mean ("no class" is kept).
    Another scale list takes each scale's positions from the old scale of the nearest size, resized, and its
    level from the old scale at the same place of the list. Another tokenizer must have codes of the same
    width; with another vocabulary the head starts anew.

    Returns:
        The model and the names of the parameters that do not come from the old one as they were.
    """
    old, schedule = model.config, schedule or model.config.schedule
    tokenizer = tokenizer or model.tokenizer
    quantizer = tokenizer.config.quantizer
    config = replace(
        old,
        classes=classes,
        class_names=class_names,
        schedule=schedule,
        vocabulary=quantizer.vocabulary,
        code_channels=quantizer.channels,
    )
    adapted = VAR(config, tokenizer)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("tokenizer.")}
    changed: set[str] = set()
    weight = state["class_embedding.weight"]
    if classes != old.classes:
        rows = weight[:-1]
        spread = rows.std(0) if len(rows) > 1 else rows.abs().mean().expand(rows.shape[1])
        fresh = rows.mean(0) + torch.randn(classes, rows.shape[1]) * spread
        state["class_embedding.weight"] = torch.cat((fresh, weight[-1:]))
        changed.add("class_embedding.weight")
    if schedule != old.schedule:
        state["position_embedding"] = resize_positions(state["position_embedding"], old.schedule, schedule)
        nearest = [round(schedule.ratio(k) * (len(old.schedule) - 1)) for k in range(len(schedule))]
        state["level_embedding.weight"] = state["level_embedding.weight"][nearest].clone()
        start = state["start_position"].mean(1, keepdim=True)
        if schedule.lengths[0] != old.schedule.lengths[0]:
            state["start_position"] = start.repeat(1, schedule.lengths[0], 1)
            changed.add("start_position")
        changed |= {"position_embedding", "level_embedding.weight"}
    own = adapted.state_dict()
    for name in ("head.linear.weight", "head.linear.bias", "word_embedding.weight"):
        if state[name].shape != own[name].shape:
            state[name] = torch.zeros_like(own[name])
            if state[name].ndim == 2:
                nn.init.trunc_normal_(state[name], std=0.02)
            changed.add(name)
    adapted.load_state_dict(state, strict=False)
    return adapted, changed


def nearest_scales(old: ScaleSchedule, new: ScaleSchedule) -> list[int]:
    """For each new scale the old one of the nearest size."""

    def distance(a: Scale, b: Scale) -> float:
        return abs(a.height - b.height) + abs(a.width - b.width)

    return [min(range(len(old)), key=lambda k: distance(old[k], scale)) for scale in new.scales]


def resize_positions(positions: Tensor, old: ScaleSchedule, new: ScaleSchedule) -> Tensor:
    """Embeddings (1, length, channels) of another list: each scale's from the old one nearest in size, resized."""
    parts = old.split(positions)
    resized = []
    for scale, source in zip(new.scales, nearest_scales(old, new), strict=True):
        grid = parts[source].mT.unflatten(-1, old[source].grid)
        if old[source].grid != scale.grid:
            grid = F.interpolate(grid, size=scale.grid, mode="bicubic")
        resized.append(grid.flatten(2).mT)
    return torch.cat(resized, dim=1)


def add_lora(model: VAR, config: LoRAConfig, changed: set[str]) -> VAR:
    """Freeze the model, put adapters on its blocks, and leave what is new trainable.

    Args:
        changed: parameters that :func:`adapt` made anew; they train in full.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    model.requires_grad_(False)
    targets = r"transformer\.blocks\.\d+\.(attention\.(qkv|projection)|feed_forward\.(expand|contract))"
    peft_config = PeftConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets
    )
    inject_adapter_in_model(peft_config, model)
    for name, parameter in model.named_parameters():
        if name in changed:
            parameter.requires_grad_(True)
    return model


def merge_lora(model: VAR) -> VAR:
    """Fold adapters into the weights: a plain VAR again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge()
                setattr(module, name, child.get_base_layer())
    return model
