"""STAR's golden cases: every operation of the official code, on this library's functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.core.cross_attention import Packed
from nextscale.core.optim import parameter_groups
from nextscale.core.quantizer import smoother_index
from nextscale.core.sampling import ScaleContext
from nextscale.core.schedule import ScaleSchedule
from nextscale.parity.building import check_decay, in_official_names, norms
from nextscale.parity.case import Case
from nextscale.parity.replay import Operations, ReplayError
from nextscale.parity.star_building import build_model, build_tokenizer
from nextscale.tasks.generation.star import STAR, SYSTEM
from nextscale.tasks.generation.star_head import commit_counts
from nextscale.tasks.generation.star_sampling import RANDOM_STEPS, Filling, ReleasedDraws, STAREmitter
from nextscale.tasks.generation.star_training import (
    STARHeadTraining,
    STARLossConfig,
    STARTraining,
    kept_places,
    known_tokens,
)
from nextscale.tasks.generation.star_transformer import rotation_of
from nextscale.tasks.generation.text import TextFeatures

operations = Operations()


@operations
def tables(case: Case) -> Mapping[str, Any]:
    """What is decided by arithmetic alone."""
    sides = case.options["patch_nums"]
    schedule = ScaleSchedule.squares(*sides)
    arguments = case.config["transformer"]
    span = arguments["rope_norm"]
    rotation = rotation_of(
        schedule,
        arguments["embed_dim"] // arguments["num_heads"],
        arguments["rope_theta"],
        None if span == -1 else float(span),
    )
    counts = np.zeros((2, len(sides), 15), np.int64)
    for row, steps in enumerate((8, 15)):
        for column, tokens in enumerate(schedule.lengths):
            counts[row, column, :steps] = commit_counts(tokens, steps)
    tokenizer = case.config["tokenizer"]
    smoothers = tokenizer["share_quant_resi"] or tokenizer["default_qresi_counts"] or len(tokenizer["v_patch_nums"])
    arguments.ignore("*")
    tokenizer.ignore("*")
    return {
        "phi_index": np.array(smoother_index(smoothers, len(sides))),
        "rope": torch.stack((rotation.cos, rotation.sin), dim=-1),
        "commit_counts": counts,
    }


@operations
def tokenize(case: Case) -> Mapping[str, Any]:
    """Image -> tokens -> image."""
    tokenizer = build_tokenizer(case)
    quantizer, schedule = tokenizer.quantizer, tokenizer.config.schedule
    with torch.inference_mode():
        latent = tokenizer.features(case.tensor("image"))
        tokens, totals = quantizer.encode(latent, schedule)
        return {
            "latent": latent,
            "tokens": torch.cat(tokens, dim=1),
            "next_inputs": quantizer.teacher_inputs(torch.cat(tokens, dim=1), schedule),
            "f_hat": totals[-1],
            "reconstruction": tokenizer.decode_features(totals[-1]),
        }


def _text(case: Case) -> TextFeatures:
    """The texts of a case, without what their mask hides."""
    states, mask = case.tensor("text"), case.tensor("text_mask") == 1
    return TextFeatures(Packed(states[mask], tuple(mask.sum(1).tolist())), case.tensor("pooled"))


def _loss_config(case: Case, **options: Any) -> STARLossConfig:
    """The trainer's options; where tokens are left out, it sums over the batch."""
    return STARLossConfig(length=case.config["transformer"]["drop_scale_length"] or 0, cut_sum=True, **options)


@operations
def teacher_forcing(case: Case) -> Mapping[str, Any]:
    """Scores of all scales at once."""
    model, text, inputs = build_model(case), _text(case), case.tensor("next_inputs")
    schedule = model.config.schedule
    config = _loss_config(case)
    keep = kept_places(schedule, config, case.tensor("drop_permutation")) if config.length else None
    with torch.inference_mode():
        features = model.hidden(inputs, text, schedule, keep)
        return {
            "logits": model.scores(features),
            "features": features,
            "kept_positions": torch.arange(schedule.length) if keep is None else keep,
        }


# --- training -----------------------------------------------------------------------------------------


@operations
def train_step(case: Case) -> Mapping[str, Any]:
    """One step of the backbone's training."""
    model = build_model(case, build_tokenizer(case))
    task = STARTraining(model, _loss_config(case, label_smoothing=case.options["label_smoothing"]))
    batch = {"image": case.tensor("image"), "text": _text(case)}
    if task.config.length:
        batch["permutation"] = case.tensor("drop_permutation")
    groups = parameter_groups(model, case.options["weight_decay"])
    outputs, metrics = _step(case, model, task, batch, groups)
    accuracy = [metrics["accuracy"], metrics["accuracy_last"]]
    return outputs | {
        "metrics": [float(metrics["cross_entropy"]), float(metrics["cross_entropy_last"])],
        "accuracy": [float(each) for each in accuracy],
    }


