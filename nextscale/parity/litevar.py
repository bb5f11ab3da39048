"""LiteVAR's golden cases: windowed and shared attention, and the published simulation of low precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nextscale.core.checkpoint import KeyMap
from nextscale.core.heads import CategoricalEmitter
from nextscale.core.random import BatchDraws
from nextscale.core.schedule import ScaleSchedule
from nextscale.parity.building import build_model
from nextscale.parity.case import Case
from nextscale.parity.replay import Operations, ReplayError
from nextscale.tasks.generation.litevar import LiteConfig, LitePlan, LiteTransformer, compress, simulate
from nextscale.tasks.generation.litevar_attention import Form, LiteAttention, lite_attention
from nextscale.tasks.generation.litevar_cache import Vectors
from nextscale.tasks.generation.litevar_packing import linears
from nextscale.tasks.generation.litevar_quantizers import Quantizer, Simulation
from nextscale.tasks.generation.litevar_windows import Window, tile_size
from nextscale.tasks.generation.official_layout import MODEL_RULES
from nextscale.tasks.tokenizers.residual_vq import SCHEDULE_256

operations = Operations()

MODES = {0: "plain", 1: "windowed", 2: "windowed and shared"}


def window_of(mask: Tensor, schedule: ScaleSchedule, index: int) -> Window | None:
    """One scale's window from a (heads, length, length) array over the flat sequence; None where all keys count."""
    start, stop = schedule.ranges[index]
    part = mask[:, start:stop, :stop].bool()
    return None if part.all() else Window.from_mask(part, tile_size(schedule, index), exact=True)


def mode_of(case: Case) -> int:
    mode = int(case.options["mode"])
    if mode not in MODES:
        raise ReplayError(f"mode {mode} is none of {MODES}")
    return mode


@operations
def attention(case: Case) -> Mapping[str, Any]:
    """The attention of all scales of one sampling run, from given queries, keys, values and masks."""
    mode, masks = mode_of(case), case.tensor("masks")
    q, k, v = (case.tensor(name).transpose(1, 2) for name in ("q", "k", "v"))
    rows = len(q) // 2 if mode == 2 else len(q)
    keys, values = Vectors.of(k[:rows]), Vectors.of(v)
    form: Form = case.options["masked"]
    if form not in ("logits", "probabilities"):
        raise ReplayError(f"masked is {form!r}, expected logits or probabilities")
    outputs = []
    for index, (start, stop) in enumerate(SCHEDULE_256.ranges):
        outputs.append(
            lite_attention(
                q[:rows, start:stop],
                keys,
                values,
                stop,
                case.options["scale"],
                window=window_of(masks, SCHEDULE_256, index) if mode else None,
                form=form,
            )
        )
    return {"values": torch.cat(outputs, dim=1).transpose(1, 2)}


@operations
def sample(case: Case) -> Mapping[str, Any]:
    """Class-conditional sampling with masks, and with the unconditional half using the conditional attention."""
    mode, model, masks = mode_of(case), build_model(case), case.tensor("masks")
    schedule = model.config.schedule
    compress(model, LitePlan(LiteConfig(schedule, cache_bits=16, share_from=0 if mode == 2 else None, form="logits")))
    transformer = model.transformer
    assert isinstance(transformer, LiteTransformer)
    if mode:
        for block, mask in zip(transformer.blocks, masks, strict=True):
            windows = [window_of(mask, schedule, index) for index in range(len(schedule))]
            assert isinstance(block.attention, LiteAttention)
            block.attention.plan.windows[:] = windows
    options = case.options
    emitter = CategoricalEmitter(options["top_k"], options["top_p"], smooth=options["more_smooth"])
    seed = options["seed"]
    draws = BatchDraws(None if seed is None else torch.Generator().manual_seed(seed))
    steps = list(model.steps(case.tensor("labels"), draws=draws, emitter=emitter, guidance=options["cfg"]))
    return {
        "tokens": torch.cat([step.tokens for step in steps], dim=1),
        "logits": torch.cat([step.logits for step in steps], dim=1),
        "f_hats": torch.stack([step.total for step in steps]),
    }


@operations
def quantize(case: Case) -> Mapping[str, Any]:
    """The simulated quantisers on given arrays."""
    results = []
    for setting in case.options["settings"]:
        quantizer = Quantizer(setting["kind"], setting["bits"], setting.get("group"), setting.get("axis"))
        results.append(quantizer(case.tensor(setting["input"])).flatten())
    return {"values": torch.cat(results)}


@operations
def quantized_block(case: Case) -> Mapping[str, Any]:
    """One transformer block with simulated low precision, on chunks that are calls of their own."""
    model, options = build_model(case), case.options
    names, bits = KeyMap(MODEL_RULES), options["bits"]
    kept = [n for n, _ in linears(model) if any(part in names.to_official(n) for part in options["skip"])]
    attention_bits = bits["attention"]
    simulate(
        model,
        Simulation(
            bits["weight"],
            bits["activation"],
            attention_bits if options["quantize_attention"] else None,
            keep=kept,
        ),
    )
    block = model.transformer.blocks[options["block"]]
    x, condition = case.tensor("x"), case.tensor("cond")
    with torch.inference_mode():
        modulation = model.transformer.modulate(condition)[options["block"]]
        chunks = x.split(list(options["lengths"]), dim=1)
        return {
            "attention": torch.cat([block.attention(chunk) for chunk in chunks], dim=1),
            "ffn": block.feed_forward(x),
            "block": torch.cat([block(chunk, modulation) for chunk in chunks], dim=1),
        }
