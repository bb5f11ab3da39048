"""How fast VAR draws images, and in how much memory; beside the official code if a checkout of it is given.

    python benchmarks/var_sampling.py [--depth 16] [--batch 1 8] [--official CHECKOUT] [--json FILE]

Weights are random: speed does not depend on them. All calls are timed in turn in one process, and ratios are
medians over calls of the same round, so that a busy machine touches both sides alike. Peak memory is that of a
process that holds one side only. The official code runs in float32 and under autocast (bfloat16 on a CPU, float16
on CUDA); this library with its weights in each precision.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
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

from nextscale.core.accounting import count_operations
from nextscale.loading import cast
from nextscale.tasks.generation.var import VAR
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ


def sides(options: argparse.Namespace) -> list[Side]:
    """The official sides come first: what the others are compared with."""
    theirs = ["float32", lower_precision(options)] if options.official else []
    ours = options.dtype or ["float32", "bfloat16"]
    return [Side("official", p, True) for p in theirs] + [Side("nextscale", p, False) for p in ours]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, batch=[1, 8])
    parser.add_argument("--guidance", type=float, default=1.5, help="0 halves the transformer's work")
    parser.add_argument("--no-decode", dest="decode", action="store_false", help="stop before the image decoder")
    return parser


def drawing(side: Side, model: VAR | OfficialVAR, batch: int, options: argparse.Namespace) -> Callable[[], object]:
    """A call that draws a batch of images."""
    if isinstance(model, OfficialVAR):
        labels = torch.arange(batch, device=chosen_device(options)) % options.classes
        return lambda: model.generate(labels, options.guidance, options.decode, PRECISIONS[side.precision])
    classes = [i % options.classes for i in range(batch)]
    if options.decode:
        return lambda: model.generate(classes, batch, guidance=options.guidance, batch_size=batch)

    def steps() -> None:
        chosen = model.labels(classes, batch).to(model.device)
        for step in model.steps(chosen, draws=model.draws(list(range(batch)), False), guidance=options.guidance):
            step.total.cpu()

    return steps


def operations(options: argparse.Namespace) -> int:
    """Of one image: all scales for every branch, the head where its logits count, the decoder."""
    config, tokenizer = var_configs(options)
    with torch.device("meta"):
        model = VAR(config, ResidualVQ(tokenizer)).eval()

    def draw() -> None:
        session = model.start(
            torch.zeros(2 if options.guidance else 1, dtype=torch.long, device="meta"), config.schedule
        )
        for index, length in enumerate(config.schedule.lengths):
            inputs = torch.zeros(1, length, config.code_channels, device="meta") if index else None
            hidden = session.step(index, inputs)
            session.logits(hidden, slice(None if index else 1))
        if options.decode:
            total = torch.zeros(1, config.code_channels, *config.schedule.final.grid, device="meta")
            model.tokenizer.decode_features(total)

    with torch.inference_mode():
        return count_operations(draw)


def build(side: Side, options: argparse.Namespace, ours: VAR | None = None) -> VAR | OfficialVAR:
    """The model of a side: with the weights of ``ours``, or with random ones."""
    device = chosen_device(options)
    config, tokenizer = var_configs(options)
    if side.code == "nextscale":
        model = deepcopy(ours) if ours is not None else random_model(config, tokenizer)
        return cast(model, PRECISIONS[side.precision]).to(device)
    official = OfficialVAR(options.official, config, tokenizer, device)
    if ours is not None:
        official.load(ours.to_official(), ours.tokenizer.to_official())
    return official


def largest_difference(official: Any, ours: VAR, options: argparse.Namespace) -> float:
    """Between both codes' pictures of one seed in float32, where 1 is white: whether they do the same work."""
    labels = torch.zeros(1, dtype=torch.long, device=chosen_device(options))
    theirs = official.generate(labels, options.guidance, True, torch.float32)
    return (theirs - ours.generate(0, seed=0, guidance=options.guidance, official_draws=True)).abs().max().item()


def measure_memory(options: argparse.Namespace) -> None:
    """In a process of its own: print what one side needs to draw one batch after another."""
    side = next(side for side in sides(options) if f"{side.code} {side.precision}" == options.only)
    device = chosen_device(options)
    call = drawing(side, build(side, options), options.batch[0], options)
    reset_peak_memory(device)
    call()
    call()
    print(json.dumps({"peak_memory": peak_memory(device)}))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device, everyone = chosen_device(options), sides(options)
    ours = random_model(*var_configs(options))
    work = operations(options)
    rates = {p: product_rate(PRECISIONS[p], device) for p in {side.precision for side in everyone}}
    memory = {
        (side, batch): in_child([*sys.argv[1:], "--batch", str(batch), "--only", f"{side.code} {side.precision}"])
        for batch in options.batch
        for side in everyone
    }
    models: dict[Side, VAR | OfficialVAR] = {}
    for side in everyone:
        # The official code holds one model for all precisions.
        same = next((models[other] for other in models if other.code == side.code == "official"), None)
        models[side] = same or build(side, options, ours)
    result: dict[str, Any] = {"operations_per_image": work, "product_rates": rates, "machine": machine(device)}
    if options.official and options.decode:
        result["largest_difference"] = largest_difference(next(iter(models.values())), ours.to(device), options)
    figures = result["figures"] = []
    for batch in options.batch:
        calls = {str(side): drawing(side, models[side], batch, options) for side in everyone}
        times = in_turn(calls, options.rounds, device)
        for side in everyone:
            taken = statistics.median(times[str(side)])
            figures.append(
                {
                    "side": str(side),
                    "batch": batch,
                    "seconds": taken,
                    "images_per_second": batch / taken,
                    "utilisation": work * batch / taken / rates[side.precision],
                    "peak_memory": memory[side, batch]["peak_memory"],
                    "times_as_fast_as": {
                        str(other): median_ratio(times[str(other)], times[str(side)])
                        for other in everyone
                        if other.code == "official" != side.code
                    },
                    "rounds": times[str(side)],
                }
            )
    return result


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only:
        measure_memory(options)
        return
    columns = {
        "side": str,
        "batch": str,
        "seconds": "{:.3f}".format,
        "images_per_second": "{:.3g}".format,
        "utilisation": "{:.0%}".format,
        "peak_memory": lambda n: f"{n / 2**20:.0f} MiB",
    }
    result = measure(options)
    notes = []
    if "largest_difference" in result:
        notes.append(
            f"The two codes' float32 pictures of one seed differ by at most {result['largest_difference']:.1e}"
        )
    report(options, result, columns, notes)


if __name__ == "__main__":
    main()
