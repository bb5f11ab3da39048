"""VARGPT's golden cases: every operation of the official code, on this library's functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.core.heads import filter_logits
from nextscale.core.random import ImageDraws
from nextscale.core.sampling import Emission, ScaleContext
from nextscale.parity.case import Case
from nextscale.parity.replay import Operations, ReplayError
from nextscale.parity.vargpt_building import build_model, build_tokenizer, gradient_norms, images_of, schedule_of
from nextscale.tasks.generation.vargpt import SYSTEM
from nextscale.tasks.generation.vargpt_training import VARGPTLossConfig, VARGPTTraining, image_log_probabilities
from nextscale.tasks.generation.vargpt_writing import Choice, read, write
from nextscale.tasks.tokenizers.bitwise_vq import BitwiseVQ

operations = Operations()


@operations
def tokenize(case: Case) -> Mapping[str, Any]:
    """Image -> tokens -> image."""
    case.options.ignore("rope_grid")
    schedule = schedule_of(case)
    tokenizer: Any = build_tokenizer(case, schedule)
    quantizer = tokenizer.quantizer
    with torch.inference_mode():
        features = tokenizer.features(case.tensor("image"))
        tokens, totals = quantizer.encode(features, schedule)
        area = [
            torch.nn.functional.interpolate(total, size=schedule[index + 1].grid, mode="area").flatten(2).mT
            for index, total in enumerate(totals[:-1])
        ]
        return {
            "features": features,
            "tokens": torch.cat(tokens, dim=1).long(),
            "f_hat": totals[-1],
            "teacher_input": quantizer.teacher_inputs(torch.cat(tokens, dim=1), schedule),
            "area_input": torch.cat(area, dim=1),
            "reconstruction": tokenizer.decode_features(totals[-1]),
        }


@operations
def self_correct(case: Case) -> Mapping[str, Any]:
    """Labels and inputs of training under bit flips."""
    case.options.ignore("rope_grid")
    schedule = schedule_of(case)
    tokenizer = build_tokenizer(case, schedule)
    if not isinstance(tokenizer, BitwiseVQ):
        raise ReplayError("only v1.1 turns bits over")
    quantizer = tokenizer.quantizer
    flips = quantizer.split_flips(case.tensor("flips"), schedule)
    tokens, totals = quantizer.encode(case.tensor("features"), schedule, flips=flips)
    return {"tokens": torch.cat(tokens, dim=1).long(), "teacher_input": quantizer.inputs(totals, schedule)}


@operations
def train_step(case: Case) -> Mapping[str, Any]:
    """One loss and its gradient."""
    model = build_model(case).train()
    pixels, grids = images_of(case)
    case.inputs.ignore("labels")  # read by nothing, but for their presence
    flips: Any = case.tensor("flips")
    if model.config.infinity is not None:
        flips = model.tokenizer.quantizer.split_flips(flips, model.config.schedule)
    elif flips.shape[-1]:
        raise ReplayError(f"{flips.shape[-1]} bits to turn over are given, v1 has none")
    batch = {
        "ids": case.tensor("input_ids"),
        "mask": case.tensor("attention_mask"),
        "pixels": pixels,
        "grids": grids,
        "image": case.tensor("target_images"),
        "dropped": case.tensor("dropped"),
        "flips": flips,
    }
    task = VARGPTTraining(model, VARGPTLossConfig(text="published", train="all"))
    found: list[Tensor] = []
    model.register_forward_hook(lambda module, inputs, output: found.extend(output))
    loss, metrics = task.loss(SYSTEM, model, batch, 0)
    loss.backward()
    tokens, inputs = task.teacher_forced(batch)
    states, logits = found
    result = {
        "tokens": tokens.long(),
        "teacher_input": inputs,
        "text_logits": model.language.words(states),
        "logits": logits,
        "text_loss": metrics["text_loss"],
        "image_loss": metrics["image_loss"],
        "loss": loss,
        "image_logps": image_log_probabilities(logits, tokens),
    }
    return {**result, "grad_norms": gradient_norms(model, case.options["grad_names"])}


@dataclass
class Given:
    """Emits the largest of filtered scores with given noise on them; keeps the scores.

    Attributes:
        bits: pairs of scores are chosen from, each for a bit.
    """

    noise: Tensor
    top_k: int
    top_p: float
    temperature: Sequence[float]
    bits: bool

    def emit(self, context: ScaleContext) -> Emission:
        logits = context.guided_logits() / self.temperature[context.index]
        start, stop = context.schedule.ranges[context.index]
        noise, scores = self.noise[:, start:stop], logits
        if self.bits:
            scores, noise = (each.unflatten(-1, (-1, 2)) for each in (scores, noise))
        tokens = (filter_logits(scores, self.top_k, self.top_p) + noise).argmax(-1)
        vectors = context.pyramid.vectors
        if self.bits:
            zero, one = vectors[:, 0]
            return Emission(tokens.bool(), torch.where(tokens.bool(), one, zero), logits)
        return Emission(tokens, vectors[tokens], logits)


@operations
def sample(case: Case) -> Mapping[str, Any]:
    """Greedy text until an image starts, then the image."""
    options = case.options
    model = build_model(case)
    first = model.config.var is not None
    ids, (pixels, grids) = case.tensor("input_ids"), images_of(case)
    start = model.config.marks.start
    noise = iter(case.tensor("hidden_noise").split(model.config.schedule.lengths, dim=1))
    emitter = Given(case.tensor("choice_noise"), options["top_k"], options["top_p"], options["tau"], not first)
    with torch.inference_mode():
        state, states = read(model, ids, torch.ones_like(ids), pixels, grids)
        written = write(model, state, states[:, -1], Choice([0]), options["max_new_tokens"], [start])
        if not written.stopped[0]:
            raise ReplayError(f"no image starts within {options['max_new_tokens']} tokens: {written.tokens[0]}")
        # The published code chooses a token behind the start, and v1 writes it down twice; neither runs it.
        after = int(model.language.words(written.last).argmax(-1))
        steps = list(
            model.steps(
                state,
                draws=ImageDraws([0]),
                guidance=list(options["guidance"]),
                emitter=emitter,
                noise=lambda shape, device: next(noise),
            )
        )
        image = model.tokenizer.decode_features(steps[-1].total)
    pixels_out = ((image[0] + 1) / 2 * 255).floor().movedim(0, -1)
    return {
        "sequence": np.array([ids[0].tolist() + written.tokens[0] + [after] * (2 if first else 1)]),
        "logits": torch.cat([step.logits for step in steps], dim=1),
        "tokens": torch.cat([step.tokens for step in steps], dim=1).long(),
        "f_hat": steps[-1].total,
        "image": image,
        "written": pixels_out if first else pixels_out.flip(-1),
    }


@operations
def understand(case: Case) -> Mapping[str, Any]:
    """Images and text in, text out."""
    model = build_model(case)
    ids, mask = case.tensor("input_ids"), case.tensor("attention_mask")
    pixels, grids = images_of(case)
    language = model.language
    with torch.inference_mode():
        if pixels is None:
            raise ReplayError("there is no image to understand")
        features = language.see(pixels, grids)
        positions, after = language.positions(ids, mask, grids)
        x = language.embed(ids, features)
        flat = language(x, language.flat(torch.zeros(len(ids), dtype=torch.long), ids.shape[1]), mask)
        state, states = read(model, ids, mask, pixels, grids)
        count = case.options["max_new_tokens"]
        written = write(model, state, states[:, -1], Choice([0] * len(ids)), count, [])
        counts = mask.bool()[..., None]
        return {
            "image_features": features,
            "position_ids": positions,
            "next_position": after,
            "logits": language.words(states).masked_fill(~counts, 0),
            "flat_logits": language.words(flat).masked_fill(~counts, 0),
            "sequence": np.concatenate((ids.numpy(), np.array(written.tokens)), axis=1),
        }