@operations
def train_sampler_step(case: Case) -> Mapping[str, Any]:
    """One step of the sampling head's training; the official optimiser decays everything in it."""
    if case.config["transformer"]["train_mode"] != "head_only":
        raise ReplayError("the sampling head is trained with train_mode head_only, which freezes the rest")
    model = build_model(case, build_tokenizer(case))
    task = STARHeadTraining(model, _loss_config(case, label_smoothing=case.options["label_smoothing"]))
    ratio, uniform = case.tensor("ratio_uniform"), case.tensor("mask_uniform")
    batch = {"image": case.tensor("image"), "text": _text(case), "ratio": ratio, "known_uniform": uniform}
    logits: list[Tensor] = []
    model.register_forward_hook(lambda module, inputs, output: logits.append(output.detach()))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trained, "weight_decay": case.options["weight_decay"]}]
    outputs, metrics = _step(case, model, task, batch, groups)
    return outputs | {
        "metrics": [float(metrics["cross_entropy"])] * 2,
        "accuracy": [float(metrics["accuracy"])] * 2,
        "sampler_logits": logits[0],
        "known": known_tokens(ratio, uniform).long(),
    }


def _step(
    case: Case, model: STAR, task: STARTraining | STARHeadTraining, batch: dict[str, Any], groups: list[dict[str, Any]]
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Loss, gradients, clipping and one update of AdamW."""
    options, names = case.options, case.options["grad_names"]
    check_decay(model, groups, names, options["decayed"])
    optimizer = torch.optim.AdamW(
        groups, lr=options["learning_rate"], betas=tuple(options["betas"]), eps=options["eps"]
    )
    loss, metrics = task.loss(SYSTEM, model, batch, 0)
    loss.backward()
    gradients = norms(in_official_names(model, {name: p.grad for name, p in model.named_parameters()}), names)
    total = float(torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None],
                                                 options["clip_norm"]))  # fmt: skip
    optimizer.step()
    updated = in_official_names(model, {name: p.detach() for name, p in model.named_parameters()})
    return {
        "loss": loss,
        "grad_norms": gradients,
        "grad_total_norm": total,
        "param_norms_after": norms(updated, names),
    }, metrics


# --- sampling -----------------------------------------------------------------------------------------


class _GivenDraws(ReleasedDraws):
    """The likeliest symbol, or the one that a given number points at; confidence as given."""

    def __init__(self, confidence: Tensor, uniforms: Tensor | None) -> None:
        self._confidence, self._uniforms = confidence, uniforms
        self._symbols = self._tokens = self._asked = 0

    def begin_step(self, images: int, tokens: int) -> None: ...

    def categorical(self, probabilities: Tensor) -> Tensor:
        if self._uniforms is None:
            return probabilities.argmax(-1)
        count = probabilities.shape[1]
        uniform = self._uniforms[:, self._symbols : self._symbols + count, None]
        self._symbols += count
        if uniform.shape[1] != count:
            raise ReplayError(f"the case gives {self._uniforms.shape[1]} uniforms a sample, more are asked for")
        last = probabilities.shape[-1] - 1
        return (probabilities.double().cumsum(-1) <= uniform).sum(-1).clamp(max=last)

    def uniform(self, shape: Sequence[int], device: torch.device) -> Tensor:
        step, count = self._asked % RANDOM_STEPS, shape[1]
        self._asked += 1
        given = self._confidence[step, :, self._tokens : self._tokens + count]
        if step == RANDOM_STEPS - 1:
            self._tokens += count
        return given


class _Recording(STAREmitter):
    """Keeps what the stable sampler did."""

    fillings: list[Filling]

    def fill(self, context: ScaleContext) -> Filling:
        filling = super().fill(context)
        # Where all was known before the last step, that step's scores were not computed.
        if int(filling.known_at.max()) + 1 < self.steps(context.index)[0]:
            codes = context.pyramid.vectors[filling.tokens]
            filling.logits = self.head_logits(context, codes)
        self.fillings.append(filling)
        return filling


@operations
def sample(case: Case) -> Mapping[str, Any]:
    """Sampling with given draws; rows are the prompts, then what to stay away from."""
    options = case.options
    model = build_model(case, build_tokenizer(case))
    schedule = model.config.schedule
    rows = _text(case)
    images = len(rows) // 2
    stable = options["w_mask"] and model.stable is not None
    guidance = float(options["cfg"])
    emitter = _Recording(
        (guidance,) * len(schedule),
        model.config.stable_from if stable else None,
        options["sample_version"],
        options["top_k"],
        options["top_p"],
        smooth=options.get("more_smooth", False),
    )
    object.__setattr__(emitter, "fillings", [])
    uniforms = case.tensor("uniforms") if _by_number(options["draw"]) else None
    draws = _GivenDraws(case.tensor("confidence_noise"), uniforms)
    steps = list(
        model.steps(
            rows.select(range(images)),
            other=rows.select(range(images, 2 * images)),
            draws=draws,
            guidance=guidance,
            emitter=emitter,
            share_first=True,
        )
    )
    with torch.inference_mode():
        image = model.picture(steps[-1].total)
    plain = [step.logits for step in steps[: len(steps) - len(emitter.fillings)]]
    vocabulary = model.config.vocabulary
    none, unknown = torch.empty(images, 0, vocabulary), torch.empty(images, 0, dtype=torch.long)
    return {
        "tokens": torch.cat([step.tokens for step in steps], dim=1),
        "logits": torch.cat([none, *plain], dim=1),
        "stable_logits": torch.cat([none, *(each.logits for each in emitter.fillings)], dim=1),
        "known_step": torch.cat([unknown, *(each.known_at for each in emitter.fillings)], dim=1),
        "image": image,
    }


def _by_number(draw: str) -> bool:
    if draw not in ("argmax", "uniform"):
        raise ReplayError(f"draw is {draw!r}; expected argmax or uniform")
    return draw == "uniform"
