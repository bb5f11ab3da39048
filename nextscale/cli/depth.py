"""``nextscale depth``"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMS = {"png": "-depth.png", "npy": ".npy", "picture": "-colours.png", "points": ".ply", "view": "-view.png"}
"""What may be written of a photo, and how the file's name goes on after the photo's."""

STEPS = {"metre": 256.0, "relative": 65535.0}
"""Steps of the 16-bit PNG per unit, where nothing else is asked for: KITTI's, and those that take [0, 1] whole."""

RECORD = "depth.json"

SETTINGS = {
    "png": ("png_scale",),
    "picture": ("colormap",),
    "points": ("fov", "camera", "points"),
    "view": ("fov", "camera", "turn", "rise"),
}
"""Options that each form depends on beside the depth itself."""


def add_arguments(parser: Any) -> None:
    from nextscale.cli.parsing import add_loading
    from nextscale.pictures.depth import COLOURMAP

    parser.add_argument("photos", nargs="+", type=str, help="pictures of any kind and size, patterns, or one folder")
    parser.add_argument(
        "--model", type=str | None, default=None, help="name, file or folder; unless named, the one that ships"
    )
    parser.add_argument("--samples", type=int | None, default=None, help="how many to average; as published")
    parser.add_argument("--seed", type=int, default=0, help="every photo is drawn from it, alone or among others")
    parser.add_argument("--flip", action="store_true", help="average with the mirrored photo: twice the time")
    parser.add_argument(
        "--pick",
        type=str | None,
        default=None,
        help="DepthART: drawn, likeliest or expected codes; the model's own, unless named",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=str, default="out/depth", help="folder; what is there already is not made again")
    group.add_argument(
        "--save",
        nargs="+",
        type=str,
        default=["png", "npy", "picture"],
        help="any of png (16 bits), npy (float32), picture (coloured), points (coloured, PLY), view (from elsewhere)",
    )
    group.add_argument(
        "--png-scale", type=float | None, default=None, help="PNG steps per metre, 256; of relative depth 65535"
    )
    group.add_argument("--colormap", type=str, default=COLOURMAP, help="one of matplotlib's")
    group.add_argument("--overwrite", action="store_true", help="make everything anew")
    group = parser.add_argument_group("points and views")
    group.add_argument(
        "--fov", type=float | None, default=None, help="field of view along the longer side, degrees; 55 unless known"
    )
    group.add_argument(
        "--camera", nargs="+", type=float, default=None, help="instead: fx fy cx cy, in pixels of the photo"
    )
    group.add_argument("--points", type=int, default=1_000_000, help="at most so many")
    group.add_argument("--turn", type=float, default=15.0, help="view: degrees that the camera moves to the right")
    group.add_argument("--rise", type=float, default=0.0, help="view: degrees that it moves up")
    add_loading(parser)


def run(arguments: Any) -> None:
    from nextscale.cli.console import progress, say
    from nextscale.models import shipped

    arguments.model = arguments.model or shipped("model of depth", "dar", "depthart")
    settings = check(arguments)
    photos = find_photos(arguments.photos)
    out = Path(arguments.out)
    written = _left(photos, out, arguments, settings)
    if not written:
        say(f"all {len(photos)} depth maps are in {out} already; --overwrite makes them anew")
        return
    import nextscale
    from nextscale.cli.parsing import loading_options

    model = nextscale.load(arguments.model, **loading_options(arguments))
    if not hasattr(model, "predict") or not hasattr(model, "unit"):
        raise ValueError(f"{arguments.model} is a {type(model).__name__}, which predicts no depth")
    record(out / RECORD, settings, model, arguments.overwrite)
    failed: list[str] = []
    with progress("depth", "steps") as report:
        for number, (path, stem) in enumerate(written):
            try:
                _one(model, path, out / stem, arguments, _shifted(report, number, len(written)))
            except (ValueError, OSError) as error:
                if isinstance(error, OSError) and getattr(error, "filename", None) not in (None, str(path)):
                    raise  # the folder cannot be written to: no photo's fault
                failed.append(f"{path}: {error}" if str(path) not in str(error) else str(error))
    done = len(written) - len(failed)
    kept = len(photos) - len(written)
    more = f", {kept} were there already" if kept else ""
    say(f"{done} depth map{'' if done == 1 else 's'} ({model.unit}) in {out}{more}")
    if failed:
        more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise ValueError(f"{len(failed)} of {len(written)} photos gave no depth: {'; '.join(failed[:5])}{more}")


def check(arguments: Any) -> dict[str, Any]:
    """What the files that are asked for depend on, by name.

    Raises:
        ValueError: an option is out of range or contradicts another.
    """
    if unknown := [form for form in arguments.save if form not in FORMS]:
        raise ValueError(f"--save {unknown[0]!r} is none of {', '.join(FORMS)}")
    if arguments.samples is not None and arguments.samples < 1:
        raise ValueError(f"--samples is {arguments.samples}; expected 1 or more")
    if arguments.points < 1:
        raise ValueError(f"--points is {arguments.points}; expected 1 or more")
    if arguments.png_scale is not None and not arguments.png_scale > 0:
        raise ValueError(f"--png-scale is {arguments.png_scale}; expected more than 0")
    if arguments.camera is not None and (len(arguments.camera) != 4 or arguments.fov is not None):
        raise ValueError("--camera takes four numbers, fx fy cx cy, and stands instead of --fov")
    from nextscale.cli.parsing import loading_options
    from nextscale.tasks.depth.geometry import Camera

    _camera(arguments, (2, 2), Camera)
    names = ["model", "samples", "seed", "flip", "pick"]
    names += [name for form in arguments.save for name in SETTINGS.get(form, ()) if name not in names]
    loading = {name: value for name, value in loading_options(arguments).items() if name != "device"}
    return {**{name: arguments[name] for name in names}, **loading}


