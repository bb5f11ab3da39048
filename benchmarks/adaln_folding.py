"""What VARGPT's decoder gains where the modulations of its blocks are kept as constants: weights, time, and no change.

    python benchmarks/adaln_folding.py --depth 16 --json folding.json

The label of a VARGPT's decoder is one constant, so every modulation is, too (``model.fold()``). Weights of the
published sizes are counted without memory; times and differences are those of a model with random weights, of a chosen
depth, that draws the same images before and after, in turn.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import in_turn

from nextscale.core.checkpoint import weightless, write_json
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.var_training import initialize
from nextscale.tasks.generation.vargpt import VARGPT
from nextscale.tasks.generation.vargpt_conditions import put_constants
from nextscale.tasks.generation.vargpt_config import PRESETS
from nextscale.tasks.generation.vargpt_small import SmallSizes, small_model
from nextscale.tasks.tokenizers.bitwise_vq import BitwiseVQ, BitwiseVQConfig
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig


def published(name: str) -> tuple[int, int]:
    """Weights of a published decoder, before and after."""
    config = PRESETS[name]
    with weightless():
        tokenizer: Any = (
            ResidualVQ(ResidualVQConfig(schedule=config.schedule))
            if config.var is not None
            else BitwiseVQ(replace(BitwiseVQConfig(), schedule=config.schedule))
        )
        model = VARGPT(config, tokenizer)
        before = decoder_weights(model)
        put_constants(model, None)
    return before, decoder_weights(model)


def decoder_weights(model: VARGPT) -> int:
    """Weights of the decoder and of what conditions it, the image tokenizer left out."""
    names = ("decoder.", "start_embedding.", "folded_")
    return sum(
        value.numel()
        for name, value in model.named_parameters()
        if name.startswith(names) and not name.startswith("decoder.tokenizer.")
    )


def drawn(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an image before and after, and the largest differences of logits and pixels."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    schedule = ScaleSchedule.parse(options.scales)
    tokenizer = ResidualVQ(ResidualVQConfig(schedule=schedule)).eval()
    torch.nn.init.normal_(tokenizer.quantizer.codebook.weight)
    sizes = SmallSizes(decoder_width=64 * options.depth, decoder_depth=options.depth, decoder_heads=options.depth)
    model = small_model(["draw a cat"], tokenizer, 32, sizes).to(options.device).eval()
    initialize(model.decoder, modulation=1, gate=1, head=1)  # type: ignore[arg-type]
    before = decoder_weights(model)
    torch.manual_seed(1)
    folded = small_model(["draw a cat"], tokenizer, 32, sizes)
    folded.load_state_dict(model.state_dict())
    folded = folded.to(options.device).eval().fold()
    sides = {"before": model, "after": folded}
    calls = {
        name: partial(side.generate, "draw a cat", n=options.batch, guidance=0, batch_size=options.batch)
        for name, side in sides.items()
    }
    times = in_turn(calls, options.rounds, torch.device(options.device))
    seconds = {name: statistics.median(each) for name, each in times.items()}
    images = [side.generate("draw a cat", n=options.batch, guidance=0, seed=1) for side in sides.values()]
    logits = []
    for side in sides.values():
        marks, places = side.config.marks, side.config.places
        ids = torch.tensor([[7, 8, marks.start, *[marks.pad] * places, marks.end]], device=options.device)
        kept = torch.zeros(1, dtype=torch.long, device=options.device)
        inputs = torch.zeros(1, schedule.length - schedule.lengths[0], 32, device=options.device)
        with torch.no_grad():
            logits.append(side(ids, torch.ones_like(ids), inputs, kept)[1])
    return {
        "weights": [before, decoder_weights(folded)],
        "seconds": [seconds["before"] / options.batch, seconds["after"] / options.batch],
        "logits differ by": float((logits[0] - logits[1]).abs().max()),
        "pixels differ by": float((images[0] - images[1]).abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=16, help="of the decoder that draws; its width is 64 times that")
    parser.add_argument("--scales", default="1 2 3 4 5 6 8 10 13 16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="calls of each side; one more is not counted")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on the CPU")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    found: dict[str, Any] = {"published": {}}
    for name in PRESETS:
        before, after = published(name)
        found["published"][name] = {"before": before, "after": after}
        print(f"{name}: decoder {before / 1e9:.3f} G weights, folded {after / 1e9:.3f} G")
    found["drawn"] = figures = drawn(options)
    (before, after), (slow, fast) = figures["weights"], figures["seconds"]
    print(f"depth {options.depth}: {before / 1e6:.1f} M weights, folded {after / 1e6:.1f} M")
    print(f"seconds an image: {slow:.3f}, folded {fast:.3f} ({fast / slow:.3f} times as long)")
    print(f"logits differ by {figures['logits differ by']:.1e}, pixels by {figures['pixels differ by']:.1e}")
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
