"""What drawing with Infinity holds in memory at most, counted without a GPU and without weights.

    python benchmarks/infinity_memory.py                                     # 2B at 1024 px; 8B with 8-bit weights
    python benchmarks/infinity_memory.py --sizes 125m --pixels 256 --run     # and a real run beside the count

The model is built on the meta device and led through the operations of one drawing: every scale with its cache, both
guidance branches, the decoder. Every tensor that is alive counts with its bytes, and the text encoder is gone by then
(`release_encoder`). Attention is counted as its result, which is what a fused kernel allocates, but for a few numbers a
row. `--run` draws with random weights: the same count over real tensors, and the memory that the process or the GPU
really took.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import PRECISIONS, machine, peak_memory, reset_peak_memory, seconds
from rich.console import Console
from rich.table import Table
from torch.overrides import TorchFunctionMode

from nextscale.core.accounting import Alive, nbytes
from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.checkpoint import write_json
from nextscale.core.cross_attention import Packed
from nextscale.core.random import ImageDraws
from nextscale.tasks.generation.infinity import Infinity
from nextscale.tasks.generation.infinity_config import PRESETS
from nextscale.tasks.generation.litevar import compress, weights_only
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizerConfig
from nextscale.tasks.tokenizers.bitwise_schedules import schedule_of
from nextscale.tasks.tokenizers.bitwise_vq import AUTOENCODER, BitwiseVQ, BitwiseVQConfig

GB = 1e9
WEIGHT_BITS = {"8b": 8, "20b": 8}
"""Sizes whose weights are packed unless it is asked otherwise."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [name.removeprefix("infinity-") for name in PRESETS]
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=["2b", "8b"])
    parser.add_argument("--pixels", type=int, default=1024, help="side of a square image")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--words", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--weight-bits", type=int, choices=(4, 8, 16), help="of all sizes; the 8B has 8 by default")
    parser.add_argument("--dtype", choices=PRECISIONS, default="bfloat16")
    parser.add_argument("--run", action="store_true", help="draw with random weights too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    results = [measure(size, options) for size in options.sizes]
    table = Table("size", "pixels", "weight bits", *(f"{name} GB" for name in ("weights", "cache", "peak")), "at")
    for result in results:
        counted = result["counted"]
        figures = (f"{counted[name] / GB:.2f}" for name in ("weights", "cache", "peak"))
        table.add_row(result["size"], str(options.pixels), str(result["weight_bits"]), *figures, counted["at"])
    console = Console()
    console.print(table)
    for result in results:
        if run := result.get("run"):
            console.print(
                f"{result['size']}: tensors of a real run hold {run['peak'] / GB:.3f} GB at most, counted "
                f"{result['counted']['peak'] / GB:.3f}; the {'GPU' if options.device == 'cuda' else 'process'} took "
                f"{run['taken'] / GB:.3f} GB; {run['seconds']:.2f} s",
                highlight=False,
            )
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        write_json(options.json, {"settings": settings, "machine": machine(torch.device(options.device)),
                                  "models": results})  # fmt: skip
        console.print(f"written: {options.json}")


def measure(size: str, options: argparse.Namespace) -> dict[str, Any]:
    bits = options.weight_bits or WEIGHT_BITS.get(size, 16)
    with torch.device("meta"):
        planned = build(size, bits, options)
    counted = count(planned, options)
    result: dict[str, Any] = {"size": size, "weight_bits": bits, "counted": counted}
    if options.run:
        device = torch.device(options.device)
        torch.manual_seed(0)
        model = build(size, bits, options).to(device)
        for value in model.parameters():
            if value.is_floating_point():
                value.detach().normal_(std=0.02)
        reset_peak_memory(device)
        taken = seconds(lambda: count_real(model, options, result), device)
        result["run"]["taken"] = peak_memory(device)
        result["run"]["seconds"] = taken
    return result


def build(size: str, bits: int, options: argparse.Namespace) -> Infinity:
    """The model of a size with its published tokenizer, linear layers of blocks packed."""
    schedule = schedule_of(1.0, options.pixels)
    config = replace(PRESETS[f"infinity-{size}"], schedule=schedule)
    patched = config.token_bits > 32
    quantizer = BitwiseQuantizerConfig(config.token_bits // 4, patch=2) if patched else BitwiseQuantizerConfig()
    autoencoder: AutoencoderConfig = replace(
        AUTOENCODER,
        latent_channels=quantizer.bits,
        multipliers=AUTOENCODER.multipliers[:-1] if patched else AUTOENCODER.multipliers,
    )
    model = Infinity(config, BitwiseVQ(BitwiseVQConfig(autoencoder, quantizer, schedule))).eval()
    model.to(PRECISIONS[options.dtype])
    return model if bits == 16 else compress(model, weights_only(model, bits))


# --- counting -----------------------------------------------------------------------------------------


class FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel: nothing but its result is allocated."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and args[0].device.type == "meta":
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def alive() -> Iterator[Alive]:
    """Counts what is made within."""
    with torch.inference_mode(), FusedAttention(), Alive() as counter:
        yield counter


def count(model: Infinity, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes of weights and cache, and the peak of one drawing: the larger of sampling and decoding."""
    weights, schedule, device = nbytes(model), model.config.schedule, model.device
    words = torch.zeros(options.words, model.config.text_width, dtype=model.dtype, device=device)
    text, rows = Packed(words, (options.words,)), torch.zeros(2 * options.batch, dtype=torch.long, device=device)
    peaks: dict[str, int] = {}
    with alive() as counter:
        network = model.network(text)
        session = network.start(rows, schedule)
        cache = session.cache.nbytes
        quantizer = model.tokenizer.quantizer
        grid = quantizer.grid(schedule, len(schedule) - 1)
        total = torch.zeros(options.batch, quantizer.config.bits, *grid, device=device)
        for index, length in enumerate(schedule.lengths):
            sizes = (options.batch, length, model.config.token_bits)
            inputs = torch.zeros(sizes, device=device) if index else None
            hidden = session.step(index, inputs)
            scores = session.logits(hidden, slice(None)).float()
            del hidden, scores
        peaks["sampling"] = counter.peak
        # The cache goes when the last scale is drawn; texts stay for more images of the same prompts.
        del session, inputs
        counter.forget_peak()
        model.tokenizer.decode_features(total)
        peaks["decoding"] = counter.peak
    at = max(peaks, key=lambda name: peaks[name])
    return {"weights": weights, "cache": cache, "peaks": peaks, "peak": weights + peaks[at], "at": at}


def count_real(model: Infinity, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """The same over real tensors, through the loop that users call."""
    text = torch.randn(options.words, model.config.text_width).to(model.device, model.dtype)
    with alive() as counter:
        steps = model.steps(
            Packed(text, (options.words,)),
            draws=ImageDraws(range(options.batch)),
            rows=[0] * options.batch,
        )
        total = None
        for step in steps:
            total = step.total
        del steps, step
        assert total is not None
        model.tokenizer.decode_features(total)
        result["run"] = {"peak": nbytes(model) + counter.peak}


if __name__ == "__main__":
    main()
