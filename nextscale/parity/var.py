"""VAR's golden cases: every operation of the official code, on this library's functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nextscale.core.heads import CategoricalEmitter
from nextscale.core.optim import Schedule, parameter_groups
from nextscale.core.quantizer import smoother_index
from nextscale.core.random import BatchDraws
from nextscale.core.sampling import Control
from nextscale.core.schedule import ScaleSchedule
from nextscale.datasets.sampler import EpochSampler
from nextscale.parity.building import (
    EVALUATION,
    KERNELS,
    build_model,
    build_tokenizer,
    in_official_names,
    model_config,
    norms,
    tokenizer_config,
)
from nextscale.parity.case import Case
from nextscale.parity.replay import Operations, ReplayError
from nextscale.tasks.generation.editing import KeptTokens, box_mask
from nextscale.tasks.generation.var import SYSTEM, VAR
from nextscale.tasks.generation.var_training import Stage, VARTraining, initialize, newest_weight
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ

operations = Operations()


@operations
def tokenize(case: Case) -> Mapping[str, Any]:
    """Image -> tokens -> image, with the tokenizer's own scales or others."""
    tokenizer = build_tokenizer(case)
    scales = case.options.get("scales")
    schedule = tokenizer.config.schedule if scales is None else ScaleSchedule.parse(scales)
    with torch.inference_mode():
        latents = tokenizer.features(case.tensor("images"))
        tokens, f_hats = tokenizer.quantizer.encode(latents, schedule)
        return {
            "latents": latents,
            "tokens": torch.cat(tokens, dim=1),
            "f_hats": torch.stack(f_hats),
            "recon": tokenizer.decode_features(f_hats[-1]),
        }


@operations
def detokenize(case: Case) -> Mapping[str, Any]:
    """Tokens -> sums of code maps, transformer inputs and images."""
    tokenizer, tokens = build_tokenizer(case), case.tensor("tokens")
    schedule = tokenizer.config.schedule
    with torch.inference_mode():
        return {
            "f_hats": torch.stack(tokenizer.quantizer.decode(tokens, schedule)),
            "var_input": tokenizer.quantizer.teacher_inputs(tokens, schedule),
            "recon": tokenizer.decode(tokens, schedule),
            "recon_ragged": tokenizer.decode_ragged(tokens, schedule),
        }


@operations
def tokenizer_train_step(case: Case) -> Mapping[str, Any]:
    """Loss and gradients of reconstruction plus vector quantisation, all that the official repository has."""
    tokenizer, images = build_tokenizer(case, training=True), case.tensor("images")
    output = tokenizer(images)
    loss = torch.nn.functional.mse_loss(output.reconstruction, images) + output.quantizer.loss
    loss.backward()
    gradients = in_official_names(tokenizer, {name: p.grad for name, p in tokenizer.named_parameters()})
    return {
        "vq_loss": output.quantizer.loss,
        "loss": loss,
        "recon": output.reconstruction,
        "grad_norms": norms(gradients, case.options["grad_names"]),
    }


@operations
def teacher_forcing(case: Case) -> Mapping[str, Any]:
    """Logits of all scales at once, from the true tokens."""
    model, tokens = build_model(case), case.tensor("tokens")
    labels = model.drop_labels(case.tensor("labels"), case.tensor("uniform"))
    with torch.inference_mode():
        inputs = model.tokenizer.quantizer.teacher_inputs(tokens, model.config.schedule)
        return {"var_input": inputs, "labels_used": labels, "logits": model(inputs, labels)}


@operations
def sample(case: Case) -> Mapping[str, Any]:
    """Class-conditional sampling with the official draw order."""
    model, labels, draws = build_model(case), case.tensor("labels"), _draws(case.options["seed"])
    if case.options["random_labels"]:
        labels = draws.integers(model.config.classes, len(labels))
    return {"labels_used": labels, **_sampled(case, model, labels, draws)}


