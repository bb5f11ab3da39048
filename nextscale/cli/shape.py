"""``nextscale shape``"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

SINGLE = ("guidance", "top_k", "top_p", "temperature")
NAME_LENGTH = 40
"""Letters of a condition in a file's name, at most."""


def add_arguments(parser: Any) -> None:
    from nextscale.cli.parsing import add_loading

    parser.add_argument(
        "--model", type=str | None, default=None, help="name, file or folder; unless named, the G3PT that ships"
    )
    group = parser.add_argument_group("what to make; one kind of it, one or several")
    group.add_argument("--class", dest="class_", nargs="+", type=str, default=None, help="number or name")
    group.add_argument("--image", nargs="+", type=str, default=None, help="picture of an object, on white if it can be")
    group.add_argument("--prompt", nargs="+", type=str, default=None, help="text, in quotes")
    group.add_argument("--num", type=int, default=1, help="shapes of each of them")
    group = parser.add_argument_group("drawing; unless given, the model's own")
    group.add_argument("--seed", type=int, default=0, help="shape i is drawn from seed + i, alone or in any batch")
    group.add_argument("--guidance", type=float | None, default=None, help="more keeps closer to what is asked for")
    group.add_argument("--top-k", type=int | None, default=None, help="draw among so many likeliest codes; 0: all")
    group.add_argument("--top-p", type=float | None, default=None, help="draw among codes of this total probability")
    group.add_argument("--temperature", type=float | None, default=None, help="below 1: likelier codes")
    group.add_argument("--batch-size", type=int, default=4, help="shapes drawn at once: memory and speed, nothing else")
    group.add_argument("--resolution", type=int | None, default=None, help="of the grid that the mesh is found on")
    group.add_argument("--largest", action="store_true", help="leave out all but the largest piece")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out", type=str, default="out/shapes", help="folder, or for one shape a .glb, .obj, .ply or .stl file"
    )
    group.add_argument("--format", type=str, default="glb", help="in a folder: glb, obj, ply or stl")
    group.add_argument("--picture", type=bool, default=True, help="a picture of each shape beside it")
    group.add_argument("--size", type=int, default=384, help="of pictures and turntables, in pixels")
    group.add_argument("--turntable", type=str | None, default=None, help="gif, webp or png: a turn of each shape")
    group.add_argument("--page", action="store_true", help="page.html: all shapes, turned by hand, without a network")
    add_loading(parser, compress=False)


def run(arguments: Any) -> None:
    conditions = check(arguments)
    import nextscale
    from nextscale.cli.console import note, progress, say
    from nextscale.cli.parsing import loading_options
    from nextscale.cli.records import write_record
    from nextscale.models import shipped
    from nextscale.tasks.shapes.objects import ShapeGenerator

    source = arguments.model or shipped("generator of shapes", "g3pt", "sar3d")
    model = nextscale.load(source, **loading_options(arguments))
    if not isinstance(model, ShapeGenerator):
        raise ValueError(f"{source} is a {type(model).__name__}, which makes no shapes; G3PT and SAR3D do")
    wanted = [condition for condition in conditions for _ in range(arguments.num)]
    prepared = model.prepare(as_given(model, arguments, conditions)).select(
        [row for row in range(len(conditions)) for _ in range(arguments.num)]
    )
    options = {name: arguments[name] for name in (*SINGLE, "resolution") if arguments[name] is not None}
    with progress("shapes", "scales") as report:
        shapes = model.generate(
            prepared,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            largest_component=arguments.largest,
            progress=report,
            n=len(wanted),
            **options,
        )
    made: list[dict[str, Any]] = []
    kept = []
    for number, (condition, shape) in enumerate(zip(wanted, shapes, strict=True)):
        seed = arguments.seed + number
        if shape.empty:
            note(f"{condition}, seed {seed}: nothing came out; draw it from another seed")
            continue
        path = free(place(arguments, condition, seed))
        files = write(shape, path, arguments)
        kept.append((shape, f"{condition}, seed {seed}"))
        made.append({"condition": condition, "seed": seed, "files": [file.name for file in files]})
        say(f"{path}: {len(shape.faces)} faces{'' if shape.watertight else ', not watertight'}")
    if not kept:
        raise ValueError(f"no shape came out of {len(wanted)}: try other seeds, or train the model for longer")
    folder = path.parent
    if arguments.page:
        from nextscale.tasks.shapes.viewing import viewer

        page = viewer([shape for shape, _ in kept], free(folder / "page.html"), [title for _, title in kept])
        say(f"{page}: {len(kept)} to turn by hand")
    settings = {"model": source, "largest": arguments.largest, **options}
    write_record(folder / "shape.json", settings, {"shapes": made})


