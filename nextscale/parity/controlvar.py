"""ControlVAR's golden cases: every operation of the official code, on this library's functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.core.heads import CategoricalEmitter
from nextscale.core.optim import parameter_groups
from nextscale.core.random import BatchDraws
from nextscale.core.sampling import ScaleStep
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import TransformerConfig
from nextscale.parity.building import EVALUATION, KERNELS, build_tokenizer, given_drop_path, in_official_names, norms
from nextscale.parity.car import tokenize
from nextscale.parity.case import Case
from nextscale.parity.replay import Operations, ReplayError
from nextscale.tasks.generation.control_masks import color_masks, palette
from nextscale.tasks.generation.controlvar import ControlVAR, ControlVARConfig
from nextscale.tasks.generation.controlvar_guidance import Given, sample_pairs
from nextscale.tasks.generation.controlvar_pairs import Halves, paired, second_half, single, visibility_mask
from nextscale.tasks.generation.controlvar_training import pair_loss

operations = Operations()

COSINE_DEPTH = 30
"""The official constructor overrides its own argument: unit queries and keys at this depth, and at no other."""


operations(tokenize)


def build_model(case: Case, training: bool = False) -> ControlVAR:
    """The case's transformer on its tokenizer."""
    arguments, tokenizer = case.config["var"], build_tokenizer(case)
    if (arguments["mask_factor"], arguments["separator"]) != (2, False) or arguments["aln"] < 0:
        raise ReplayError("only interleaved pairs without separators and with modulated norms are known")
    # Initial values of the modulation and of a layer scale that modulated blocks do not have.
    arguments.ignore("aln_gamma_init", "layer_scale", "cos_attn", *KERNELS)
    width, heads, depth = arguments["embed_dim"], arguments["num_heads"], arguments["depth"]
    config = ControlVARConfig(
        TransformerConfig(
            width=width,
            depth=depth,
            heads=heads,
            mlp_ratio=arguments["mlp_ratio"],
            conditioning="shared" if arguments["shared_aln"] else "block",
            attention="cosine" if depth == COSINE_DEPTH else "dot",
            attention_scale=1 / (math.sqrt(width // heads) * arguments["tau"]),
            norm_eps=arguments["norm_eps"],
            drop_path=arguments["drop_path_rate"] if training else 0.0,
        ),
        classes=arguments["num_classes"],
        vocabulary=tokenizer.config.quantizer.vocabulary,
        code_channels=tokenizer.config.quantizer.channels,
        schedule=paired(ScaleSchedule.squares(*arguments["patch_nums"])),
        label_drop=arguments["cond_drop_rate"],
        type_drop=arguments["cond_drop_rate"],
        type_start=arguments["multi_cond"],
        either_order=arguments["bidirectional"],
        half_embedding=arguments["type_pos"],
        halves=_halves(arguments),
    )
    if not training:
        arguments.ignore(*EVALUATION)
    elif arguments["drop_rate"] or arguments["attn_drop_rate"]:
        raise ReplayError("dropout in train form is random, so no case can be met")
    if single(config.schedule) != tokenizer.config.schedule:
        raise ReplayError(f"the transformer's scales '{config.schedule}' are not pairs of the tokenizer's")
    loaded = ControlVAR.from_official(
        case.state_dict("var"), tokenizer, schedule=single(config.schedule), heads=heads, halves=config.halves
    )
    recognised = {f.name for f in fields(config)} & {"type_start", "half_embedding", "classes", "vocabulary"}
    if wrong := [name for name in recognised if getattr(loaded.config, name) != getattr(config, name)]:
        raise ReplayError(f"the weights tell another {', '.join(wrong)} than the configuration")
    with torch.device("meta"):
        model = ControlVAR(config, tokenizer)
    model.load_state_dict(loaded.state_dict(), assign=True)
    return model.train(training)


def _halves(arguments: Mapping[str, Any]) -> Halves:
    separate, independent = arguments["separate_decoding"], arguments["indep"]
    if not separate:
        return "joined"
    return "apart" if independent else "one-way"


def _teacher(case: Case, model: ControlVAR) -> tuple[dict[str, Tensor], Tensor, bool]:
    """What teacher forcing and training share: tokens, inputs, labels and types after dropout; the order."""
    control_first = case.options.get("mask_first", True)
    tokens, inputs = model.join(case.tensor("control_tokens"), case.tensor("image_tokens"), control_first)
    found = {
        "tokens": tokens,
        "labels_used": model.drop_labels(case.tensor("labels"), case.tensor("uniform")),
        "cond_types_used": model.drop_types(case.tensor("cond_types"), case.tensor("type_uniform")),
    }
    return found, inputs, control_first


def _logits(model: ControlVAR, found: Mapping[str, Tensor], inputs: Tensor, control_first: bool) -> Tensor:
    result: Tensor = model(inputs, found["labels_used"], None, found["cond_types_used"], control_first)
    return result


@operations
def teacher_forcing(case: Case) -> Mapping[str, Any]:
    """Logits of both halves at all scales at once, from the true tokens."""
    model = build_model(case)
    with torch.inference_mode():
        found, inputs, control_first = _teacher(case, model)
        return {
            **found,
            "var_input": inputs,
            "mask": visibility_mask(model.config.schedule, model.config.halves),
            "logits": _logits(model, found, inputs, control_first),
        }


@operations
def train_step(case: Case) -> Mapping[str, Any]:
    """Loss and gradients in train form, stochastic depth as the case draws it."""
    model, names = build_model(case, training=True), case.options["grad_names"]
    found, inputs, control_first = _teacher(case, model)
    weights = case.tensor("token_weights")
    with given_drop_path(case.tensor("path_keep")):
        logits = _logits(model, found, inputs, control_first)
    loss, each = pair_loss(logits, found["tokens"], weights if case.options.get("use_token_weights", False) else None)
    loss.backward()
    gradients = norms(in_official_names(model, {n: p.grad for n, p in model.named_parameters()}), names)
    decays = {id(p) for group in parameter_groups(model, 1.0) if group["decays"] for p in group["params"]}
    marks = {name: torch.full_like(p, float(id(p) in decays)) for name, p in model.named_parameters()}
    exported = in_official_names(model, marks)
    return {
        **found,
        "per_token_loss": each,
        "loss": loss,
        "grad_norms": gradients,
        "total_norm": math.sqrt(float(np.square(gradients).sum())),
        "decayed": [int(exported[name].any()) for name in names],
    }


@operations
def sample(case: Case) -> Mapping[str, Any]:
    """Both pictures from class and type, with the official draw order."""
    guidance = case.options["cfg"]
    return _sampled(case, build_model(case), (guidance,) * 3)


@operations
def sample_given(case: Case) -> Mapping[str, Any]:
    """One picture from the other, four branches with tokens of their own."""
    model, tokens = build_model(case), case.tensor("given_tokens")
    second, place = second_half(model.config.schedule, torch.device("cpu")), case.options["given"]
    if place not in ("control", "image"):
        raise ReplayError(f"given is {place!r}, neither control nor image")
    empty = torch.zeros_like(tokens)
    joined, _ = model.join(*((tokens, empty) if place == "control" else (empty, tokens)))
    given = Given(joined, second == (0 if place == "control" else 1))
    strengths = tuple(case.options["cfg"])
    if len(strengths) != 3:
        raise ReplayError(f"cfg has {len(strengths)} numbers, expected 3")
    return _sampled(case, model, strengths, given)


def _sampled(
    case: Case, model: ControlVAR, strengths: tuple[float, float, float], given: Given | None = None
) -> Mapping[str, Any]:
    options, config = case.options, model.config
    draws = BatchDraws(torch.Generator().manual_seed(options["seed"]))
    labels = case.tensor("labels")
    if options.get("random_labels", False):
        labels = draws.integers(config.classes, len(labels))
    emitter = CategoricalEmitter(options["top_k"], options["top_p"], smooth=options.get("more_smooth", False))
    steps: list[ScaleStep] = list(
        sample_pairs(
            model,
            labels,
            case.tensor("cond_types"),
            strengths=strengths,
            draws=draws,
            emitter=emitter,
            given=given,
            separate=given is not None,
        )
    )
    with torch.inference_mode():
        image = model.picture(steps[-1].total[:, :2])
    lengths = config.schedule.lengths
    return {
        "labels_used": labels,
        "tokens": torch.cat([step.tokens for step in steps], dim=1),
        "logits": torch.cat([step.logits for step in steps], dim=1),
        "codes": torch.cat([step.codes[:, : lengths[step.index]] for step in steps], dim=1),
        "f_hats_control": torch.stack([step.total[:, 0] for step in steps]),
        "f_hats_image": torch.stack([step.total[:, 1] for step in steps]),
        "image": image,
    }


@operations
def mask_colors(case: Case) -> Mapping[str, Any]:
    """Binary masks as one coloured picture."""
    masks, size = case.inputs["masks"], case.options["image_size"]
    if masks.shape[1:] != (size, size):
        raise ReplayError(f"the masks are {masks.shape[1:]}, image_size is {size}")
    return {"colormap": palette(), "colored": color_masks(masks, case.inputs["areas"].tolist())}