@operations
def edit(case: Case) -> Mapping[str, Any]:
    """In-painting, out-painting and class-conditional editing, with the official draw order."""
    model, labels = build_model(case), case.tensor("labels")
    schedule, tokenizer = model.config.schedule, model.tokenizer
    tokens = tokenizer.encode(case.tensor("images"), schedule)
    mask = box_mask(schedule.final.grid, case.options["box"], keep_inside=not case.options["inpainting"])
    kept = KeptTokens(tokenizer.quantizer.lookup(tokens), mask, schedule)
    outputs = _sampled(case, model, labels, _draws(case.options["seed"]), [kept])
    return {"mask": mask, "image_tokens": tokens, **outputs}


def _sampled(
    case: Case, model: VAR, labels: Tensor, draws: BatchDraws, controls: Sequence[Control] = ()
) -> dict[str, Tensor]:
    """The options and outputs that sampling and editing share."""
    options = case.options
    emitter = CategoricalEmitter(options["top_k"], options["top_p"], smooth=options["more_smooth"])
    steps = list(model.steps(labels, draws=draws, emitter=emitter, guidance=options["cfg"], controls=controls))
    with torch.inference_mode():
        image = model.tokenizer.decode_features(steps[-1].total)
    return {
        "tokens": torch.cat([step.tokens for step in steps], dim=1),
        "logits": torch.cat([step.logits for step in steps], dim=1),
        "codes": torch.cat([step.codes for step in steps], dim=1),
        "f_hats": torch.stack([step.total for step in steps]),
        "image": (image + 1) / 2,
    }


@operations
def train_step(case: Case) -> Mapping[str, Any]:
    """Several optimiser steps of the official trainer on one batch, in evaluation form: nothing drops out."""
    options, model = case.options, build_model(case)
    task = _StagedTraining(model, options["label_smooth"], options["steps"])
    names, start = options["grad_names"], _parameters(model)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, options["weight_decay"]),
        lr=options["lr"],
        betas=tuple(options["betas"]),
        eps=options["eps"],
    )
    _check_decay(model, names, options["no_weight_decay"])
    batch = {
        "image": case.tensor("images"),
        "label": case.tensor("labels"),
        "uniform": case.tensor("uniform"),
    }
    outputs: dict[str, Any] = {name: [] for name in ("loss", "total_norm", "grad_norms", "metrics", "update_norms")}
    for step in range(len(task.stages)):
        optimizer.zero_grad()
        loss, metrics = task.loss(SYSTEM, model, batch, step)
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        outputs["grad_norms"].append(norms(in_official_names(model, gradients), names))
        outputs["total_norm"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), options["grad_clip"])))
        optimizer.step()
        updates = {name: value - start[name] for name, value in _parameters(model).items()}
        outputs["update_norms"].append(norms(in_official_names(model, updates), names))
        outputs["loss"].append(loss.item())
        # While scales are missing, the official trainer logs -1 for the last of them.
        outputs["metrics"].append([float(metrics.get(name, -1)) for name in _METRICS])
    return {"tokens": model.tokenizer.encode(batch["image"]), **outputs}


_METRICS = ("cross_entropy", "cross_entropy_last", "accuracy", "accuracy_last")


