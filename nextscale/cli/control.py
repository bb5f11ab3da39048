"""``nextscale control``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHOWN = 8
"""Pictures in a row of the sheet, at most."""


def add_arguments(parser: Any) -> None:
    from typing import Literal

    from nextscale.cli.parsing import add_drawing, add_loading

    parser.add_argument(
        "inputs",
        nargs="+",
        type=str,
        help="MODEL IMAGE (of masks: JSON); with --extract-only images, or a folder of them",
    )
    parser.add_argument(
        "--type",
        type=str | None,
        default=None,
        help="canny, hed, depth, normal or sketch (ControlVAR: mask too); the model's own, unless named",
    )
    parser.add_argument(
        "--class", dest="class_", type=str | None, default=None, help="number or name; drawn, unless named"
    )
    parser.add_argument("--num", type=int, default=4, help="number of images")
    parser.add_argument("--extracted", action="store_true", help="the image is a control picture already")
    parser.add_argument("--extract-only", action="store_true", help="make control pictures, and draw nothing")
    parser.add_argument(
        "--perceive", action="store_true", help="ControlVAR: draw control pictures that belong to the image"
    )
    parser.add_argument(
        "--fit",
        type=Literal["squash", "crop"],
        default="squash",
        help="to the model's square, as officially: squash; or cut the centre out: crop",
    )
    parser.add_argument("--strength", type=float, default=1.0, help="CAR: 1 as trained, 0 the base alone")
    parser.add_argument("--compare", action="store_true", help="draw the same seeds without the control too")
    add_drawing(parser, guidance=None, top_p=0.96)
    group = parser.add_argument_group("extraction")
    group.add_argument("--low", type=int | None, default=None, help="canny's lower threshold; 100, or the model's own")
    group.add_argument("--high", type=int | None, default=None, help="canny's upper threshold; 200, or the model's own")
    group.add_argument("--resolution", type=int | None, default=None, help="short side at which a detector looks")
    group.add_argument(
        "--depth",
        type=str | None,
        default=None,
        help="depth model for depth and normal: a name or folder that this library or transformers loads",
    )
    parser.add_argument("--out", type=str, default="out/control", help="folder; what is there is kept")
    add_loading(parser)


def run(arguments: Any) -> None:
    if arguments.extract_only:
        extract_only(arguments)
        return
    if len(arguments.inputs) != 2:
        raise ValueError("give a model and an image: nextscale control MODEL IMAGE; or images with --extract-only")
    if arguments.num < 1:
        raise ValueError(f"--num is {arguments.num}; expected 1 or more")
    if arguments.perceive:
        from nextscale.cli.perceive import perceive

        perceive(arguments)
        return
    draw(arguments)


def extract_only(arguments: Any) -> None:
    """Control pictures of images, under their names; of a folder, in its folders."""
    from nextscale.cli.console import progress, say
    from nextscale.datasets.sources import find
    from nextscale.pictures import save_png
    from nextscale.tasks.generation.controls import extract

    how, out = extraction(arguments, arguments.type or "canny"), Path(arguments.out)
    source = find(arguments.inputs[0] if len(arguments.inputs) == 1 else arguments.inputs, labels=False)
    if source.kind != "image":
        raise ValueError(f"{arguments.inputs[0]} holds shards; controls are made of images in folders")
    depth, written = depth_model(arguments.depth), []
    with progress("extracting", "images") as report:
        for number, name in enumerate(source.files):
            picture = extract(read(source.root / name), how, depth=depth)
            written.append(save_png(picture, (out / name).with_suffix(".png")))
            report(number + 1, len(source.files))
    last = f" to {written[-1].relative_to(out)}" if len(written) > 1 else ""
    say(f"{how.kind} controls in {out}: {written[0].relative_to(out)}{last}, {len(written)} in all")


def draw(arguments: Any) -> None:
    import torch

    import nextscale
    from nextscale.cli.console import progress, say
    from nextscale.cli.parsing import drawing_options, loading_options
    from nextscale.cli.records import write_record
    from nextscale.pictures import comparison_sheet, save_png, save_pngs
    from nextscale.tasks.generation.controls import extract

    options = drawing_options(arguments)
    source, place = arguments.inputs
    model = nextscale.load(source, **loading_options(arguments))
    kind = control_type(model, source, arguments.type)
    size = model.tokenizer.image_size(model.config.schedule)
    photo = fitted(read(Path(place)), size, arguments.fit)
    ready = arguments.extracted or is_annotation(Path(place))
    how = extraction(arguments, kind, model, given=ready)
    control = photo if ready else extract(photo, how, depth=depth_model(arguments.depth))
    if options["guidance"] is None:
        options["guidance"] = model.config.guidance
    given: dict[str, Any] = {"control": control[None], "control_type": kind}
    if arguments.strength != 1:
        given["strength"] = strength_of(model, source, arguments.strength)
    sets = {"control": given, **({"without": {}} if arguments.compare else {})}
    drawn: dict[str, Any] = {}
    with progress("drawing", "scales") as report:
        for name, extra in sets.items():
            drawn[name] = model.generate(
                arguments.class_, arguments.num, arguments.seed, **options, **extra, progress=report
            )
    out, files = Path(arguments.out), dict[str, Any]()
    files["control"] = save_png(control, out / "control.png").name
    for name, images in drawn.items():
        files["images" if name == "control" else name] = [
            path.name for path in save_pngs(images, out, stem="image" if name == "control" else name)
        ]
    shown = min(arguments.num, SHOWN)
    headings = [
        "given" if ready else "image",
        kind,
        *(f"seed {arguments.seed + i}" for i in range(shown)),
    ]
    rows = [(arguments.class_ or "any class", [photo, control, *drawn["control"][:shown]])]
    if "without" in drawn:
        blank = torch.ones_like(photo)
        rows.append(("without control", [blank, blank, *drawn["without"][:shown]]))
    files["sheet"] = save_png(comparison_sheet(rows, headings, scale=max(1, 128 // size[1])), out / "sheet.png").name
    agreement = agreements(control, drawn, how) if kind == "canny" else {}
    record = write_record(
        out / "control.json",
        {"model": source, "image": place, "type": kind, "extracted": ready, "fit": arguments.fit}
        | {
            "extraction": None if ready else vars(how),
            "depth": arguments.depth,
            "strength": arguments.strength,
        }
        | {"class": arguments.class_, "num": arguments.num, "seed": arguments.seed, **options}
        | {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")},
        {**files, **agreement},
    )
    images = files["images"]
    last = f" to {images[-1]}" if len(images) > 1 else ""
    say(f"{len(images)} image{'s' if len(images) > 1 else ''} in {out}: {images[0]}{last}")
    say(f"also there: {files['control']}, {files['sheet']}, {record.name}")
    for name, values in agreement.items():
        say(f"{name.replace('_', ' ')}: {sum(values) / len(values):.2f}")


def control_type(model: Any, source: str, wanted: str | None) -> str:
    """What the control shows.

    Raises:
        ValueError: the model takes no controls, not this one, or several.
    """
    own = getattr(model.config, "control_type", None) if hasattr(model, "config") else None
    known = tuple(getattr(getattr(model, "config", None), "control_types", ())) or ((own,) if own else ())
    if not known and not hasattr(getattr(model, "config", None), "control_type"):
        raise ValueError(f"{source} is a {type(model).__name__}, which follows no control pictures")
    if wanted is None:
        if len(known) != 1:
            told = f"it knows {', '.join(known)}" if known else "its file does not tell"
            raise ValueError(f"what does the control show? Say --type; {told}")
        return known[0]
    if known and wanted not in known:
        raise ValueError(f"{source} follows {', '.join(known)}, not {wanted}")
    return wanted


def strength_of(model: Any, source: str, strength: float) -> float:
    """Raises:

    ValueError: the model's control has no strength.
    """
    from nextscale.tasks.generation.car import CAR

    if not isinstance(model, CAR):
        raise ValueError(f"--strength is CAR's; {source} is a {type(model).__name__}")
    return strength


def extraction(arguments: Any, kind: str, model: Any = None, given: bool = False) -> Any:
    """How the control is made: as the model's training pictures were where it tells, and as typed.

    Args:
        given: there is a control picture already.

    Raises:
        ValueError: pictures of the kind are not made of images here.
    """
    from dataclasses import replace

    from nextscale.tasks.generation.controls import KINDS, Extraction

    if kind not in KINDS:
        if given:
            return None
        raise ValueError(
            f"{kind!r} controls are not made of images here, which makes {', '.join(KINDS)}; give one with --extracted"
        )
    config = getattr(model, "config", None)
    made = [getattr(config, "extraction", None), *getattr(config, "extractions", ())]
    known = next((each for each in made if each is not None and each.kind == kind), None)
    typed = {name: arguments[name] for name in ("low", "high", "resolution") if arguments[name] is not None}
    return replace(known or Extraction(kind=kind), **typed)  # type: ignore[arg-type]


def agreements(control: Any, drawn: dict[str, Any], how: Any) -> dict[str, list[float]]:
    """F1 of canny edges between the control and each picture."""
    from nextscale.evaluation.control import edge_agreement
    from nextscale.tasks.generation.controls import edges_of

    wanted = (control.mean(0) > 0.5).numpy()
    named = {"control": "edge_agreement", "without": "edge_agreement_without_control"}
    return {
        named[name]: [edge_agreement(wanted, edges_of(image, how.low, how.high)).f1 for image in images]
        for name, images in drawn.items()
    }


def depth_model(name: str | None) -> Any:
    """A depth model of this library where the name or the folder is one's, else the name, for transformers."""
    from nextscale.models import MODELS

    if name is None:
        return None
    path = Path(name)
    config = path / "config.json"
    saved = config.is_file() and "system" in json.loads(config.read_text(encoding="utf-8"))
    if name not in MODELS and not path.is_file() and not saved:
        return name
    import nextscale

    return nextscale.load(name)


