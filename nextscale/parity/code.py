"""CoDe's golden cases: two models over one pyramid, teacher forcing of a prefix, and the distillation loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nextscale.core.heads import CategoricalEmitter
from nextscale.core.random import BatchDraws
from nextscale.core.schedule import Scale, ScaleSchedule
from nextscale.parity.building import build_model, build_tokenizer
from nextscale.parity.case import Case
from nextscale.parity.replay import Operations
from nextscale.tasks.generation.code import CoDe, OfficialDraws, hand_over
from nextscale.tasks.generation.code_training import distillation

operations = Operations()


@operations
def sample(case: Case) -> Mapping[str, Any]:
    """The drafter's scales, then the refiner's, with the official draw order."""
    options, tokenizer = case.options, build_tokenizer(case)
    drafted, seed = options["draft_steps"], options["seed"]
    model = CoDe([build_model(case, part, tokenizer) for part in ("drafter", "refiner")], [drafted]).eval()
    emitter = CategoricalEmitter(
        options["top_k"], options["top_p"], options["temperature"], smooth=options["more_smooth"]
    )
    draws = OfficialDraws(lambda: BatchDraws(None if seed is None else torch.Generator().manual_seed(seed)))
    steps = list(model.steps(case.tensor("labels"), draws=draws, emitter=emitter, guidance=options["cfg"]))
    totals = [step.total for step in steps]
    with torch.inference_mode():
        return {
            "hub": hand_over(totals[:drafted], tokenizer.quantizer, model.config.schedule).inputs,
            "tokens": torch.cat([step.tokens for step in steps], dim=1),
            "logits": torch.cat([step.logits for step in steps], dim=1),
            "codes": torch.cat([step.codes for step in steps], dim=1),
            "f_hats": torch.stack(totals),
            "image": model.picture(totals[-1]),
        }


@operations
def teacher_forcing(case: Case) -> Mapping[str, Any]:
    """Logits of the first positions only, from the true tokens."""
    model, tokens = build_model(case), case.tensor("tokens")
    labels = model.drop_labels(case.tensor("labels"), case.tensor("uniform"))
    kept = first_positions(model.config.schedule, case.options["mask_l"])
    with torch.inference_mode():
        inputs = model.tokenizer.quantizer.teacher_inputs(tokens, model.config.schedule)
        logits = model(inputs[:, : kept.length - kept.lengths[0]], labels, kept)
    return {"var_input": inputs, "labels_used": labels, "logits": logits}


def first_positions(schedule: ScaleSchedule, count: int) -> ScaleSchedule:
    """The scales of the first ``count`` positions; where the last is cut, what is left of it is a plain set of tokens.

    Levels, places and what each position sees follow from the numbers of tokens alone.
    """
    scales: list[Scale] = []
    for scale, (start, stop) in zip(schedule.scales, schedule.ranges, strict=True):
        if start < count:
            scales.append(scale if stop <= count else Scale(count - start, 1))
    return ScaleSchedule(tuple(scales))


@operations
def distill_loss(case: Case) -> Mapping[str, Any]:
    """The distillation loss and its gradient, one setting after the other."""
    teacher, targets = case.tensor("teacher"), case.tensor("targets")
    losses, gradients = [], []
    for setting in case.options["settings"]:
        student = case.tensor("student").requires_grad_()
        loss = distillation(
            student,
            teacher,
            targets,
            temperature=setting["temperature"],
            alpha=setting["alpha"],
            per_row=setting["per_row"],
        )
        loss.sum().backward()
        losses.append(loss.detach().expand(len(student)))
        gradients.append(student.grad)
    return {"loss": torch.stack(losses), "gradient": torch.stack([g for g in gradients if g is not None])}
