"""How fast data is read, and how much memory it takes.

    python benchmarks/data.py            # images per second on one core, beside bare loops that only decode
    python benchmarks/data.py --memory   # 50,000 images written as shards, streamed, and measured by a network

Speed is that of the batches a training is given, in this process, from files that were made for the purpose. The bare
loop makes the same tensors with Pillow and NumPy and nothing else: it decodes, resizes and crops where that is asked
for, and scales to [-1, 1]. Every round opens the data anew, so that nothing has been decoded before; sides are timed
in turn, in seconds of this process, so that others on the same core do not count. Memory is the peak of a
process of its own, on 50,000 images and on 1,000 of the same.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import in_child, machine, peak_memory  # type: ignore[import-not-found,unused-ignore]
from PIL import Image
from rich.console import Console
from rich.table import Table

from nextscale.cli.evaluate_generation import image_batches
from nextscale.core.checkpoint import write_json
from nextscale.core.training import TrainingConfig
from nextscale.datasets.images import open_images
from nextscale.datasets.sampler import EpochSampler
from nextscale.datasets.streaming import open_stream
from nextscale.datasets.tokens import TokenWriter, open_tokens
from nextscale.evaluation.feature_statistics import statistics_of
from nextscale.evaluation.networks import open_network
from nextscale.tasks.data import stream

BATCH = 64
TOKENS, VOCABULARY, PER_IMAGE = 680, 4096, 16
SHARD = 5000
"""Images of a shard, where memory is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="measure memory instead of speed")
    parser.add_argument("--images", type=int, help="of a round (512), or to hold against 1,000 (50,000)")
    parser.add_argument(
        "--size", type=int, help="side of the images that are trained: 256; of small ones in shards: 32"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--few", type=int, default=1000, help="images that --memory compares with")
    parser.add_argument("--json", help="write the figures to this file")

    # What a process of its own measures: how many images, how, and where they are.
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only:
        name, count, folder = options.only
        print(json.dumps(peak_of(name, int(count), Path(folder), options.size)))
        return
    result = memory(options) if options.memory else speed(options)
    if options.json:
        write_json(options.json, {"machine": machine(torch.device("cpu")), **result})


# --- speed --------------------------------------------------------------------------------------------

BARE, DECODING = "a bare loop", "decoding alone"
Side = Callable[[], Callable[[], object]]
"""Opens the data, which is not timed; what it returns reads all of it, and says how many samples there were."""


def speed(options: argparse.Namespace) -> dict[str, Any]:
    count, size = options.images or 512, options.size or 256
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        groups = {
            f"{size} x {size} files, nothing resized": image_sides(folder / "same", count, size, size, 1.0),
            f"{size * 5 // 4} x {size * 3 // 2} files, resized and cropped": image_sides(
                folder / "larger", count, size * 5 // 4, size, 1.125
            ),
            "tokens": token_sides(folder / "tokens", count),
        }
        figures = []
        for group, sides in groups.items():
            times = timed(sides, options.rounds)
            for side, seconds in times.items():
                rate = count * (PER_IMAGE if group == "tokens" else 1) / statistics.median(seconds)
                figure: dict[str, Any] = {"files": group, "side": side, "images_per_second": rate}
                for bare in (BARE, DECODING):
                    if bare in times:
                        ratios = [a / b for a, b in zip(times[bare], seconds, strict=True)]
                        figure[f"of {bare}"] = statistics.median(ratios)
                figures.append(figure)
    columns = [f"of {BARE}", f"of {DECODING}"]
    table = Table("files", "read by", "images per second and core", *columns)
    for figure in figures:
        shares = [f"{figure[name]:.2f}" if name in figure else "" for name in columns]
        table.add_row(str(figure["files"]), str(figure["side"]), f"{figure['images_per_second']:,.0f}", *shares)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return {"figures": figures}


def timed(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, in turn; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            read = side()
            start = time.process_time()  # of this process: others may be busy on the same core
            read()
            if number:
                times[name].append(time.process_time() - start)
    return times


def image_sides(folder: Path, count: int, side: int, size: int, ratio: float) -> dict[str, Side]:
    """The same files in a folder and in shards.

    Args:
        side: the shorter one of the files.
        size, ratio: of the images that are trained, and what is resized before the crop.
    """
    for number in range(count):
        path = folder / "files" / f"class{number % 2}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, side, side if ratio == 1 else size * 3 // 2))
    write_shards(folder / "shards", (path.read_bytes() for path in sorted(folder.rglob("*.jpg"))), count // 2)
    options: dict[str, Any] = {"size": size, "resize_ratio": ratio, "labels": False}

    files = sorted(folder.rglob("*.jpg"))

    def bare() -> None:
        for start in range(0, count, BATCH):
            batch = np.empty((BATCH, 3, size, size), np.float32)
            for path, place in zip(files[start : start + BATCH], batch, strict=False):
                read_into(place, path, size, ratio)

    def decoding() -> None:
        for path in files:
            np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))

    def given(opened: Callable[[], Any]) -> Side:
        return lambda: partial(read_epoch, opened(), count)

    shards = str(folder / "shards" / "*.tar")
    return {
        BARE: lambda: bare,
        DECODING: lambda: decoding,
        "a folder": given(lambda: open_images(folder / "files", **options)),
        "shards, indexed": given(lambda: open_images(shards, **options)),
        "shards, streamed": given(lambda: open_stream(shards, **options)),
    }


def read_into(place: np.ndarray, path: Path, size: int, ratio: float) -> None:
    """(3, size, size) in [-1, 1], as cheaply as it can be made."""
    image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    if ratio != 1:
        short = round(size * ratio)
        width, height = image.size
        wanted = (short, short * height // width) if width <= height else (short * width // height, short)
        image = image.resize(wanted, Image.Resampling.LANCZOS).crop((0, 0, size, size))
    np.divide(np.asarray(image).transpose(2, 0, 1), np.float32(127.5), out=place)
    np.subtract(place, np.float32(1), out=place)


def token_sides(folder: Path, count: int) -> dict[str, Side]:
    """Tokens of many more images, in one shard: they take so little time."""
    count *= PER_IMAGE
    generator = np.random.default_rng(0)
    with TokenWriter(folder, metadata={"vocabulary": VOCABULARY}) as writer:
        writer.write(generator.integers(0, VOCABULARY, (count, TOKENS)), np.zeros(count, int), np.arange(count))

    def bare() -> Callable[[], int]:
        from safetensors.numpy import load_file

        rows = load_file(next(folder.glob("*.safetensors")))["tokens"]
        order = [index for keys in islice(EpochSampler(count, batch_size=BATCH), count // BATCH) for _, index in keys]

        def read() -> int:
            for start in range(0, count, BATCH):
                batch = [torch.from_numpy(rows[index].astype(np.int64)) for index in order[start : start + BATCH]]
                torch.stack(batch)
            return count

        return read

    return {BARE: bare, "token shards": lambda: partial(read_epoch, open_tokens(folder), count)}


def read_epoch(dataset: Any, count: int) -> int:
    """All samples once, as a training is given them."""
    batches = stream(dataset, TrainingConfig(batch_size=BATCH))(0, BATCH)
    return sum(len(batch["index"]) for batch in islice(batches, count // BATCH))


# --- memory -------------------------------------------------------------------------------------------


class Pooled(torch.nn.Module):
    """A network whose features cost nothing: 48 means of an image's parts."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


def memory(options: argparse.Namespace) -> dict[str, Any]:
    many, size = options.images or 50_000, options.size or 32
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_shards(folder / "shards", (picture(number, size, size) for number in range(many)), SHARD)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the form that evaluation networks come in
            torch.jit.save(torch.jit.script(Pooled()), str(folder / "network.pt"))
        stored = sum(path.stat().st_size for path in (folder / "shards").iterdir())
        figures = []
        for name in ("streamed for training", "evaluated"):
            found = {}
            for count in (options.few, many):
                found[count] = in_child(["--only", name, str(count), str(folder), "--size", str(size)])
            figures.append({"what": name, "few": found[options.few], "many": found[many]})
    table = Table("images", f"peak, {options.few:,}", f"peak, {many:,}", "more", "of it features that are kept")
    for figure in figures:
        few, many_ = figure["few"], figure["many"]
        texts = [f"{n / 2**20:,.0f} MiB" for n in (few["peak"], many_["peak"], many_["peak"] - few["peak"])]
        table.add_row(figure["what"], *texts, f"{many_['kept'] / 2**20:,.0f} MiB" if many_["kept"] else "")
    console = Console()
    console.print(table)
    pixels = many * 3 * size * size
    console.print(f"{stored / 2**20:,.0f} MiB on disk, {pixels / 2**20:,.0f} MiB of pixels, four times that as float32")
    return {"figures": figures, "stored": stored, "pixels": pixels}


def peak_of(name: str, count: int, folder: Path, size: int) -> dict[str, int]:
    """Bytes at the peak of this process, and of the features it keeps."""
    shards = str(folder / "shards" / "*.tar")
    if name == "evaluated":
        batches = image_batches(shards, SimpleNamespace(size=size, limit=count))
        network = open_network(str(folder / "network.pt"), torch.device("cpu"))
        features = statistics_of(batches, network).features
        assert features is not None and len(features) == count
        return {"peak": peak_memory(torch.device("cpu")), "kept": features.numel() * 4}
    read_epoch(open_stream(shards, size=size, resize_ratio=1.0, labels=False), count)
    return {"peak": peak_memory(torch.device("cpu")), "kept": 0}


# --- files --------------------------------------------------------------------------------------------


def picture(seed: int, width: int, height: int) -> bytes:
    """A JPEG of quality 90 with large shapes and fine grain, about as many bytes as a photograph has."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels = (smooth + generator.integers(-12, 13, (height, width, 1))).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_shards(folder: Path, images: Iterator[bytes], each: int) -> None:
    """Webdataset shards of KEY.jpg and KEY.cls."""
    from webdataset import ShardWriter

    folder.mkdir(parents=True)
    with ShardWriter(f"{folder}/images-%04d.tar", maxcount=each, verbose=0) as writer:
        for number, data in enumerate(images):
            writer.write({"__key__": f"{number:06d}", "jpg": data, "cls": number % 2})


if __name__ == "__main__":
    main()
