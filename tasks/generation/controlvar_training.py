"""Training ControlVAR: the cross-entropy of control and image together (arXiv 2406.09750; official ``train.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import Batch, Metrics
from nextscale.tasks.generation.class_recipe import ClassTraining
from nextscale.tasks.generation.controlvar import SYSTEM, ControlVAR, ControlVARConfig
from nextscale.tasks.generation.controlvar_pairs import paired, second_half, single, unweave, weave
from nextscale.tasks.generation.var import VAR
from nextscale.tasks.generation.var_finetune import nearest_scales, resize_positions
from nextscale.tasks.generation.var_training import initialize

BLACK_FROM = 5
"""The first scale at which what is black in a mask does not count."""


def pair_loss(
    logits: Float[Tensor, "batch length vocabulary"],
    tokens: Int[Tensor, "batch length"],
    weights: Float[Tensor, "batch length"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "batch length"]]:
    """Mean cross-entropy of all tokens, those of both halves alike, and that of every token.

    Args:
        weights: of the tokens, in sequence order; the mean is then over them.
    """
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)
    mean = loss.mean() if weights is None else (loss * weights).mean() / (weights.mean() + 1e-6)
    return mean, loss


def mask_weights(
    control: Float[Tensor, "batch 3 height width"],
    schedule: ScaleSchedule,
    is_mask: Tensor,
    control_first: bool = True,
) -> Float[Tensor, "batch length"]:
    """0 for tokens of a mask's black background at the finer scales, else 1; the image's tokens all count.

    Args:
        control: in [-1, 1].
        schedule: of pairs.
        is_mask: bool (batch,): whether the control is a mask.
    """
    colored = ((control.sum(1, keepdim=True) > -3) | ~is_mask[:, None, None, None]).float()
    half = [
        F.interpolate(colored, size=scale.grid, mode="nearest").flatten(1)
        if index >= BLACK_FROM
        else control.new_ones(len(control), scale.height * scale.width)
        for index, scale in enumerate(schedule.scales)
    ]
    part = torch.cat(half, dim=1)
    pair = (part, torch.ones_like(part)) if control_first else (torch.ones_like(part), part)
    return weave(*pair, single(schedule).lengths)


class ControlVARTraining(ClassTraining):
    """Trains a :class:`ControlVAR`.

    A batch holds ``label``; ``type``, places in ``places``; ``image`` and ``control`` (batch, 3,
    height, width) in [-1, 1], or ``image_tokens`` and ``control_tokens`` of one half each; ``uniform`` and
    ``type_uniform`` in [0, 1), which decide the dropout of classes and types, independently; where the model is trained
    in either order, ``image_first``, a bool for the whole batch.

    Args:
        ignore_black: leave the black background of masks out of the loss at the finer scales; needs pictures.
        places: of each of the data's types, its place in the model's control types; None: the same.
    """

    name = SYSTEM

    def __init__(self, model: ControlVAR, *, ignore_black: bool = False, places: Sequence[int] | None = None) -> None:
        self.model, self.ignore_black = model, ignore_black
        self._places = torch.tensor(range(len(model.config.control_types)) if places is None else places)
        self.phases: dict[str, nn.Module] = {SYSTEM: model}

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        model = self.model
        control, image = self.tokens(batch)
        control_first = not (model.config.either_order and batch.get("image_first", False))
        tokens, inputs = model.join(control, image, control_first)
        labels = model.drop_labels(batch["label"], batch["uniform"])
        known = self._places.to(batch["type"].device)[batch["type"]]
        types = model.drop_types(known, batch["type_uniform"])
        logits = module(inputs, labels, None, types, control_first)
        weights = None
        if self.ignore_black and "mask" in model.config.control_types:
            is_mask = known == model.config.control_types.index("mask")
            weights = mask_weights(batch["control"], model.config.schedule, is_mask, control_first)
        loss, each = pair_loss(logits, tokens, weights)
        return loss, self._metrics(each.detach(), logits, tokens, control_first)

    def evaluate(self, batch: Batch) -> Metrics:
        return super().evaluate({**batch, "type_uniform": torch.ones_like(batch["uniform"]), "image_first": False})

    def _metrics(self, each: Tensor, logits: Tensor, tokens: Tensor, control_first: bool) -> Metrics:
        schedule = self.model.config.schedule
        second = second_half(schedule, each.device).bool()
        image = second if control_first else ~second
        with torch.no_grad():
            right = (logits.argmax(-1) == tokens).float() * 100
            return {
                "cross_entropy": each.mean(),
                "cross_entropy_control": each[:, ~image].mean(),
                "cross_entropy_image": each[:, image].mean(),
                "accuracy": right.mean(),
            }

    def tokens(self, batch: Batch) -> tuple[Int[Tensor, "batch half"], Int[Tensor, "batch half"]]:
        """Tokens of the controls and of the images."""
        if "image_tokens" in batch:
            return batch["control_tokens"], batch["image_tokens"]
        pictures = torch.cat((batch["control"], batch["image"]))
        # The frozen tokenizer works in its own precision, outside autocast.
        with torch.no_grad(), torch.autocast(pictures.device.type, enabled=False):
            control, image = self.model.tokenizer.encode(pictures, single(self.model.config.schedule)).chunk(2)
        return control, image


def from_var(base: VAR, *, repeat_positions: bool = False, **changes: Any) -> ControlVAR:
    """A ControlVAR that starts from a trained VAR.

    Both halves of a scale take the base's positions of that scale, and its start. A type starts as "no class" does,
    with a little noise.

    Args:
        repeat_positions: as the official script does: all positions of the base one after the other twice, although the
            sequence alternates within every scale; new starts and types are drawn at random.
        changes: fields of :class:`ControlVARConfig`.
    """
    values = {f.name: getattr(base.config, f.name) for f in fields(base.config) if f.name != "guidance"}
    config = ControlVARConfig(**{**values, "schedule": paired(base.config.schedule), **changes})
    model = ControlVAR(config, base.tokenizer)
    initialize(model)
    state = {k: v for k, v in base.state_dict().items() if not k.startswith("tokenizer.")}
    positions, lengths = state["position_embedding"], base.config.schedule.lengths
    if repeat_positions:
        state["position_embedding"] = positions.repeat(1, 2, 1)
        del state["start_position"]
    else:
        state["position_embedding"] = weave(positions, positions, lengths)
        state["start_position"] = state["start_position"].repeat(1, 2, 1)
        if config.type_start:
            row = state["class_embedding.weight"][-1]
            noise = torch.randn_like(model.type_embedding.weight) * state["class_embedding.weight"].std() * 0.1
            state["type_embedding.weight"] = row + noise
        if config.half_embedding:
            state["half_embedding.weight"] = torch.zeros_like(model.half_embedding.weight)
    model.load_state_dict(state, strict=False)
    return model


def with_scales(model: ControlVAR, schedule: ScaleSchedule) -> ControlVAR:
    """A ControlVAR that goes on with another list of scales.

    Positions and levels of each scale are those of the old scale of the nearest size, positions resized.

    Args:
        schedule: of one half.
    """
    old = single(model.config.schedule)
    adapted = ControlVAR(replace(model.config, schedule=paired(schedule)), model.tokenizer)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("tokenizer.")}
    halves = [resize_positions(half, old, schedule) for half in unweave(state["position_embedding"], old.lengths)]
    state["position_embedding"] = weave(halves[0], halves[1], schedule.lengths)
    state["level_embedding.weight"] = state["level_embedding.weight"][nearest_scales(old, schedule)].clone()
    if schedule.lengths[0] != old.lengths[0]:
        start = state["start_position"].unflatten(1, (2, -1)).mean(2, keepdim=True)
        state["start_position"] = start.expand(-1, -1, schedule.lengths[0], -1).flatten(1, 2).clone()
    adapted.load_state_dict(state, strict=False)
    return adapted
