"""``nextscale evaluate tokenizer``"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextscale.evaluation.reconstruction import ScaleUsage

SHOWN = 8
"""Images on the sheet, each above what the tokenizer makes of it."""
MOST_CODES = 1 << 16
"""Codebooks up to this size are counted code by code."""


def add_arguments(parser: Any) -> None:
    from nextscale.cli.parsing import add_loading

    parser.add_argument("model", type=str, help="a tokenizer, or a model that has one: name, file or folder")
    parser.add_argument("--data", type=str, required=True, help="images: a folder or shards; cropped at the centre")
    parser.add_argument(
        "--network", type=str | None, default=None, help="rFID in its features; as for evaluate generation"
    )
    parser.add_argument("--lpips-weights", type=str | None, default=None, help="LPIPS 0.1's weights for VGG16")
    parser.add_argument("--vgg-weights", type=str | None, default=None, help="VGG16's weights; LPIPS needs both")
    parser.add_argument("--limit", type=int | None, default=None, help="only the first so many images")
    parser.add_argument("--batch-size", type=int, default=32, help="images encoded at once")
    parser.add_argument("--out", type=str, default="out/tokenizer", help="folder of the figures")
    add_loading(parser, compress=False)


def run(arguments: Any) -> None:
    import torch

    import nextscale
    from nextscale.cli.console import pairs, progress, say
    from nextscale.cli.parsing import loading_options
    from nextscale.datasets.images import open_images
    from nextscale.evaluation.distances import frechet_distance
    from nextscale.evaluation.feature_statistics import Gathering
    from nextscale.evaluation.lpips import LPIPS
    from nextscale.evaluation.networks import open_network
    from nextscale.evaluation.reconstruction import ReconstructionMeter
    from nextscale.tasks.data import tokenizer_of
    from nextscale.tasks.tokenizers.image_tokenizer import ImageTokenizer

    if (arguments.lpips_weights is None) != (arguments.vgg_weights is None):
        raise ValueError("LPIPS needs both --lpips-weights and --vgg-weights; give both files or neither")
    if arguments.batch_size < 1 or (arguments.limit is not None and arguments.limit < 1):
        raise ValueError("--batch-size and --limit take numbers of 1 or more")
    tokenizer = tokenizer_of(nextscale.load(arguments.model, **loading_options(arguments)))
    if not isinstance(tokenizer, ImageTokenizer):
        raise ValueError(f"{arguments.model} has a {type(tokenizer).__name__}, which makes no tokens of images")
    device = next(tokenizer.parameters()).device
    schedule = tokenizer.config.schedule
    side, width = tokenizer.image_size(schedule)
    if side != width:
        raise ValueError(f"this tokenizer's scales are of {side} x {width} pixels; only square ones are measured")
    dataset = open_images(arguments.data, size=side, crop="center", resize_ratio=1.0, labels=False)
    count = min(len(dataset), arguments.limit or len(dataset))
    network = open_network(arguments.network, device) if arguments.network else None
    lpips = LPIPS.from_files(arguments.vgg_weights, arguments.lpips_weights) if arguments.vgg_weights else None
    meter, usage, distance = ReconstructionMeter(), None, 0.0
    shown: list[tuple[torch.Tensor, torch.Tensor]] = []
    real, made = (Gathering(network), Gathering(network)) if network else (None, None)
    with progress("encoding and decoding", "images") as report, torch.inference_mode():
        for start in range(0, count, arguments.batch_size):
            stop = min(start + arguments.batch_size, count)
            images = dataset.fetch(range(start, stop))["image"]
            tokens = tokenizer.encode(images.to(device), schedule)
            rebuilt = tokenizer.decode(tokens, schedule).cpu()
            pair = (images + 1) / 2, (rebuilt + 1) / 2
            meter.update(*pair)
            usage = usage or counter(tokenizer, tokens, len(schedule))
            if usage is not None:
                usage.update(schedule.split(tokens))
            if lpips is not None:
                distance += float(lpips.distance(images, rebuilt).sum())
            if real is not None and made is not None:
                real.add(pair[0])
                made.add(pair[1])
            if len(shown) < SHOWN:
                shown += list(zip(*pair, strict=True))[: SHOWN - len(shown)]
            report(stop, count)
    figures = meter.report()
    rows = [("images", f"{figures.images:,}"), ("SSIM", f"{figures.ssim:.4f}"), ("RMSE", f"{figures.rmse:.4f}")]
    rows.insert(1, ("PSNR", "exact" if figures.psnr is None else f"{figures.psnr:.2f} dB"))
    content: dict[str, Any] = {"model": arguments.model, "data": arguments.data, **asdict(figures)}
    if lpips is not None:
        content["lpips"] = distance / figures.images
        rows.append(("LPIPS", f"{content['lpips']:.4f}"))
    if real is not None and made is not None and network is not None:
        statistics = [each.statistics() for each in (made, real)]
        content |= {"rfid": frechet_distance(*(each.moments for each in statistics)), "network": network.identity}
        rows.append(("rFID", f"{content['rfid']:.4g}"))
        if figures.images <= len(statistics[0].moments.mean):
            rows.append(("", f"of fewer images than {len(statistics[0].moments.mean):,} dimensions: biased upwards"))
    say(pairs(rows))
    if usage is not None:
        content["usage"] = {
            "overall": asdict(usage.overall()),
            "per_scale": [asdict(each) for each in usage.per_scale()],
        }
        say(usage_table(usage, schedule))
    files = write(content, shown, usage, Path(arguments.out))
    say(f"in {arguments.out}: {', '.join(file.name for file in files)}")


def counter(tokenizer: Any, tokens: Any, scales: int) -> Any:
    """What counts a tokenizer's codes, or its bits; None for continuous latents."""
    from nextscale.evaluation.bit_usage import BitUsage
    from nextscale.evaluation.reconstruction import CodebookUsage

    if tokens.is_floating_point():
        return None
    if tokens.ndim == 3:
        return BitUsage(tokens.shape[-1], scales)
    vocabulary = tokenizer.config.quantizer.vocabulary
    return CodebookUsage(vocabulary, scales) if vocabulary <= MOST_CODES else None


