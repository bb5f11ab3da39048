"""CAR's golden cases: the tokenizer's, the controlled transformer's, and those of control pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.core.heads import CategoricalEmitter
from nextscale.core.optim import parameter_groups
from nextscale.core.random import BatchDraws
from nextscale.core.schedule import ScaleSchedule
from nextscale.parity.building import KERNELS, build_tokenizer, given_drop_path, model_config, norms
from nextscale.parity.case import Case
from nextscale.parity.replay import Operations, ReplayError
from nextscale.tasks.generation.car import CAR
from nextscale.tasks.generation.car_files import split_official
from nextscale.tasks.generation.car_parts import ControlFeatures
from nextscale.tasks.generation.controls_canny import canny
from nextscale.tasks.generation.controls_edges import sketch, thin
from nextscale.tasks.generation.controls_resize import pyramid, resize_for_detector, squash
from nextscale.tasks.generation.var import VAR

operations = Operations()


@operations
def tokenize(case: Case) -> Mapping[str, Any]:
    """Image -> tokens -> image, and what enters the transformer."""
    tokenizer = build_tokenizer(case)
    schedule, quantizer = tokenizer.config.schedule, tokenizer.quantizer
    with torch.inference_mode():
        latents = tokenizer.features(case.tensor("images"))
        found, f_hats = quantizer.encode(latents, schedule)
        tokens = torch.cat(found, dim=1)
        return {
            "latents": latents,
            "tokens": tokens,
            "f_hats": torch.stack(f_hats),
            "var_input": quantizer.teacher_inputs(tokens, schedule),
            "recon": tokenizer.decode_features(f_hats[-1]),
            "recon_unclamped": tokenizer.decoder(tokenizer.post_quant_conv(f_hats[-1])),
        }


def build(case: Case, training: bool = False) -> CAR:
    """The case's adapter on its base; the state dict holds both."""
    arguments, tokenizer = case.config["car"], build_tokenizer(case)
    arguments.ignore(*KERNELS)
    for name in ("drop_rate", "attn_drop_rate"):
        if not training:
            arguments.ignore(name)
        elif arguments[name]:
            raise ReplayError(f"{name} is {arguments[name]}: its draws are random, so no case can be met")
    settings = model_config(arguments, tokenizer)
    if settings.schedule != tokenizer.config.schedule:
        raise ReplayError(f"the transformer's scales '{settings.schedule}' are not the tokenizer's")
    adapter, state = split_official(case.state_dict("car"))
    base = VAR.from_official(
        state,
        tokenizer,
        schedule=settings.schedule,
        heads=settings.transformer.heads,
        norm_eps=settings.transformer.norm_eps,
    )
    if base.config.classes != settings.classes:
        raise ReplayError(f"the weights are for {base.config.classes} classes, the case says {settings.classes}")
    rate = arguments["drop_path_rate"]
    for layer, block in enumerate(base.transformer.blocks):
        block.drop_probability = rate * layer / max(settings.transformer.depth - 1, 1)
    ours, theirs = settings.transformer, base.config.transformer
    for name in ("width", "depth", "mlp_ratio", "conditioning", "attention"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ReplayError(f"{name}: the weights say {getattr(theirs, name)}, the case {getattr(ours, name)}")
    return CAR.from_official(adapter, base, label_drop=settings.label_drop).train(training)


def features(case: Case, model: CAR) -> ControlFeatures:
    """The control encoder on the pictures of every scale, which the case gives."""
    scales = [case.tensor(f"control.{index}") for index in range(len(model.config.schedule))]
    return model.encode(scales)


@operations
def teacher_forcing(case: Case) -> Mapping[str, Any]:
    """All scales at once, under the control."""
    model = build(case)
    case.config["car"].ignore("drop_path_rate")
    with torch.inference_mode():
        maps = features(case, model)
        inputs = model.tokenizer.quantizer.teacher_inputs(case.tensor("tokens"), model.config.schedule)
        labels = model.drop_labels(case.tensor("labels"), case.tensor("uniform"))
        return {
            **{f"control_embedding.{index}": part for index, part in enumerate(maps.maps)},
            "var_input": inputs,
            "labels_used": labels,
            "logits": model(inputs, labels, maps),
        }


@operations
def train_step(case: Case) -> Mapping[str, Any]:
    """Loss and gradients in train form, with the draws of stochastic depth given."""
    options, model = case.options, build(case, training=True)
    if not options["freeze_base"]:
        trained = [p for name, p in model.base.named_parameters() if not name.startswith("tokenizer.")]
        for parameter in trained:
            parameter.requires_grad_(True)
    tokens, schedule = case.tensor("tokens"), model.config.schedule
    inputs = model.tokenizer.quantizer.teacher_inputs(tokens, schedule)
    labels = model.drop_labels(case.tensor("labels"), case.tensor("uniform"))
    with given_drop_path(case.tensor("path_keep")):
        logits = model(inputs, labels, features(case, model))
    flat = F.cross_entropy(
        logits.flatten(0, 1), tokens.flatten(), label_smoothing=options["label_smooth"], reduction="none"
    )
    losses = flat.view(tokens.shape)
    loss = (losses / schedule.length).sum(1).mean()
    loss.backward()
    names = options["grad_names"]
    gradients = in_official_names(model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    adapter = [value for name, value in gradients.items() if "car" in name]
    free = {id(p) for group in parameter_groups(model, 1.0) if not group["weight_decay"] for p in group["params"]}
    decayed = in_official_names(
        model, {n: torch.full_like(p, float(id(p) not in free)) for n, p in model.named_parameters() if p.requires_grad}
    )
    trainable = set(model.to_official())
    return {
        "labels_used": labels,
        "per_token_loss": losses.detach(),
        "loss": np.float64(loss.item()),
        "grad_norms": norms(gradients, names),
        "total_norm": np.float64(torch.stack([value.double().norm() for value in adapter]).norm()),
        "trainable": [int(name in trainable) for name in names],
        "decayed": [int(bool(decayed[name].any())) for name in names],
    }


def in_official_names(model: CAR, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of the base's and the adapter's parameters under their official names; zeros where none is given."""
    names = {f"base.{name}": p for name, p in model.base.named_parameters()}
    names |= {name: p for name, p in model.named_parameters() if not name.startswith("base.")}
    held = {name: values.get(name, torch.zeros_like(p)) for name, p in names.items()}
    kept = {name: p.data for name, p in names.items()}
    try:
        for name, p in names.items():
            p.data = held[name]
        return model.base.to_official() | model.to_official()
    finally:
        for name, p in names.items():
            p.data = kept[name]


@operations
def sample(case: Case) -> Mapping[str, Any]:
    """Sampling with the official draw order, with or without the control."""
    model, options, labels = build(case), case.options, case.tensor("labels")
    case.config["car"].ignore("drop_path_rate")
    draws = BatchDraws(torch.Generator().manual_seed(options["seed"]))
    if options["random_labels"]:
        labels = draws.integers(model.config.classes, len(labels))
    emitter = CategoricalEmitter(options["top_k"], options["top_p"], smooth=options["more_smooth"])
    with torch.inference_mode():
        control = features(case, model) if options["control"] else None
        steps = list(model.steps(labels, draws=draws, emitter=emitter, guidance=options["cfg"], control=control))
        image = model.picture(steps[-1].total)
    return {
        "labels_used": labels,
        "tokens": torch.cat([step.tokens for step in steps], dim=1),
        "logits": torch.cat([step.logits for step in steps], dim=1),
        "codes": torch.cat([step.codes for step in steps], dim=1),
        "f_hats": torch.stack([step.total for step in steps]),
        "image": image,
    }


STRIDE, CELL = 16, 8
"""Pixels of a token in the published models; side of the blocks in which densities are given."""


@operations
def preprocess(case: Case) -> Mapping[str, Any]:
    """Control pictures from a photograph and from soft edges."""
    options, photo, soft = case.options, np.array(case.inputs["photo"]), np.array(case.inputs["soft_edges"])
    square = squash(photo, (options["size"], options["size"]))
    low, high = options["canny_thresholds"]
    edges = canny(square, low, high)
    picture = torch.from_numpy(edges).float().expand(1, 3, -1, -1)
    grids = [scale.grid for scale in ScaleSchedule.squares(*options["patch_nums"]).scales]
    detected = resize_for_detector(photo, options["detector_resolution"])
    thinning = options["nms_threshold"], options["nms_sigma"]
    strokes = sketch(soft, *thinning, options["sketch_sigma"], options["sketch_threshold"])
    return {
        "square": square.astype(np.float32),
        "canny": edges.astype(np.uint8),
        **{f"control.{index}": part for index, part in enumerate(pyramid(picture, grids, STRIDE))},
        "detector_size": np.array(detected.shape[:2]),
        "detector_input": detected.astype(np.float32),
        "thin_density": _density(thin(soft, *thinning)),
        "sketch_density": _density(strokes),
    }


def _density(mask: np.ndarray) -> np.ndarray:
    """Share of set pixels in blocks of 8 x 8."""
    height, width = (side // CELL * CELL for side in mask.shape)
    blocks = mask[:height, :width].reshape(height // CELL, CELL, width // CELL, CELL)
    share: np.ndarray = blocks.mean((1, 3), dtype=np.float32)
    return share
