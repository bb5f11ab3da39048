"""``nextscale bench``"""

from __future__ import annotations

from typing import Any


def add_arguments(parser: Any) -> None:
    from nextscale.cli.parsing import add_loading

    parser.add_argument("model", type=str, help="name, file or folder")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], help="images drawn at once")
    parser.add_argument("--repeat", type=int, default=3, help="timed runs each; the median is told")
    parser.add_argument("--guidance", type=float, default=1.5, help="0 halves the transformer's work")
    parser.add_argument("--json", type=str | None, default=None, help="write the figures to this file too")
    add_loading(parser)


def run(arguments: Any) -> None:
    from nextscale.cli.console import note, progress, say, table

    if arguments.repeat < 1 or min(arguments.batch_sizes) < 1:
        raise ValueError("--repeat and --batch-sizes take numbers of 1 or more")
    import time

    import nextscale
    from nextscale.cli.parsing import loading_options

    began = time.perf_counter()
    model = nextscale.load(arguments.model, **loading_options(arguments))
    loading = time.perf_counter() - began
    if not hasattr(model, "steps"):
        raise ValueError(f"{arguments.model} is a {type(model).__name__}, which draws no images by itself")
    figures = []
    with progress("measuring", "runs") as report:
        for number, batch in enumerate(arguments.batch_sizes):

            def done(runs: int, number: int = number) -> None:
                each = arguments.repeat + 1
                report(number * each + runs, len(arguments.batch_sizes) * each)

            figures.append(measure(model, batch, arguments.repeat, arguments.guidance, done))
    rows = [
        (
            f["batch"],
            f"{f['seconds']:.3f}",
            f"{f['decoding_seconds']:.3f}",
            f"{f['images_per_second']:.3g}",
            f["memory"],
        )
        for f in figures
    ]
    say(table(("batch", "seconds", "of it decoding", "images/s", "peak memory"), rows))
    setting = machine(model)
    note(", ".join(f"{name} {value}" for name, value in {**setting, "loading": f"{loading:.2f} s"}.items()))
    if arguments.json is not None:
        import json

        from nextscale.pictures import write_file

        content = {
            "model": arguments.model,
            "machine": setting,
            "loading_seconds": loading,
            "figures": figures,
        }
        say(f"written: {write_file(arguments.json, (json.dumps(content, indent=2) + chr(10)).encode())}")


def measure(model: Any, batch: int, repeat: int, guidance: float, done: Any) -> dict[str, Any]:
    """Median seconds to draw a batch, decoding included; the first run is not counted."""
    import statistics
    import time

    import torch

    from nextscale.core.random import ImageDraws
    from nextscale.tasks.generation.drawing import DRAWING

    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)

    def now() -> float:
        if model.device.type != "cpu":
            getattr(torch, model.device.type).synchronize()
        return time.perf_counter()

    labels = torch.arange(batch, device=model.device) % model.config.classes
    whole, decoding = [], []
    for number in range(repeat + 1):
        draws = ImageDraws(range(batch))
        with torch.inference_mode():
            began = now()
            emitter = model.make_emitter(**DRAWING)
            for step in model.steps(labels, draws=draws, emitter=emitter, guidance=guidance):
                total = step.total
            drawn = now()
            model.tokenizer.decode_features(total)
            ended = now()
        if number:
            whole.append(ended - began)
            decoding.append(ended - drawn)
        done(number + 1)
    seconds = statistics.median(whole)
    return {
        "batch": batch,
        "seconds": seconds,
        "decoding_seconds": statistics.median(decoding),
        "images_per_second": batch / seconds,
        "memory": peak_memory(model),
    }


def peak_memory(model: Any) -> str:
    """The device's peak since it was last reset, or the process's on the CPU."""
    from nextscale.cli.console import size_text

    if model.device.type == "cuda":
        import torch

        return size_text(torch.cuda.max_memory_allocated(model.device))
    import resource
    import sys

    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return size_text(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def machine(model: Any) -> dict[str, str]:
    """What the figures hold for."""
    import platform

    import torch

    cuda = model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(model.device) if cuda else f"{model.device.type} ({platform.machine()})",
        "threads": str(torch.get_num_threads()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