def usage_table(usage: Any, schedule: Any) -> str:
    """Tokens, share in use, entropy and perplexity of each scale, and of all."""
    from nextscale.cli.console import table

    def row(name: str, each: ScaleUsage) -> tuple[str, ...]:
        return name, f"{each.tokens:,}", f"{each.used:.1%}", f"{each.entropy:.2f}", f"{each.perplexity:.4g}"

    names = [f"{scale.height} x {scale.width}" for scale in schedule.scales]
    rows = [row(name, each) for name, each in zip(names, usage.per_scale(), strict=True)]
    return table(("scale", "tokens", "used", "entropy, bits", "perplexity"), [*rows, row("all", usage.overall())])


def write(content: dict[str, Any], shown: Any, usage: Any, out: Path) -> list[Path]:
    """``figures.json``, ``images.png``, and ``usage.png`` where codes are counted."""
    from nextscale.core.checkpoint import write_atomically, write_json
    from nextscale.pictures import comparison_sheet, save_png

    rows = [("image", [first for first, _ in shown]), ("rebuilt", [second for _, second in shown])]
    out.mkdir(parents=True, exist_ok=True)
    files = [
        write_json(out / "figures.json", content),
        save_png(comparison_sheet(rows), out / "images.png", overwrite=True),
    ]
    if usage is None:
        return files
    from matplotlib.figure import Figure

    scales = usage.per_scale()
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = range(1, len(scales) + 1)
    left.bar(places, [100 * each.used for each in scales], color="#2450b8")
    right.bar(places, [each.entropy for each in scales], color="#2450b8")
    left.set(xlabel="scale", ylabel="in use, %")
    right.set(xlabel="scale", ylabel="entropy, bits")
    figure.suptitle(f"{content['model']} on {content['images']:,} images", fontsize=9)
    files.append(write_atomically(out / "usage.png", lambda path: figure.savefig(path, format="png", dpi=120)))
    return files
