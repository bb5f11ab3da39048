"""How fast a drafter and a refiner draw together, and in how much memory, beside the drafter alone.

    python benchmarks/code_speed.py [--drafter 30] [--refiner 16] [--draft-scales 6] [--batch 8] [--json FILE]

Weights are random: speed does not depend on them. Both sides hold the same drafter and are timed in turn in one
process; ratios are medians over calls of the same round. Memory is given twice. By arithmetic, at any batch: the
weights of transformers and tokenizer, and the keys and values of both guidance branches at the moment they take most,
which is all that grows with batch and scales. Measured: the peak of a process that holds one side only, with
activations and the image decoder.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from common import (
    PRECISIONS,
    in_child,
    in_turn,
    machine,
    median_ratio,
    peak_memory,
    product_rate,
    report,
    reset_peak_memory,
)
from torch import nn

from nextscale.core.accounting import nbytes
from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.checkpoint import weightless
from nextscale.core.quantizer import ResidualQuantizer
from nextscale.core.schedule import ScaleSchedule
from nextscale.loading import FLOAT32_PARAMETERS
from nextscale.tasks.generation.code import CoDe
from nextscale.tasks.generation.var import VAR, VARConfig
from nextscale.tasks.tokenizers.residual_vq import SCHEDULE_256, ResidualVQ, ResidualVQConfig

ALONE, TOGETHER = "drafter alone", "together"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafter", type=int, default=30, help="its depth; its width is 64 times that")
    parser.add_argument("--refiner", type=int, default=16, help="its depth")
    parser.add_argument("--draft-scales", type=int, default=6)
    parser.add_argument("--scales", help='sides of the token maps, such as "1 2 3 4"; those of 256 pixels by default')
    parser.add_argument("--channels", type=int, default=160, help="of the tokenizer; 160 is the released one's")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--counted-batch", type=int, default=64, help="at which memory is counted by arithmetic")
    parser.add_argument("--dtype", choices=PRECISIONS, default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on the CPU")
    parser.add_argument("--rounds", type=int, default=2, help="calls of each side; one more is not counted")
    parser.add_argument("--count-only", action="store_true", help="only the arithmetic, which takes no time")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the side whose memory a process of its own measures
    return parser


def random_pair(options: argparse.Namespace, device: str, depths: tuple[int, ...]) -> list[VAR]:
    """VARs of these depths on one tokenizer, made in their precision at once: d30 would take 8 GB in float32."""
    schedule = ScaleSchedule.parse(options.scales) if options.scales else SCHEDULE_256
    with weightless():
        tokenizer = ResidualVQ(ResidualVQConfig(AutoencoderConfig(channels=options.channels), schedule=schedule))
        models = [VAR(VARConfig.of_depth(d, classes=options.classes, schedule=schedule), tokenizer) for d in depths]
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device; give --device cpu")
    torch.manual_seed(0)
    everything = nn.ModuleList(models).eval()
    island = {id(t) for m in everything.modules() if isinstance(m, ResidualQuantizer) for t in m.parameters()}
    filled: dict[int, torch.Tensor] = {}
    for name, parameter in everything.named_parameters():
        own = name.rsplit(".", 1)[-1] in FLOAT32_PARAMETERS
        dtype = torch.float32 if own or id(parameter) in island else PRECISIONS[options.dtype]
        value = torch.empty(parameter.shape, dtype=dtype, device=device)
        if device != "meta":
            value = value.fill_(math.log(4)) if own else value.normal_(std=0.02)
        filled[id(parameter)] = value
    for module in everything.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in filled:
                value = filled[id(parameter)]
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
    return models


def together(models: list[VAR], options: argparse.Namespace) -> CoDe:
    return CoDe(models, [options.draft_scales]).eval()


# --- memory by arithmetic -----------------------------------------------------------------------------


def counted(options: argparse.Namespace) -> dict[str, int]:
    """Bytes at full size, of models without values.

    ``..._dropped``: what the pair would take if each model were in memory in its own turn only.
    """
    large, small = random_pair(options, "meta", (options.drafter, options.refiner))
    schedule, dtype = large.config.schedule, PRECISIONS[options.dtype]
    rows = options.counted_batch * (2 if options.guidance else 1)

    def cache(model: VAR, scales: int) -> int:
        return model.transformer.allocate_cache(rows, schedule.prefix(scales).length, dtype).nbytes

    tokenizer = nbytes(large.tokenizer)
    weights = {model: nbytes(model) - tokenizer for model in (large, small)}
    drafted, refined = cache(large, options.draft_scales), cache(small, len(schedule))
    alone = weights[large] + tokenizer + cache(large, len(schedule))
    return {
        "tokenizer": tokenizer,
        "drafter_weights": weights[large],
        "refiner_weights": weights[small],
        "drafter_cache_whole": cache(large, len(schedule)),
        "drafter_cache": drafted,
        "refiner_cache": refined,
        "alone": alone,
        "together": weights[large] + weights[small] + tokenizer + max(drafted, refined),
        "together_dropped": tokenizer + max(weights[large] + drafted, weights[small] + refined),
    }


# --- time and measured memory -------------------------------------------------------------------------


def drawing(model: VAR | CoDe, batch: int, options: argparse.Namespace, decode: bool) -> Callable[[], object]:
    """A call that draws a batch, to the picture or to its tokens only."""
    classes = [i % options.classes for i in range(batch)]
    if decode:
        return lambda: model.generate(classes, batch, guidance=options.guidance, batch_size=batch)

    def steps() -> None:
        labels = model.labels(classes, batch).to(model.device)
        for step in model.steps(labels, draws=model.draws(list(range(batch))), guidance=options.guidance):
            step.tokens.cpu()

    return steps


def measure_memory(options: argparse.Namespace) -> None:
    """In a process of its own: print what one side needs to draw a batch."""
    device = torch.device(options.device)
    depths = (options.drafter,) if options.only == ALONE else (options.drafter, options.refiner)
    models = random_pair(options, options.device, depths)
    call = drawing(models[0] if options.only == ALONE else together(models, options), options.batch[0], options, True)
    reset_peak_memory(device)
    call()
    print(json.dumps({"peak_memory": peak_memory(device)}))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(options.device)
    memory = {
        (side, batch): in_child([*sys.argv[1:], "--batch", str(batch), "--only", side])["peak_memory"]
        for batch in options.batch
        for side in (ALONE, TOGETHER)
    }
    models = random_pair(options, options.device, (options.drafter, options.refiner))
    sides: dict[str, VAR | CoDe] = {ALONE: models[0], TOGETHER: together(models, options)}
    figures = []
    for batch in options.batch:
        for decode in (False, True):
            calls = {side: drawing(model, batch, options, decode) for side, model in sides.items()}
            times = in_turn(calls, options.rounds, device)
            for side in sides:
                taken = statistics.median(times[side])
                faster = {ALONE: median_ratio(times[ALONE], times[side])} if side == TOGETHER else {}
                figures.append(
                    {
                        "side": side,
                        "batch": batch,
                        "image_decoder": decode,
                        "seconds": taken,
                        "images_per_second": batch / taken,
                        "peak_memory": memory[side, batch] if decode else None,
                        "times_as_fast_as": faster,
                        "rounds": times[side],
                    }
                )
    return figures


def main() -> None:
    options = arguments().parse_args()
    torch.set_num_threads(options.threads)
    if options.only:
        measure_memory(options)
        return
    device, sizes = torch.device(options.device), counted(options)
    gib = {name: f"{value / 2**30:.2f}" for name, value in sizes.items()}
    largest_cache = max(sizes["drafter_cache"], sizes["refiner_cache"]) / 2**30
    notes = [
        f"Weights and cache at batch {options.counted_batch}, {options.dtype}, counted, in GiB: drafter alone "
        f"{gib['alone']} (weights {gib['drafter_weights']}, tokenizer {gib['tokenizer']}, cache "
        f"{gib['drafter_cache_whole']}); together {gib['together']} (weights {gib['drafter_weights']} + "
        f"{gib['refiner_weights']}, tokenizer {gib['tokenizer']}, cache at most {largest_cache:.2f}), which is "
        f"{sizes['together'] / sizes['alone']:.2f} of it; {sizes['together_dropped'] / sizes['alone']:.2f} if each "
        "model were in memory in its turn only",
    ]
    if options.count_only:
        print(notes[0])
        return
    result = {
        "counted": sizes,
        "counted_share": sizes["together"] / sizes["alone"],
        "figures": measure(options),
        "product_rates": {options.dtype: product_rate(PRECISIONS[options.dtype], device)},
        "machine": machine(device),
    }
    columns: dict[str, Callable[[Any], str]] = {
        "side": str,
        "batch": str,
        "image_decoder": lambda decode: "with" if decode else "without",
        "seconds": "{:.3f}".format,
        "images_per_second": "{:.3g}".format,
        "peak_memory": lambda n: "" if n is None else f"{n / 2**20:.0f} MiB",
    }
    report(options, result, columns, notes)


if __name__ == "__main__":
    main()
