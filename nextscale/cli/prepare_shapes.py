"""``nextscale prepare shapes``"""

from __future__ import annotations

from typing import Any, Literal


def add_arguments(parser: Any) -> None:
    parser.add_argument("out", type=str, help="folder; an interrupted run goes on there")
    add_source(parser)
    group = parser.add_argument_group("what is kept of an object")
    group.add_argument("--surface", type=int, default=8192, help="points on its surface, with normals")
    group.add_argument("--uniform", type=int, default=8192, help="points anywhere in the cube, inside or outside")
    group.add_argument("--near", type=int, default=8192, help="points near the surface, inside or outside")
    group.add_argument("--distances", action="store_true", help="signed distances of these points too")
    group.add_argument("--views", type=int, default=0, help="pictures; 0 for none")
    group.add_argument("--size", type=int, default=128, help="side of a picture in pixels")


def add_source(parser: Any, opening: str = "rebuild") -> None:
    """Options that choose objects and how they are repaired; the default for open ones may be none: not at all."""
    parser.add_argument(
        "--source",
        type=str,
        default="procedural",
        help="procedural; or a mesh, or a folder of meshes or point clouds (obj, ply, off, stl, glb, xyz, npy, npz); "
        "also ShapeNet's and Objaverse's folders",
    )
    parser.add_argument("--number", type=int | None, default=None, help="procedural objects (1000), or files")
    parser.add_argument("--seed", type=int, default=0, help="other objects and points; another for those held out")
    parser.add_argument("--classes", nargs="+", type=str | None, default=None, help="only these")
    parser.add_argument("--split", type=str | None, default=None, help="of ShapeNet's lists: train, val or test")
    parser.add_argument("--up", type=Literal["y", "z"] | None, default=None, help="axis that is up in the files")
    helped = "take what they mostly enclose, give them a thickness, or refuse them"
    kinds: Any = Literal["rebuild", "thicken", "refuse"]
    if opening == "none":
        helped, kinds = f"{helped}; none: show objects as they are in the file", Literal["none", kinds]
    parser.add_argument(
        "--open", type=kinds, default=opening, help=f"surfaces with holes that cannot be filled: {helped}"
    )
    parser.add_argument("--resolution", type=int, default=128, help="cells along a side of surfaces that are rebuilt")
    parser.add_argument("--workers", type=int | None, default=None, help="processes; one for each core, unless given")
    parser.add_argument("--sheet", type=str | None, default=None, help="write a PNG of the first 48 too")


def run(arguments: Any) -> None:
    from nextscale.cli.console import progress
    from nextscale.datasets.shapes import ShapeSamples
    from nextscale.datasets.shapes_prepare import Preparation, prepare

    source = chosen_source(arguments)
    samples = ShapeSamples(
        arguments.surface,
        arguments.uniform,
        arguments.near,
        distances=arguments.distances,
        views=arguments.views,
        size=arguments.size,
    )
    preparation = Preparation(samples, arguments.open, arguments.resolution, seed=arguments.seed)
    with progress("preparing", "objects") as report:
        records = prepare(arguments.out, source, preparation, workers=arguments.workers, progress=report)
    summarise(records, arguments.out)
    if arguments.sheet is not None:
        write_sheet(source, records, arguments)


def chosen_source(arguments: Any) -> Any:
    """The source that :func:`add_source` asks for.

    Raises:
        ValueError: a number is out of range.
    """
    for name, least in (("number", 1), ("workers", 0), ("seed", 0)):
        if arguments[name] is not None and arguments[name] < least:
            raise ValueError(f"--{name} is {arguments[name]}; expected {least} or more")
    from nextscale.datasets.shapes_sources import open_source

    return open_source(
        arguments.source,
        number=arguments.number,
        seed=arguments.seed,
        classes=arguments.classes,
        split=arguments.split,
        up=arguments.up,
    )


def summarise(records: list[dict[str, Any]], out: str) -> None:
    """Say what happened; what was refused is named with the reason."""
    from nextscale.cli.console import note, say, table

    used = [record for record in records if "refused" not in record]
    refused = [record for record in records if "refused" in record]
    mended = [record for record in used if record.get("steps")]
    for record in refused[:20]:
        note(f"refused {record['name']}: {record['refused']}")
    if len(refused) > 20:
        note(f"and {len(refused) - 20} more; the folder's records-*.json name them")
    if mended and len(used) <= 40:
        say(table(("object", "what was done"), [(record["name"], "; ".join(record["steps"])) for record in mended]))
    say(f"{len(used)} objects in {out}, {len(mended)} of them repaired; {len(refused)} files refused")
    if not used:
        raise ValueError(f"all {len(refused)} files were refused: there is nothing to use")


def write_sheet(source: Any, records: list[dict[str, Any]], arguments: Any) -> None:
    """Pictures of the first objects, as they are used."""
    from PIL import Image

    from nextscale.cli.console import say
    from nextscale.datasets.shapes_repair import repair
    from nextscale.datasets.shapes_views import render, ring
    from nextscale.pictures import contact_sheet, save_png

    used, tiles = {record["name"] for record in records if "refused" not in record}, list[Any]()
    for number, item in enumerate(source.items):
        if item.name in used and len(tiles) < 48:
            mesh = source.mesh(number)
            if arguments.open != "none":
                mesh = repair(mesh, arguments.open, arguments.resolution).mesh
            tiles.append(Image.fromarray(render(mesh.normalised(0.95), ring(1, -50), 128).colours[0]))
    say(f"the first of them: {save_png(contact_sheet(tiles), arguments.sheet)}")