def check(arguments: Any) -> list[str]:
    """What shapes are asked for.

    Raises:
        ValueError: an option is out of range or contradicts another.
    """
    from nextscale.tasks.shapes.objects import FORMATS

    given = {name: arguments[name] for name in ("class_", "image", "prompt") if arguments[name] is not None}
    if len(given) != 1:
        raise ValueError("say what to make by one of --class, --image and --prompt")
    for name, low in (("num", 1), ("batch_size", 1), ("size", 16), ("seed", 0)):
        if arguments[name] < low:
            raise ValueError(f"--{name.replace('_', '-')} is {arguments[name]}; expected {low} or more")
    for name, low in (("resolution", 2), ("top_k", 0), ("top_p", 0)):
        if arguments[name] is not None and arguments[name] < low:
            raise ValueError(f"--{name.replace('_', '-')} is {arguments[name]}; expected {low} or more")
    if f".{arguments.format}" not in FORMATS:
        raise ValueError(f"--format is {arguments.format!r}; expected {', '.join(suffix[1:] for suffix in FORMATS)}")
    if arguments.turntable not in (None, "gif", "webp", "png"):
        raise ValueError(f"--turntable is {arguments.turntable!r}; expected gif, webp or png")
    conditions: list[str] = next(iter(given.values()))
    if is_file(arguments.out) and len(conditions) * arguments.num > 1:
        raise ValueError(
            f"--out {arguments.out} is one file, {len(conditions) * arguments.num} shapes are asked for: name a folder"
        )
    for path in arguments.image or ():
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such picture")
    return conditions


def is_file(out: str) -> bool:
    """Whether ``--out`` names a mesh rather than a folder.

    Raises:
        ValueError: it names a file of another kind.
    """
    from nextscale.tasks.shapes.objects import FORMATS

    suffix = Path(out).suffix.lower()
    if suffix in FORMATS:
        return True
    if suffix in (".off", ".fbx", ".gltf", ".dae", ".usd", ".usdz", ".3ds", ".blend", ".zip"):
        raise ValueError(f"--out {out}: meshes are written as {', '.join(FORMATS)}")
    return False


def as_given(model: Any, arguments: Any, conditions: list[str]) -> Any:
    """Conditions in the form that tells their kind to a model.

    Raises:
        ValueError: the model is told by another kind.
    """
    known = model.told_by
    asked = "class" if arguments.class_ is not None else "image" if arguments.image is not None else "prompt"
    if asked not in known:
        raise ValueError(f"this model is not told by --{asked}; give {' or '.join(f'--{name}' for name in known)}")
    if asked != "class":
        return conditions if asked == "prompt" else [Path(path) for path in conditions]
    names = model.config.class_names or ()
    from nextscale.datasets.imagenet import find_class

    return [int(word) if word.isdigit() else find_class(word, names) for word in conditions]


def place(arguments: Any, condition: str, seed: int) -> Path:
    """The file of a shape."""
    out = Path(arguments.out)
    if is_file(arguments.out):
        return out
    words = Path(condition).stem if arguments.image is not None else condition
    name = re.sub(r"[^\w-]+", "-", words).strip("-")[:NAME_LENGTH] or "shape"
    return out / f"{name}-{seed:04d}.{arguments.format}"


def free(path: Path) -> Path:
    """The path, or with a number where its name is taken."""
    from nextscale.pictures.files import free_path

    return free_path(path)


def write(shape: Any, path: Path, arguments: Any) -> list[Path]:
    """Write a shape and what was asked for beside it; returns the files."""
    from nextscale.pictures import save_png
    from nextscale.tasks.shapes.viewing import pictures, turntable

    files = [shape.save(path)]
    if arguments.picture:
        seen = pictures(shape, [30], size=arguments.size)[0].transpose(2, 0, 1)
        files.append(save_png(seen, path.with_suffix(".png")))
    if arguments.turntable is not None:
        turn = path.with_name(f"{path.stem}-turn.{arguments.turntable}")
        files.append(turntable(shape, free(turn), size=arguments.size))
    return files
