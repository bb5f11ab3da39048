"""How fast VAR trains by teacher forcing, and in how much memory; beside the official code if a checkout is given.

    python benchmarks/var_training.py [--depth 16] [--batch 2] [--official CHECKOUT] [--json FILE]

A step is forward, loss, backward, clipping and AdamW, on random tokens. All steps are timed in turn in one process,
and ratios are medians over steps of the same round. The last lines compare attention alone, forward and backward: one
call per scale, over the keys that the scale sees, with one call over all keys under a dense mask.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    PRECISIONS,
    Side,
    add_model_arguments,
    chosen_device,
    in_child,
    in_turn,
    lower_precision,
    machine,
    median_ratio,
    peak_memory,
    product_rate,
    random_model,
    report,
    reset_peak_memory,
    var_configs,
)
from official_var import OfficialVAR
from torch import Tensor, nn

from nextscale.core.accounting import count_operations
from nextscale.core.attention import attend_segments
from nextscale.core.optim import parameter_groups
from nextscale.tasks.generation.var import VAR
from nextscale.tasks.generation.var_training import VARTraining
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ

ATTENTION = ("attention per scale", "attention with a dense mask")


def sides(options: argparse.Namespace) -> list[Side]:
    """The official sides come first: what the others are compared with. Weights are float32 on all."""
    codes = ["official", "nextscale"] if options.official else ["nextscale"]
    precisions = options.dtype or ["float32", lower_precision(options)]
    return [Side(code, p, True) for code in codes for p in precisions]


class Stepper:
    """A model with its optimiser: what takes training steps."""

    def __init__(self, model: VAR | OfficialVAR, schedule_length: int, device: torch.device) -> None:
        self.model, self.length, self.device = model, schedule_length, device
        self.trained: nn.Module = model.transformer if isinstance(model, OfficialVAR) else model
        self.trained.train()
        groups = parameter_groups(self.trained, 0.05)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.95), fused=True)

    def __call__(self, batch: dict[str, Tensor], precision: torch.dtype) -> None:
        with torch.autocast(self.device.type, precision, enabled=precision != torch.float32):
            loss = self._loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), 2.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        if isinstance(self.model, VAR):
            return VARTraining(self.model).loss("var", self.model, batch, 0)[0]
        logits = self.model.teacher_forced(batch["tokens"], batch["label"])
        losses = F.cross_entropy(logits.flatten(0, 1), batch["tokens"].flatten(), reduction="none")
        return losses.view(len(logits), -1).mul(1 / self.length).sum(1).mean()


def build(code: str, options: argparse.Namespace, ours: VAR | None = None) -> Stepper:
    """A side's model: with the weights of ``ours``, or with random ones."""
    device = chosen_device(options)
    config, tokenizer = var_configs(options)
    model: VAR | OfficialVAR
    if code == "nextscale":
        model = (ours or random_model(config, tokenizer)).to(device)
    else:
        model = OfficialVAR(options.official, config, tokenizer, device)
        if ours is not None:
            model.load(ours.to_official(), ours.tokenizer.to_official())
    return Stepper(model, config.schedule.length, device)


def random_batch(options: argparse.Namespace, batch: int) -> dict[str, Tensor]:
    config, _ = var_configs(options)
    parts = {
        "tokens": torch.randint(config.vocabulary, (batch, config.schedule.length)),
        "label": torch.randint(config.classes, (batch,)),
        "uniform": torch.rand(batch),
    }
    return {name: part.to(chosen_device(options)) for name, part in parts.items()}


def operations(options: argparse.Namespace) -> int:
    """Of one image: the forward pass three times, as the backward pass computes two products for each of its."""
    config, tokenizer = var_configs(options)
    with torch.device("meta"):
        model = VAR(config, ResidualVQ(tokenizer)).eval()
    condition = torch.zeros(1, config.transformer.width, device="meta")
    tokens = torch.zeros(1, config.schedule.length, config.transformer.width, device="meta")

    def forward() -> None:
        hidden = model.transformer(tokens, model.transformer.modulate(condition), config.schedule.segments)
        model.head(hidden, model.head.modulate(condition))

    with torch.inference_mode():
        return 3 * count_operations(forward)


