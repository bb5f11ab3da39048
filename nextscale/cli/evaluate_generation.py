"""``nextscale evaluate generation``"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SWEPT: dict[str, type] = {"guidance": float, "top_k": int, "top_p": float, "temperature": float, "steps": int}
"""Options of drawing that a sweep may vary, and their kinds."""
BATCH = 64
"""Images seen by the network at once."""


def add_arguments(parser: Any) -> None:
    from nextscale.cli.parsing import add_drawing, add_loading

    parser.add_argument(
        "source",
        type=str,
        help="a model to draw with: name, file or folder; or images drawn before: a folder, shards, an .npz (arr_0)",
    )
    parser.add_argument(
        "--reference",
        type=str,
        required=True,
        help="real images: a folder, shards or .npz; or statistics of them, as --keep writes or the field hands on "
        "(mu, sigma, mu_s, sigma_s, arr_0)",
    )
    parser.add_argument(
        "--network",
        type=str,
        required=True,
        help="whose features: inception:FILE (pt_inception-2015-12-05, that of published figures), a TorchScript file, "
        "or transformers:NAME",
    )
    parser.add_argument("--keep", type=str | None, default=None, help="write the reference's statistics to this .npz")
    parser.add_argument("--size", type=int | None, default=None, help="crop and resize images of folders to this side")
    parser.add_argument("--limit", type=int | None, default=None, help="only the first so many images of each kind")
    parser.add_argument("--out", type=str, default="out/generation", help="folder of images and figures")
    group = parser.add_argument_group("images to draw")
    group.add_argument("--images", type=int, default=50_000, help="how many; classes (or prompts) take turns")
    group.add_argument("--classes", nargs="+", type=str, default=None, help="numbers or ranges; all, unless named")
    group.add_argument("--prompts", type=str | None, default=None, help="file of prompts, of models that read text")
    group.add_argument("--steps", type=int | None, default=None, help="FlowAR: steps from noise; FlexVAR: scales")
    group.add_argument("--npz", action="store_true", help="also samples.npz, which other evaluators read")
    group.add_argument(
        "--sweep",
        nargs="+",
        type=str,
        default=None,
        help="such as guidance=0,1.5,3 top_k=0,900: every combination, and the curve of their figures; of "
        + ", ".join(SWEPT),
    )
    parser.add_argument("--clip", type=str | None, default=None, help="CLIP score of prompts: a CLIP of transformers")
    add_drawing(parser, guidance=None, top_p=None)
    add_loading(parser)


def run(arguments: Any) -> None:
    from nextscale.cli.console import note, say
    from nextscale.cli.generation_report import Point, write_report
    from nextscale.evaluation.generation_figures import compare
    from nextscale.evaluation.networks import open_network
    from nextscale.loading import choose_device

    for name in ("images", "limit", "size"):
        if arguments[name] is not None and arguments[name] < 1:
            raise ValueError(f"--{name} is {arguments[name]}; expected 1 or more")
    device = choose_device(arguments.device)
    network = open_network(arguments.network, device)
    points = sweep_points(arguments.sweep)
    out, source = Path(arguments.out), arguments.source
    if holds_images(source):
        if arguments.sweep is not None or arguments.prompts is not None or arguments.clip is not None:
            raise ValueError(f"{source} holds images: --sweep, --prompts and --clip are for models that draw")
        sets: Iterator[tuple[dict[str, Any], Any]] = iter([({}, (lambda: image_batches(source, arguments), None))])
    else:
        sets = drawn_sets(arguments, points, out)
    reference, measured = None, []
    for settings, (batches, clip_score) in sets:
        first = next(iter(batches()))
        if reference is None:
            reference = reference_statistics(arguments, network, tuple(first.shape[-2:]))
        generated = gathered(batches(), network, "measuring images")
        figures = compare(generated, reference, device=device if device.type == "cuda" else "cpu")
        if clip_score is not None:
            from dataclasses import replace

            figures = replace(figures, clip_score=clip_score())
        measured.append(Point(settings, figures, first[:16]))
    if not measured:  # another process than the first
        return
    for remark in dict.fromkeys(remark for point in measured for remark in point.figures.notes):
        note(remark)
    text, files = write_report(source, measured, out)
    say(text)
    say(f"in {out}: {', '.join(file.name for file in files)}")


# --- images -------------------------------------------------------------------------------------------


def holds_images(source: str) -> bool:
    """Whether a source is images rather than a model."""
    from nextscale.models import MODELS

    path = Path(source).expanduser()
    if source in MODELS or any((path / inner).is_file() for inner in ("config.json", "model/config.json")):
        return False
    return path.is_dir() or path.suffix in (".npz", ".parquet", ".tar", ".gz", ".tgz") or any(c in source for c in "*{")


def image_batches(source: str, arguments: Any, size: int | None = None) -> Iterator[Any]:
    """Images (B, 3, H, W) in [0, 1] of a folder, shards or an .npz file.

    Args:
        size: side of the crops of a folder or shards, where ``--size`` names none.
    """
    from nextscale.datasets.images import open_images
    from nextscale.evaluation.npz_images import NpzImages

    if Path(source).suffix == ".npz":
        yield from NpzImages(source).batches(BATCH, arguments.limit)
        return
    side = arguments.size or size or own_side(source)
    dataset = open_images(source, size=side, crop="center", resize_ratio=1.0, labels=False, keep=False)
    count = min(len(dataset), arguments.limit or len(dataset))
    for start in range(0, count, BATCH):
        yield (dataset.fetch(range(start, min(start + BATCH, count)))["image"] + 1) / 2


def own_side(source: str) -> int:
    """The side of a folder's first image.

    Raises:
        ValueError: it is not square, or the images are in shards: then the size must be named.
    """
    from PIL import Image

    folder = Path(source)
    kinds = {".png", ".jpg", ".jpeg", ".webp"}
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds) if folder.is_dir() else []
    if not found:
        raise ValueError(f"{source}: name the side of its images with --size")
    with Image.open(found[0]) as image:
        width, height = image.size
    if width != height:
        raise ValueError(f"{found[0]} is {width} x {height} pixels, not square: name the side to crop to with --size")
    return width


def gathered(batches: Any, network: Any, what: str) -> Any:
    """Statistics of images, with a progress bar."""
    from nextscale.cli.console import progress
    from nextscale.evaluation.feature_statistics import statistics_of

    with progress(what, "images") as report:
        return statistics_of(batches, network, lambda done: report(done, 0))


def reference_statistics(arguments: Any, network: Any, size: tuple[int, int]) -> Any:
    """Of the reference, read or computed; kept where ``--keep`` says.

    Args:
        size: of the images it is compared with.

    Raises:
        ValueError: it was made with another network, or holds neither images nor statistics.
    """
    from nextscale.evaluation.feature_statistics import holds_statistics, read_statistics, with_features

    source = arguments.reference
    if Path(source).suffix == ".npz" and holds_statistics(source):
        made = with_features(read_statistics(source, network), source, network, BATCH)
    else:
        made = gathered(image_batches(source, arguments, size[0]), network, "measuring the reference")
    if arguments.keep is not None:
        made.save(arguments.keep)
    return made


# --- drawing ------------------------------------------------------------------------------------------


def sweep_points(words: list[str] | None) -> list[dict[str, Any]]:
    """Every combination of the values of a sweep; one without any, where there is none.

    Raises:
        ValueError: an option cannot be swept, or a value is no number.
    """
    axes: dict[str, list[Any]] = {}
    for word in words or ():
        name, _, values = word.replace("-", "_").partition("=") if "=" in word else (word, "", "")
        if name not in SWEPT or not values or name in axes:
            raise ValueError(f"--sweep {word!r}: expected NAME=VALUE,VALUE,… once for each of {', '.join(SWEPT)}")
        try:
            axes[name] = [SWEPT[name](value) for value in word.partition("=")[2].split(",")]
        except ValueError:
            raise ValueError(f"--sweep {word!r}: {name} takes numbers ({SWEPT[name].__name__})") from None
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def drawn_sets(
    arguments: Any, points: list[dict[str, Any]], out: Path
) -> Iterator[tuple[dict[str, Any], tuple[Callable[[], Any], Callable[[], float] | None]]]:
    """For each point of a sweep the images, drawn by all processes together; given to the first process only."""
    import torch
    from accelerate import PartialState

    import nextscale
    from nextscale.cli.console import progress
    from nextscale.cli.evaluate_restoration import owner_of
    from nextscale.cli.parsing import loading_options, needed
    from nextscale.tasks.generation.evaluation_samples import SampleRun, draw_samples, drawn_batches, merge

    # Without being told, processes on CPUs do not know of each other.
    state = PartialState(cpu=not torch.cuda.is_available() or arguments.device == "cpu")
    loading = loading_options(arguments)
    if state.num_processes > 1 and arguments.device is None:
        loading["device"] = str(state.device)
    model = nextscale.load(arguments.source, **loading)
    if not hasattr(model, "generate"):
        raise ValueError(f"{arguments.source} is a {type(model).__name__}, which draws no images by itself")
    conditions = conditions_of(model, arguments)
    chosen = {name: loading[name] for name in ("dtype", "lite", "weight_bits") if loading.get(name) is not None}
    owner = owner_of(arguments.source, Path(arguments.source), {**chosen, **needed(arguments)})
    for point in points:
        options = options_of(model, arguments, point)
        told = {name: str(value) if name == "schedule" else value for name, value in options.items()}
        sample = SampleRun(owner, arguments.images, conditions, arguments.seed, told)
        folder = out / "samples" / "-".join(f"{name}={value}" for name, value in point.items())

        def generate(given: list[Any], seeds: list[int], options: dict[str, Any] = options) -> Any:
            return model.generate(given, len(seeds), seeds, batch_size=arguments.batch_size, **options)

        with progress("drawing", "parts") as report:
            draw_samples(
                generate,
                sample,
                folder,
                rank=state.process_index,
                processes=state.num_processes,
                progress=report,
            )
        state.wait_for_everyone()
        if not state.is_main_process:
            continue
        if arguments.npz:
            merge(sample, folder, folder / "samples.npz")

        def batches(sample: Any = sample, folder: Path = folder) -> Any:
            return drawn_batches(sample, folder, BATCH)

        def score(sample: Any = sample, folder: Path = folder) -> float:
            return clip_score(arguments, sample, drawn_batches(sample, folder, BATCH))

        yield point, (batches, score if arguments.clip is not None else None)


def conditions_of(model: Any, arguments: Any) -> list[Any]:
    """Classes or prompts that images take turns in.

    Raises:
        ValueError: the model takes the other kind, or CLIP scores are asked for without texts.
    """
    from nextscale.cli.parsing import parse_classes
    from nextscale.cli.prompts import read_prompts

    if hasattr(model, "painter"):
        if arguments.prompts is None or arguments.classes is not None:
            raise ValueError(f"{arguments.source} reads text: give --prompts, a file, and no --classes")
        return read_prompts(arguments.prompts)
    if arguments.prompts is not None or arguments.clip is not None:
        raise ValueError(
            f"{arguments.source} is a {type(model).__name__}, which reads no text: no --prompts, no --clip"
        )
    classes = parse_classes(arguments.classes, model.config.classes)
    if classes is None:
        return list(range(model.config.classes))
    return list(model.labels(classes, len(classes)).tolist())


def options_of(model: Any, arguments: Any, point: dict[str, Any]) -> dict[str, Any]:
    """What ``generate`` is told, a sweep's values in place of those typed.

    Raises:
        ValueError: an option that the model has not.
    """
    from nextscale.cli.parsing import drawing_options, with_filters

    options = drawing_options(arguments)
    options.pop("batch_size")
    if options.pop("smooth"):
        raise ValueError("--smooth is for looking at pictures, not for measuring")
    varied = {name: value for name, value in point.items() if name != "steps"}
    text = hasattr(model, "painter")
    if text and arguments.temperature is None:
        options.pop("temperature")
    options |= varied
    options = options if text else with_filters(options)
    steps = point.get("steps", arguments.steps)
    if steps is not None:
        if hasattr(model, "flow_emitter"):
            options["ode_steps"] = steps
        elif hasattr(model, "schedule_for"):
            options["schedule"] = model.schedule_for(None, steps)
        else:
            raise ValueError(f"--steps is for FlowAR and FlexVAR; this is a {type(model).__name__}")
    return {name: value for name, value in options.items() if value is not None}


def clip_score(arguments: Any, sample: Any, batches: Any) -> float:
    """Mean CLIP score of the drawn images and the prompt of each."""
    from nextscale.evaluation.clip import Clip
    from nextscale.pictures import to_pil
    from nextscale.tasks.generation.text import quiet

    with quiet():
        clip = Clip(arguments.clip, arguments.device or "cpu")
    total, number = 0.0, 0
    for images in batches:
        texts = [sample.condition(number + i) for i in range(len(images))]
        total += float(clip.score([to_pil(image) for image in images], texts).sum())
        number += len(images)
    return total / number