class _StagedTraining(VARTraining):
    """VAR's training with the stage of every step given, instead of following from the run's length."""

    def __init__(self, model: VAR, label_smoothing: float, steps: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(model, label_smoothing=label_smoothing)
        scales, self.stages = len(model.config.schedule), list[Stage]()
        newest, count, first = -1, 0, True
        for step in steps:
            if step["prog_si"] != newest:
                first = newest == -1
                newest, count = step["prog_si"], 0
            count += 1
            warmup = step["prog_wp_it"]
            whole = newest in (-1, scales - 1)
            weight = 1.0 if whole or first else newest_weight(count, warmup)
            self.stages.append(Stage(scales if whole else newest + 1, weight))

    def stage(self, step: int) -> Stage:
        return self.stages[step]


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _check_decay(model: VAR, names: Sequence[str], exempt: Sequence[str]) -> None:
    """The parameters without weight decay must be the ones the case names."""
    free = {id(p) for group in parameter_groups(model, 1.0) if not group["weight_decay"] for p in group["params"]}
    marks = {name: torch.full_like(p, float(id(p) in free)) for name, p in model.named_parameters()}
    exported = in_official_names(model, marks)
    ours = {name for name in names if exported[name].any()}
    if wrong := sorted(ours ^ set(exempt)):
        raise ReplayError(f"weight decay applies to other parameters than the case says: {', '.join(wrong)}")


@operations
def init_weights(case: Case) -> Mapping[str, Any]:
    """Statistics of the initial weights; the draws themselves are free."""
    options = case.options
    with torch.device("meta"):
        tokenizer = ResidualVQ(tokenizer_config(case.config["vae"]))
    case.config["vae"].ignore("dropout", "test_mode")
    config = model_config(case.config["var"], tokenizer)
    case.config["var"].ignore(*EVALUATION, *KERNELS)
    torch.manual_seed(options["seed"])
    model = initialize(
        VAR(config, tokenizer),
        modulation=options["init_adaln"],
        gate=options["init_adaln_gamma"],
        # Below 0 the official arguments mean: leave the head's weights alone, and choose the deviation.
        head=options["init_head"] if options["init_head"] >= 0 else 1.0,
        std=options["init_std"] if options["init_std"] >= 0 else None,
    )
    weights = {name: weight.detach() for name, weight in model.to_official().items()}
    values = [weights[name] for name in options["param_names"]]
    chunks = "blocks.{}.ada_gss" if config.transformer.conditioning == "shared" else "blocks.{}.ada_lin.1.weight"
    return {
        "rms": [_rms(value) for value in values],
        "constant": [float(value.min()) if value.min() == value.max() else math.nan for value in values],
        "chunk_rms": [
            [_rms(chunk) for chunk in weights[chunks.format(block)].reshape(6, -1)]
            for block in range(config.transformer.depth)
        ],
    }


def _rms(value: Tensor) -> float:
    return float(value.square().mean().sqrt())


@operations
def filter_logits(case: Case) -> Mapping[str, Any]:
    """Top-k and nucleus filters, one pair of settings after the other."""
    logits = case.tensor("logits")
    settings = zip(case.options["top_k"], case.options["top_p"], strict=True)
    probabilities = [CategoricalEmitter(top_k=k, top_p=p).probabilities(logits, index=0) for k, p in settings]
    seed = case.options["seed"]
    return {
        "probabilities": torch.stack(probabilities),
        "tokens": torch.stack([_draws(seed).categorical(each) for each in probabilities]),
    }


@operations
def tables(case: Case) -> Mapping[str, Any]:
    """What is decided by arithmetic alone: residual convolutions, rate and decay schedules, batches."""
    counts, scales = case.options["phi_counts"], case.options["phi_scales"]
    phi = np.full((len(counts), len(scales), max(scales)), -1)
    for row, count in enumerate(counts):
        for column, number in enumerate(scales):
            phi[row, column, :number] = smoother_index(count, number)
    rates, decays = [], []
    for options, steps in zip(case.options["schedules"], case.inputs["iterations"].tolist(), strict=True):
        plan = Schedule(
            kind=options["kind"],
            warmup=options["warmup"],
            total=options["total"],
            start=options["start"],
            end=options["end"],
            decay=options["wd"],
            decay_end=options["wd_end"],
        )
        rates.append([options["peak"] * plan.rate(step) for step in steps])
        decays.append([plan.weight_decay(step) for step in steps])
    return {
        "phi_index": phi,
        "phi_index_separate": phi,  # both forms look the convolution up by the same ticks
        "lr": np.array(rates),
        "weight_decay": np.array(decays),
        "batches": _batches(case.options["batches"]),
    }


def _batches(options: Mapping[str, Any]) -> np.ndarray:
    """(ranks, number, batch of a rank) sample indices; -1 where a batch is short."""
    ranks, number = options["world_size"], options["number"]
    size = options["global_batch"] // ranks
    batches = np.full((ranks, number, size), -1)
    for rank in range(ranks):
        sampler = EpochSampler(
            options["dataset_len"],
            batch_size=size,
            rank=rank,
            world_size=ranks,
            seed=options["seed"],
            shuffle=options["shuffle"],
            fill_last=options["fill_last"],
            contiguous=True,
        )
        for index, batch in enumerate(islice(sampler, number)):
            batches[rank, index, : len(batch)] = [sample for _, sample in batch]
    return batches


def _draws(seed: int | None) -> BatchDraws:
    """The official draw order: one CPU generator for the whole batch, or the global one."""
    return BatchDraws(None if seed is None else torch.Generator().manual_seed(seed))