def attention(options: argparse.Namespace, batch: int, precision: torch.dtype) -> dict[str, Callable[[], None]]:
    """Forward and backward through one layer's attention in its two forms."""
    config, device = var_configs(options)[0], chosen_device(options)
    schedule, transformer = config.schedule, config.transformer
    shape = (batch, schedule.length, transformer.heads, transformer.head_size)
    parts = [torch.randn(shape, device=device, dtype=precision, requires_grad=True) for _ in range(3)]
    mask, scale = schedule.mask(device), transformer.head_size**-0.5

    def per_scale() -> Tensor:
        return attend_segments(*parts, scale, schedule.segments)

    def dense() -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)

    def both_ways(forward: Callable[[], Tensor]) -> Callable[[], None]:
        gradient = torch.randn(shape, device=device, dtype=precision)
        return lambda: forward().backward(gradient)

    return dict(zip(ATTENTION, (both_ways(per_scale), both_ways(dense)), strict=True))


def measure_memory(options: argparse.Namespace) -> None:
    """In a process of its own: print what one side needs to take steps."""
    code, precision = options.only.split()
    stepper, batch = build(code, options), random_batch(options, options.batch[0])
    reset_peak_memory(chosen_device(options))
    for _ in range(2):
        stepper(batch, PRECISIONS[precision])
    print(json.dumps({"peak_memory": peak_memory(chosen_device(options))}))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device, everyone = chosen_device(options), sides(options)
    work, length = operations(options), var_configs(options)[0].schedule.length
    rates = {side.precision: product_rate(PRECISIONS[side.precision], device) for side in everyone}
    memory = {
        (side, batch): in_child([*sys.argv[1:], "--batch", str(batch), "--only", f"{side.code} {side.precision}"])
        for batch in options.batch
        for side in everyone
    }
    ours = random_model(*var_configs(options))
    steppers = {code: build(code, options, ours) for code in dict.fromkeys(side.code for side in everyone)}
    figures, layers = [], []
    for size in options.batch:
        batch = random_batch(options, size)
        calls = {
            str(side): lambda side=side, batch=batch: steppers[side.code](batch, PRECISIONS[side.precision])  # type: ignore[misc]
            for side in everyone
        }
        times = in_turn(calls, options.rounds, device)
        for side in everyone:
            taken = statistics.median(times[str(side)])
            figures.append(
                {
                    "side": str(side),
                    "batch": size,
                    "seconds": taken,
                    "tokens_per_second": size * length / taken,
                    "utilisation": work * size / taken / rates[side.precision],
                    "peak_memory": memory[side, size]["peak_memory"],
                    "times_as_fast_as": {
                        str(other): median_ratio(times[str(other)], times[str(side)])
                        for other in everyone
                        if other.code == "official" != side.code
                    },
                    "rounds": times[str(side)],
                }
            )
        for precision in rates:
            taken_by = in_turn(attention(options, size, PRECISIONS[precision]), max(options.rounds, 5), device)
            per_scale, dense = (taken_by[name] for name in ATTENTION)
            layers.append(
                {
                    "precision": precision,
                    "batch": size,
                    "per_scale_seconds": statistics.median(per_scale),
                    "dense_mask_seconds": statistics.median(dense),
                    "times_as_fast": median_ratio(dense, per_scale),
                }
            )
    return {
        "operations_per_image": work,
        "product_rates": rates,
        "figures": figures,
        "attention": layers,
        "machine": machine(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, batch=[2])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only:
        measure_memory(options)
        return
    columns = {
        "side": str,
        "batch": str,
        "seconds": "{:.3f}".format,
        "tokens_per_second": "{:.0f}".format,
        "utilisation": "{:.0%}".format,
        "peak_memory": lambda n: f"{n / 2**20:.0f} MiB",
    }
    result = measure(options)
    notes = [
        f"Attention of one layer, batch {layer['batch']}, {layer['precision']}: per scale "
        f"{layer['per_scale_seconds'] * 1e3:.2f} ms, dense mask {layer['dense_mask_seconds'] * 1e3:.2f} ms "
        f"({layer['times_as_fast']:.2f} times as fast)"
        for layer in result["attention"]
    ]
    report(options, result, columns, notes)


if __name__ == "__main__":
    main()
