"""Infinity's golden cases: every operation of the official code, on this library's functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.core.bitwise import BitwiseEmitter
from nextscale.core.random import BatchDraws
from nextscale.core.schedule import ScaleSchedule
from nextscale.parity.case import Case
from nextscale.parity.infinity_building import (
    POSITIONS,
    build_model,
    build_tokenizer,
    gradient_norms,
    model_config,
    packed,
    patch_of,
    schedule_from,
    tokenizer_config,
)
from nextscale.parity.replay import Operations, ReplayError
from nextscale.tasks.generation.infinity import SYSTEM, Infinity
from nextscale.tasks.generation.infinity_training import InfinityLossConfig, InfinityTraining, bit_losses, initialize
from nextscale.tasks.generation.infinity_transformer import rotation_of
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizer
from nextscale.tasks.tokenizers.bitwise_schedules import for_features, nearest_ratio, schedule_of
from nextscale.tasks.tokenizers.bitwise_vq import TOKEN_STRIDE, BitwiseVQ

operations = Operations()


@operations
def schedules(case: Case) -> Mapping[str, Any]:
    """The scale lists of all aspect ratios and sizes, and those a tokenizer picks by itself."""
    ratios, sizes = case.options["h_div_w"], case.options["sizes"]
    lists = [schedule_of(ratio, size) for ratio in ratios for size in sizes]
    shape = (len(ratios), len(sizes))
    picked = [for_features(*size) for size in case.options["feature_sizes"]]
    if None in picked:
        raise ReplayError(f"no list ends at the features' size {case.options['feature_sizes'][picked.index(None)]}")
    return {
        "ratio": np.array([nearest_ratio(ratio) for ratio in ratios]),
        "count": np.array([len(schedule) for schedule in lists]).reshape(shape),
        "scales": np.concatenate([_triples(schedule, VIDEO_TIMES) for schedule in lists]),
        "image_size": np.array([schedule.scaled(TOKEN_STRIDE) for schedule in lists]).reshape(*shape, 2),
        "tokenizer_count": np.array([len(schedule) for schedule in picked if schedule]),
        "tokenizer_scales": np.concatenate([_triples(schedule, STILL) for schedule in picked if schedule]),
    }


VIDEO_TIMES = (1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 15, 17, 21)
"""Frames that the official table carries beside each scale, for video; images have one."""
STILL = (1,) * len(VIDEO_TIMES)


def _triples(schedule: ScaleSchedule, times: Sequence[int]) -> np.ndarray:
    return np.array([(time, *scale.grid) for time, scale in zip(times, schedule.scales, strict=False)])


# --- the tokenizer ------------------------------------------------------------------------------------


@operations
def quantize(case: Case) -> Mapping[str, Any]:
    """The quantiser alone."""
    schedule = schedule_from(case.options["scales"])
    quantizer = BitwiseQuantizer(tokenizer_config(case, schedule).quantizer)
    return _quantized(quantizer, case.tensor("features"), schedule)


@operations
def tokenize(case: Case) -> Mapping[str, Any]:
    """Image -> bits -> image."""
    schedule = schedule_from(case.options["scales"])
    tokenizer = build_tokenizer(case, schedule)
    with torch.inference_mode():
        features = tokenizer.features(case.tensor("image"))
        quantized = _quantized(tokenizer.quantizer, features, schedule)
        return {
            "features": features,
            **quantized,
            "reconstruction_raw": tokenizer.decoder(quantized["latent"]),
            "reconstruction": tokenizer.decode_features(quantized["latent"]),
        }


def _quantized(quantizer: BitwiseQuantizer, features: Tensor, schedule: ScaleSchedule) -> dict[str, Tensor]:
    tokens, totals = quantizer.encode(features, schedule)
    area = [quantizer.to_tokens(quantizer.shrink(t, schedule, index + 1)) for index, t in enumerate(totals[:-1])]
    return {
        "tokens": torch.cat(tokens, dim=1),
        "latent": totals[-1],
        "area_input": torch.cat(area, dim=1),
        "teacher_input": quantizer.inputs(totals, schedule),
    }


@operations
def self_correct(case: Case) -> Mapping[str, Any]:
    """Labels and inputs of training under bit flips."""
    schedule = schedule_from(case.options["scales"])
    patch = 2 if case.options["apply_spatial_patchify"] else 1
    quantizer = BitwiseQuantizer(tokenizer_config(case, schedule, patch).quantizer)
    flips = quantizer.split_flips(case.tensor("flips"), schedule)
    tokens, totals = quantizer.encode(case.tensor("features"), schedule, flips=flips)
    return {"tokens": torch.cat(tokens, dim=1), "teacher_input": quantizer.inputs(totals, schedule)}


# --- the transformer ----------------------------------------------------------------------------------


@operations
def rope(case: Case) -> Mapping[str, Any]:
    """Cosines and sines of all positions."""
    options = case.options
    rotations = [
        rotation_of(
            schedule_from(each["scales"]),
            tuple(each["rope_grid"]),
            options["head_dim"],
            POSITIONS[mode],
            base=options["base"],
        )
        for mode in options["modes"]
        for each in options["schedules"]
    ]
    modes = len(options["modes"])
    case.config.ignore("*")
    return {
        "cos": torch.cat([rotation.cos for rotation in rotations]).unflatten(0, (modes, -1)),
        "sin": torch.cat([rotation.sin for rotation in rotations]).unflatten(0, (modes, -1)),
    }


@operations
def init(case: Case) -> Mapping[str, Any]:
    """Statistics of a fresh model; the draws themselves are free."""
    options = case.options
    schedule = schedule_from(options["scales"])
    options.ignore("rope_grid")
    with torch.device("meta"):
        tokenizer = BitwiseVQ(tokenizer_config(case, schedule, patch_of(case)))
    torch.manual_seed(0)
    model = initialize(
        Infinity(model_config(case, schedule), tokenizer),
        modulation=options["aln_init"],
        gate=options["aln_gamma_init"],
        head=options["scale_head"],
        std=options["std"] if options["std"] >= 0 else None,
        shrink_branches=bool(options["scale_proj"]),
    )
    state = {name: value.detach().double() for name, value in model.to_official().items()}
    values = [state[name] for name in options["names"]]
    for name, value, shape in zip(options["names"], values, options["shapes"], strict=True):
        if list(value.shape) != shape:
            raise ReplayError(f"{name} has shape {list(value.shape)}, the case says {shape}")
    equal = [bool(value.min() == value.max()) for value in values]
    std = [0.0 if same else float(value.std()) for value, same in zip(values, equal, strict=True)]
    mean = [
        float(value.flatten()[0]) if same else float(value.mean()) / spread
        for value, same, spread in zip(values, equal, std, strict=True)
    ]
    depth, chunks = model.config.transformer.depth, model.config.transformer.chunks
    offsets = [
        state[f"block_chunks.{i // (depth // chunks)}.module.{i % (depth // chunks)}.ada_gss" if chunks > 1
              else f"blocks.{i}.ada_gss"]
        for i in range(depth)
    ]  # fmt: skip
    return {"std": std, "mean": mean, "ada_gss_std": torch.stack([each[0, 0].std(-1) for each in offsets])}


@operations
def teacher_forcing(case: Case) -> Mapping[str, Any]:
    """Scores of all scales at once, and what the network makes of the text."""
    schedule = schedule_from(case.options["scales"])
    model = build_model(case, schedule)
    hidden: list[Tensor] = []
    for block in model.transformer.blocks:
        block.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    with torch.inference_mode():
        text = model.drop_text(packed(case, "text", "text_lens"), case.tensor("dropped").bool())
        logits = model(case.tensor("teacher_input"), text, schedule, tuple(case.options["rope_grid"]))
        pooled, memory = model.read(text)
        shared = model.transformer.shared_modulation
        assert shared is not None
        return {
            "logits": logits,
            "hidden": torch.stack(hidden),
            "pooled_text": pooled,
            "modulation": shared(pooled)[:, 0],
            "text_memory": memory.values,
        }


@operations
def train_step(case: Case) -> Mapping[str, Any]:
    """One loss and its gradient."""
    options = case.options
    schedule = schedule_from(options["scales"])
    tokenizer = build_tokenizer(case, schedule, patch_of(case))
    model = build_model(case, schedule, tokenizer).train()
    task = InfinityTraining(
        model,
        InfinityLossConfig(
            reweight=options.get("reweight", True),
            bits=options.get("bitloss_type", "mean"),
            scales=min(options.get("training_scales", 100), len(schedule)),
        ),
    )
    model.config = replace(model.config, text_drop=0.5)  # between kept (1) and dropped (0)
    batch = {
        "image": case.tensor("image"),
        "text": packed(case, "text", "text_lens"),
        "uniform": 1.0 - case.tensor("dropped").float(),
        "flips": tokenizer.quantizer.split_flips(case.tensor("flips"), schedule),
        "grid": tuple(options["rope_grid"]),
    }
    logits: list[Tensor] = []
    model.register_forward_hook(lambda module, inputs, output: logits.append(output.detach()))
    loss, metrics = task.loss(SYSTEM, model, batch, 0)
    loss.backward()
    given = task.teacher_forced(batch, schedule)
    gradients = {name: p.grad for name, p in model.named_parameters() if not name.startswith("tokenizer.")}
    norms = gradient_norms(model, gradients, options["grad_names"])
    return {
        "features": tokenizer.features(batch["image"]),
        "tokens": given.tokens,
        "teacher_input": given.inputs,
        "logits": logits[0],
        "token_loss": bit_losses(logits[0], given.tokens, task.config.bits),
        "loss": loss,
        "loss_uniform": metrics["cross_entropy"],
        "bit_accuracy": metrics["bit_accuracy"] / 100,
        "grad_norms": norms,
        "grad_norm": np.sqrt((norms**2).sum()),
    }


@operations
def sample(case: Case) -> Mapping[str, Any]:
    """Sampling with the official draw order."""
    options = case.options
    schedule = schedule_from(options["scales"])
    patch = patch_of(case)
    tokenizer = build_tokenizer(case, schedule, patch)
    model = build_model(case, schedule, tokenizer)
    text = packed(case, "text", "text_lens")
    negative = packed(case, "negative_text", "negative_lens") if "negative_text" in case.inputs else None
    given = case.tensor("given_tokens").bool() if options.get("given_scales", 0) else None
    seed = options["seed"]
    emitter = BitwiseEmitter(options["top_k"], options["top_p"], options["tau"], given)
    # Guidance on probabilities (1) is an official choice that does nothing but leave the scores alone.
    layers = [layer for layer in options["cfg_insertion_layer"] if layer != 1]
    guidance = options["cfg"] if layers else [1.0] * len(schedule)
    steps = list(
        model.steps(
            text,
            draws=BatchDraws(torch.Generator().manual_seed(0 if seed is None else seed)),
            negative=negative,
            schedule=schedule,
            grid=tuple(options["rope_grid"]),
            guidance=guidance,
            guidance_layers=layers or [0],
            emitter=emitter,
        )
    )
    with torch.inference_mode():
        image = tokenizer.decode_features(steps[-1].total)
    return {
        "logits": torch.cat([step.logits for step in steps], dim=1),
        "tokens": torch.cat([step.tokens for step in steps], dim=1),
        "latent": steps[-1].total,
        "image": image,
        "image_bgr": ((image + 1) / 2 * 255).clamp(0, 255).floor().movedim(1, -1).flip(-1),
    }