def is_annotation(path: Path) -> bool:
    """Whether a file holds masks as annotations, not pixels."""
    return path.suffix.lower() == ".json"


def read(path: Path) -> Any:
    """An image, (3, height, width) in [0, 1]; of annotations of masks, the coloured picture of them.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is neither an image nor such annotations.
    """
    import numpy as np
    import torch

    from nextscale.datasets.decoding import decode
    from nextscale.datasets.errors import ImageError
    from nextscale.tasks.generation.control_masks import read_masks

    if is_annotation(path):
        return torch.from_numpy(read_masks(path)).permute(2, 0, 1).float() / 255
    try:
        planes = decode(path.read_bytes())
    except ImageError as error:
        raise ValueError(f"{path} {error}") from None
    if planes[0].mode == "RGB":
        return torch.from_numpy(np.array(planes[0])).permute(2, 0, 1).float() / 255
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]).clip(0, 1)).expand(3, -1, -1)


def fitted(image: Any, size: tuple[int, int], fit: str) -> Any:
    """The image at the model's size: squashed to it, or its centre cut out first."""
    import torch

    from nextscale.tasks.generation.controls import to_pixels
    from nextscale.tasks.generation.controls_resize import squash

    if fit == "crop":
        height, width = image.shape[-2:]
        tall, wide = min(height, round(width * size[0] / size[1])), min(width, round(height * size[1] / size[0]))
        top, left = (height - tall) // 2, (width - wide) // 2
        image = image[:, top : top + tall, left : left + wide]
    return torch.from_numpy(squash(to_pixels(image), size).copy()).permute(2, 0, 1).float() / 255