def find_photos(given: list[str]) -> list[tuple[Path, str]]:
    """Photos with the names, without suffix, that their results get: their own, in folders as theirs.

    Raises:
        ValueError: there is none, or two would have the same results.
    """
    from nextscale.datasets.sources import find

    source = find(given[0] if len(given) == 1 else given, labels=False)
    if source.kind != "image":
        raise ValueError(f"{given[0]} holds shards; depth is made of pictures in folders")
    photos = [(source.root / name, str(Path(name).with_suffix(""))) for name in source.files]
    by_stem: dict[str, Path] = {}
    for path, stem in photos:
        if stem in by_stem:
            raise ValueError(
                f"{by_stem[stem]} and {path} would be written to the same files: give one of them at a time"
            )
        by_stem[stem] = path
    return photos


def _left(
    photos: list[tuple[Path, str]], out: Path, arguments: Any, settings: dict[str, Any]
) -> list[tuple[Path, str]]:
    """The photos of which a result is missing.

    Raises:
        ValueError: what is there was made with other settings.
    """
    before = out / RECORD
    if arguments.overwrite or not before.is_file():
        return photos
    try:
        old = json.loads(before.read_text(encoding="utf-8"))["settings"]
        changed = [name for name, value in settings.items() if name in old and old[name] != value]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{before} is damaged: name another --out, or add --overwrite") from None
    if changed:
        told = "; ".join(f"{name} was {old.get(name)!r}, now {settings[name]!r}" for name in changed[:3])
        raise ValueError(f"{out} holds depth made otherwise ({told}): name another --out, or add --overwrite")
    return [
        (path, stem) for path, stem in photos if not all(_path(out / stem, form).is_file() for form in arguments.save)
    ]


def _path(place: Path, form: str) -> Path:
    return place.with_name(place.name + FORMS[form])


def record(path: Path, settings: dict[str, Any], model: Any, anew: bool = False) -> None:
    """Beside the results: what made them, and what they mean. Of forms that are there already, ``anew`` forgets it."""
    import torch

    from nextscale import __version__
    from nextscale.core.checkpoint import write_json

    if path.is_file() and not anew:
        settings = {**json.loads(path.read_text(encoding="utf-8"))["settings"], **settings}
    steps = settings.get("png_scale") or STEPS[model.unit]
    meaning = {"unit": model.unit, "png": f"value / {steps:g}, 0 is unknown", "png_scale": steps}
    versions = {"nextscale": __version__, "torch": torch.__version__}
    write_json(path, {"settings": settings, "depth": meaning, "versions": versions})


def _shifted(report: Callable[[int, int], None], number: int, photos: int) -> Callable[[int, int], None]:
    """Progress within one of several photos as that of them all."""
    return lambda done, total: report(number * total + done, photos * total)


def _one(model: Any, path: Path, place: Path, arguments: Any, report: Callable[[int, int], None]) -> None:
    from nextscale.cli.control import read

    image = read(path)
    given = {} if arguments.pick is None else {"pick": arguments.pick}
    found = model.predict(image, arguments.samples, arguments.seed, flip=arguments.flip, progress=report, **given)
    save(image, found, place, arguments)


def save(image: Any, found: Any, place: Path, arguments: Any) -> None:
    """Write what was asked for of one photo."""
    import io

    import numpy as np

    from nextscale.pictures import depth_picture, depth_png, save_png, write_file
    from nextscale.tasks.depth.geometry import Camera, point_cloud, save_ply, turned

    depth = found.depth
    camera = _camera(arguments, tuple(depth.shape), Camera)
    for form in arguments.save:
        path = _path(place, form)
        if form == "png":
            content = depth_png(depth, arguments.png_scale or STEPS[found.unit])
            write_file(path, content, overwrite=True)
        elif form == "npy":
            buffer = io.BytesIO()
            np.save(buffer, depth.numpy())
            write_file(path, buffer.getvalue(), overwrite=True)
        elif form == "picture":
            save_png(depth_picture(depth, arguments.colormap), path, overwrite=True)
        elif form == "points":
            save_ply(point_cloud(depth, image, camera, limit=arguments.points), path)
        else:
            save_png(turned(depth, image, camera, arguments.turn, arguments.rise), path, overwrite=True)


def _camera(arguments: Any, size: tuple[int, ...], camera: Any) -> Any:
    """Raises ValueError where there is no such camera."""
    if arguments.camera is not None:
        return camera(*arguments.camera)
    return camera.of_view(*size) if arguments.fov is None else camera.of_view(*size, arguments.fov)
