"""What the benchmarks share: clocks, memory, the machine's own matrix product, models with random weights."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.checkpoint import write_json
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.var import VAR, VARConfig
from nextscale.tasks.generation.var_training import initialize
from nextscale.tasks.tokenizers.residual_vq import SCHEDULE_256, ResidualVQ, ResidualVQConfig

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_arguments(parser: argparse.ArgumentParser, batch: list[int]) -> None:
    """The options that both benchmarks have."""
    parser.add_argument("--depth", type=int, default=16, help="of the transformer; its width is 64 times that")
    parser.add_argument("--scales", help='sides of the token maps, such as "1 2 3 4"; those of 256 pixels by default')
    parser.add_argument("--channels", type=int, default=160, help="of the tokenizer; 160 is the released one's")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, nargs="+", default=batch)
    parser.add_argument("--dtype", nargs="+", choices=PRECISIONS, help="float32 and a lower one by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on the CPU")
    parser.add_argument("--rounds", type=int, default=3, help="calls of each side; one more is not counted")
    parser.add_argument("--official", help="a checkout of FoundationVision/VAR, to be timed in turn")
    parser.add_argument("--json", help="write the figures to this file")

    # The side whose memory a process of its own measures.
    parser.add_argument("--only", help=argparse.SUPPRESS)


def chosen_device(options: argparse.Namespace) -> torch.device:
    return torch.device(options.device)


def lower_precision(options: argparse.Namespace) -> str:
    """What autocast is asked for: the official recipe's float16 on CUDA, which a CPU is slow in."""
    return "float16" if chosen_device(options).type == "cuda" else "bfloat16"


@dataclass(frozen=True)
class Side:
    """One of the things that are timed in turn."""

    code: str  # "nextscale" or "official"
    precision: str
    autocast: bool  # weights in float32, only the arithmetic in the lower precision

    def __str__(self) -> str:
        return f"{self.code} {self.precision}{' autocast' if self.autocast and self.precision != 'float32' else ''}"


def var_configs(options: argparse.Namespace) -> tuple[VARConfig, ResidualVQConfig]:
    """VAR of a depth with the official tokenizer's shape."""
    schedule = ScaleSchedule.parse(options.scales) if options.scales else SCHEDULE_256
    tokenizer = ResidualVQConfig(AutoencoderConfig(channels=options.channels), schedule=schedule)
    return VARConfig.of_depth(options.depth, classes=options.classes, schedule=schedule), tokenizer


def random_model(config: VARConfig, tokenizer: ResidualVQConfig) -> VAR:
    """A model whose every part counts: gates and head are not scaled down as they are before training."""
    torch.manual_seed(0)
    return initialize(VAR(config, ResidualVQ(tokenizer)), gate=1.0, head=1.0).eval()


# --- time ---------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call, the device's queue included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def in_turn(calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Times of every call, taken in turn (A B C A B C …), so that a busy or warm machine touches all alike.

    One round before the first is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            taken = seconds(call, device)
            if number:
                times[name].append(taken)
    return times


def median_ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """How many times as fast the second is: the median over pairs of the same round."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def product_rate(dtype: torch.dtype, device: torch.device, size: int | None = None) -> float:
    """Floating-point operations per second of a square matrix product, the best of several."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(6))


# --- memory -------------------------------------------------------------------------------------------


def reset_peak_memory(device: torch.device) -> None:
    """Forget what building a model needed, so that the peak is that of using it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: what PyTorch held on a CUDA device at most, else this process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        # Not getrusage: a process starts with its parent's peak there.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_child(arguments: Sequence[str]) -> dict[str, Any]:
    """Run this script again in a process of its own, and return the JSON object that it prints last.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run([sys.executable, sys.argv[0], *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# --- the report ---------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif sys.platform == "linux":
        models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def report(
    options: argparse.Namespace,
    result: dict[str, Any],
    columns: Mapping[str, Callable[[Any], str]],
    notes: Sequence[str] = (),
) -> None:
    """A table of the figures, the ratios beside them; and a JSON file if one is asked for."""
    from rich.console import Console
    from rich.table import Table

    figures = result["figures"]
    others = list(dict.fromkeys(name for figure in figures for name in figure["times_as_fast_as"]))
    table = Table(*(name.replace("_", " ") for name in columns), *(f"x {name}" for name in others))
    for figure in figures:
        ratios = figure["times_as_fast_as"]
        cells = [text(figure[name]) for name, text in columns.items()]
        table.add_row(*cells, *(f"{ratios[name]:.2f}" if name in ratios else "" for name in others))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
    rates = ", ".join(f"{p} {rate / 1e9:.0f} GFLOP/s" for p, rate in result["product_rates"].items())
    setting = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    console.print(f"A matrix product runs at {rates}; {setting}", highlight=False)
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("only", "json")}
        write_json(options.json, {"settings": settings, **result})
        console.print(f"written: {options.json}")
