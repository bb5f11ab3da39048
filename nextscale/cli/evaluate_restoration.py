"""``nextscale evaluate restoration``"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLASSICAL = "classical:"


def add_arguments(parser: Any) -> None:
    from typing import Literal

    from nextscale.cli.parsing import add_loading

    parser.add_argument(
        "model",
        type=str,
        help="name, file or folder of a model; a folder of restored images; or classical:nlm, classical:tv, "
        "classical:wavelet, classical:wiener, classical:lucy, classical:gamma, classical:clahe, classical:dcp",
    )
    parser.add_argument(
        "--dataset",
        type=str,
        required=True,
        help="NAME:FOLDER of a published dataset, such as gopro:data/GoPro or reside/outdoor:data/RESIDE; "
        "DEGRADED,CLEAN: two folders with the same names; or a folder of clean images, with --degradation",
    )
    parser.add_argument(
        "--degradation",
        type=str | None,
        default=None,
        help="of clean images: noise25, jpeg10, rain-heavy, …, or with values: noise:sigma=10..30+jpeg:quality=40",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the degradation; with it, every image has its own")
    parser.add_argument("--multiple", type=int, default=1, help="crop clean images to sides of a multiple of this")
    parser.add_argument(
        "--squash", type=int, default=0, help="resize both sides to a square, as VarFormer's options do"
    )
    group = parser.add_argument_group("figures")
    group.add_argument(
        "--protocol",
        type=Literal["basicsr", "airnet", "skimage"],
        default="basicsr",
        help="whose PSNR and SSIM: rounding and windows",
    )
    group.add_argument("--channel", type=Literal["rgb", "y"], default="rgb", help="colours, or luma alone")
    group.add_argument("--crop", type=int, default=0, help="pixels left out at every border")
    group.add_argument("--lpips-weights", type=str | None, default=None, help="LPIPS 0.1's weights for VGG16")
    group.add_argument("--vgg-weights", type=str | None, default=None, help="VGG16's weights; LPIPS needs both")
    group = parser.add_argument_group("work and results")
    group.add_argument("--limit", type=int | None, default=None, help="only so many images, the first by name")
    group.add_argument("--overlap", type=int | None, default=None, help="pixels that neighbouring tiles share")
    group.add_argument("--batch-size", type=int | None, default=None, help="tiles restored at once")
    group.add_argument("--sheets", type=int, default=16, help="sheets of input, output, truth and error, at most")
    group.add_argument("--save", action="store_true", help="write the restored images too")
    group.add_argument(
        "--out", type=str, default="out/evaluation", help="folder; a call that was stopped goes on from what is there"
    )
    add_loading(parser)


def run(arguments: Any) -> None:
    from dataclasses import fields

    from nextscale.cli.console import note, progress, say
    from nextscale.cli.restoration_report import Report, save_sheet
    from nextscale.evaluation.lpips import LPIPS
    from nextscale.pictures import save_png
    from nextscale.tasks.restoration.evaluation import Setting, evaluate, open_examples

    if (arguments.lpips_weights is None) != (arguments.vgg_weights is None):
        raise ValueError("LPIPS needs both --lpips-weights and --vgg-weights; give both files or neither")
    setting = Setting(**{field.name: arguments[field.name] for field in fields(Setting)})
    with progress("checking", "images") as checked:
        pairs, examples = open_examples(setting, checked)
    for remark in pairs.notes if setting.limit is None else ():
        note(remark)
    lpips = None
    if arguments.lpips_weights is not None:
        lpips = LPIPS.from_files(arguments.vgg_weights, arguments.lpips_weights)
    restore, owner = restorer(arguments, setting, examples)
    out, results = Path(arguments.out), list[Any]()
    with progress("restoring", "images") as report:
        for result in evaluate(restore, examples, out, owner, lpips=lpips, progress=report):
            if result.images is not None:
                if len(results) < arguments.sheets:
                    save_sheet(result, out / "sheets" / f"{result.name}.png")
                if arguments.save:
                    path = out / "restored" / f"{result.name}.png"
                    save_png(result.images[1].clamp(0, 1), path, overwrite=True)
            results.append(result)
    figures = Report(arguments.model, setting, results)
    written = figures.write(out)
    say(figures.table())
    say(f"in {out}: images/ with the figures of each, {', '.join(path.name for path in written)}")


def restorer(arguments: Any, setting: Any, examples: list[Any]) -> tuple[Any, str]:
    """What restores, and a text that tells it apart from others.

    Raises:
        ValueError: the model restores nothing, or images of a folder are missing.
    """
    from nextscale.tasks.restoration.evaluation import Predictions

    source = arguments.model
    if source.startswith(CLASSICAL):
        return classical(source.removeprefix(CLASSICAL), setting), source
    path = Path(source).expanduser()
    if path.is_dir() and not any((path / inner).is_file() for inner in ("config.json", "model/config.json")):
        return Predictions.of(path, examples), f"images of {path}"
    import nextscale
    from nextscale.cli.parsing import loading_options

    model = nextscale.load(source, **loading_options(arguments))
    if not hasattr(model, "restore"):
        raise ValueError(f"{source} is a {type(model).__name__}, which restores no images; VarFormer does")
    options = {"overlap": arguments.overlap, "batch": arguments.batch_size}
    return bound(model.restore, source, options), owner_of(source, path, options)


def bound(restore: Callable[..., Any], source: str, options: dict[str, Any]) -> Callable[[Any], Any]:
    """A model's ``restore`` with the options that were given.

    Raises:
        ValueError: it does not take one of them.
    """
    given = {name: value for name, value in options.items() if value is not None}
    known = inspect.signature(restore).parameters
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{source} takes no {', '.join(unknown)}")
    return lambda image: restore(image, **given)


def owner_of(source: str, path: Path, options: dict[str, Any]) -> str:
    """The model's name, when its file was written, and what was asked for beside."""
    files = [path, *(path / inner / "model.safetensors" for inner in ("", "model"))]
    written = [str(file.stat().st_mtime_ns) for file in files if file.is_file()]
    return " ".join([source, *written, *(f"{name}={value}" for name, value in options.items() if value is not None)])


def classical(text: str, setting: Any) -> Callable[[Any], Any]:
    """A classical method; deconvolution is told the blur's kernel where the degradation has a known one."""
    from nextscale.datasets.degradations import parse_steps
    from nextscale.evaluation.classical import Classical

    method = Classical.parse(text)
    if method.method in ("wiener", "lucy") and setting.degradation is not None:
        kernels = [kernel for step in parse_steps(setting.degradation) if (kernel := step.psf()) is not None]
        if len(kernels) == 1 and "sigma" not in method.options:
            method = Classical(method.method, {**method.options, "psf": kernels[0]})
    return method.restore
