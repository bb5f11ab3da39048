"""``nextscale evaluate shapes``"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

CLOUD = 2048
"""Points of a cloud when sets are compared, as in work on clouds of points."""
SHOWN = 12


def add_arguments(parser: Any) -> None:
    from nextscale.cli.parsing import add_loading

    parser.add_argument("model", type=str, help="name, file or folder of a model or tokenizer; or a folder of meshes")
    parser.add_argument("--reference", type=str, required=True, help="prepared objects, or a folder of meshes")
    parser.add_argument(
        "--task",
        type=Literal["reconstruction", "generation"] | None,
        default=None,
        help="each mesh against the reference of its name, or set against set; unless given, reconstruction for "
        "tokenizers and for folders with the references' names",
    )
    parser.add_argument(
        "--convention",
        type=Literal["3dshape2vecset", "occupancy-networks"],
        default="3dshape2vecset",
        help="whose scaling, thresholds and Chamfer distance",
    )
    parser.add_argument("--limit", type=int | None, default=None, help="only the first so many references")
    parser.add_argument(
        "--by-scale", action="store_true", help="also what a tokenizer's first scales keep: one, two, and so on"
    )
    parser.add_argument("--out", type=str, default="out/shapes", help="folder of the report")
    group = parser.add_argument_group("generation")
    group.add_argument("--number", type=int | None, default=None, help="shapes; as many as references, unless given")
    group.add_argument("--seed", type=int, default=0, help="shape i is drawn from seed + i, of its reference's class")
    group.add_argument("--network", type=str | None, default=None, help="FID and KID of renders in its features")
    group.add_argument("--views", type=int, default=8, help="renders of a shape, from all around")
    group.add_argument("--size", type=int, default=224, help="side of a render in pixels")
    group.add_argument("--resolution", type=int, default=128, help="of the grid that a model's meshes are made on")
    add_loading(parser, needs=False)


def run(arguments: Any) -> None:
    from nextscale.cli.console import say
    from nextscale.core.checkpoint import write_json
    from nextscale.evaluation.shapes import CONVENTIONS
    from nextscale.tasks.shapes.evaluation import References

    for name, least in (("limit", 1), ("number", 2), ("views", 1), ("size", 16), ("resolution", 16)):
        if arguments[name] is not None and arguments[name] < least:
            raise ValueError(f"--{name} is {arguments[name]}; expected {least} or more")
    convention = CONVENTIONS[arguments.convention]
    references = References(Path(arguments.reference), convention, arguments.limit, convention.points)
    model = opened(arguments)
    task = arguments.task or guessed(model, references)
    settings = {"model": arguments.model, "reference": arguments.reference, "task": task, "seed": arguments.seed}
    settings["convention"] = convention.source
    work = reconstruction if task == "reconstruction" else generation
    report = work(arguments, model, references, settings)
    report["refused"] = references.refused
    for name, reason in references.refused.items():
        say(f"left out: {name}: {reason}")
    say(f"{write_json(Path(arguments.out) / 'report.json', report)}")


def opened(arguments: Any) -> Any:
    """A model, or the path of a folder of meshes."""
    path = Path(arguments.model)
    if path.is_dir() and not any((path / inner).is_file() for inner in ("config.json", "model/config.json")):
        return path
    import nextscale
    from nextscale.cli.parsing import loading_options

    return nextscale.load(arguments.model, **loading_options(arguments))


def guessed(model: Any, references: Any) -> str:
    """What is evaluated, where it is not said."""
    from nextscale.datasets.errors import DatasetError
    from nextscale.tasks.shapes.evaluation import from_folder

    if not isinstance(model, Path):
        return "generation" if hasattr(model, "generate") else "reconstruction"
    try:
        from_folder(model, references.names())
    except DatasetError:
        return "generation"
    return "reconstruction"


def reconstruction(arguments: Any, model: Any, references: Any, settings: dict[str, Any]) -> dict[str, Any]:
    from nextscale.cli.console import progress, say, table
    from nextscale.core.checkpoint import write_text
    from nextscale.tasks.shapes.evaluation import compare_reconstruction, from_folder, from_tokenizer, summary

    coarser: dict[str, Any] = {}
    if isinstance(model, Path):
        if arguments.by_scale:
            raise ValueError(f"--by-scale asks for a tokenizer, and {model} is a folder of meshes")
        rebuild = from_folder(model, references.names())
    else:
        tokenizer = model if hasattr(model, "reconstruct") else getattr(model, "tokenizer", None)
        if tokenizer is None or not hasattr(tokenizer, "reconstruct"):
            raise ValueError(f"{arguments.model} is a {type(model).__name__}, which rebuilds no shapes from points")
        rebuild, last = from_tokenizer(tokenizer, arguments.resolution), len(tokenizer.config.schedule)
        for scales in range(1, last) if arguments.by_scale else ():
            coarser[f"{scales} of {last} scales"] = from_tokenizer(tokenizer, arguments.resolution, scales)
    rows, shown, total = list[dict[str, Any]](), list[Any](), len(references)
    partial: dict[str, list[dict[str, Any]]] = {name: [] for name in coarser}
    with progress("comparing", "shapes") as report:
        for target in references:
            made = rebuild(target)
            rows.append({**compare_reconstruction(target, made, references.convention), "class": target.category})
            for name, rebuild_part in coarser.items():
                partial[name].append(compare_reconstruction(target, rebuild_part(target), references.convention))
            if len(shown) < SHOWN:
                shown.append((target, made))
            report(len(rows), total)
    import json

    out = Path(arguments.out)
    write_text("".join(json.dumps(row) + "\n" for row in rows), out / "shapes.jsonl")
    groups = {"all": rows}
    for name in sorted({row["class"] for row in rows if row["class"]}):
        groups[name] = [row for row in rows if row["class"] == name]
    groups |= partial
    means = {name: summary(group) for name, group in groups.items()}
    thresholds = references.convention.thresholds
    chamfer = "chamfer_sum" if references.convention.chamfer == "sum" else "chamfer_l1"
    header = ("", "shapes", chamfer, "chamfer_l2", *(f"F at {value:g}" for value in thresholds), "IoU", "normals")
    say(settings["convention"])
    say(
        table(
            header,
            [
                (
                    name,
                    mean["shapes"],
                    *map(_cell, (mean[chamfer], mean["chamfer_l2"], *mean["f_score"], mean["iou"], mean["normals"])),
                )
                for name, mean in means.items()
            ],
        )
    )
    if open_ones := len(rows) - means["all"]["closed"]:
        say(f"{open_ones} of {len(rows)} meshes are open: they have no inside, and do not count in IoU")
    say(f"sheet: {_reconstruction_sheet(shown, out / 'shapes.png')}")
    return {**settings, "thresholds": thresholds, "means": means}


def generation(arguments: Any, model: Any, references: Any, settings: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import asdict

    from nextscale.cli.console import pairs, progress, say
    from nextscale.evaluation.shape_sets import CONVENTION, chamfer_distances, floor_figures, set_figures
    from nextscale.tasks.shapes.evaluation import cloud_of, measure_latency, wholeness

    half = references.convention.half
    with progress("reading references", "shapes") as report:
        real, conditions = references.clouds(CLOUD, report)
    figures: dict[str, Any] = {}
    number = arguments.number or len(real)
    with progress("drawing", "shapes") as report:
        if isinstance(model, Path):
            made, border = _meshes_of(model, arguments.number), None
        else:
            wanted = [conditions[i % len(conditions)] for i in range(number)]
            options = {"resolution": arguments.resolution}
            made = []
            from nextscale.tasks.shapes.evaluation import as_mesh

            for i, condition in enumerate(wanted):
                made.append(as_mesh(model.generate(condition, n=1, seed=arguments.seed + i, **options)[0]))
                report(len(made), number)
            border = 1.0 - 2.0 / arguments.resolution
            figures["latency"] = asdict(measure_latency(model, wanted[0], **options))
    whole = [wholeness(mesh, border) for mesh in made]
    figures["whole"] = sum(row["largest"] >= 0.98 and not row["touches"] for row in whole) / len(whole)
    full = [mesh for mesh in made if len(mesh.faces)]
    figures["empty"] = len(made) - len(full)
    clouds = [cloud_of(mesh, CLOUD, half, i) for i, mesh in enumerate(full)]
    with progress("comparing", "pairs") as report:
        distances = chamfer_distances([*real, *clouds], report)
    n = len(real)
    sets = set_figures(distances[:n, n:], distances[:n, :n], distances[n:, n:])
    floor = floor_figures(distances[:n, :n]) if n >= 4 else None
    figures |= {"sets": asdict(sets), "floor": None if floor is None else asdict(floor)}
    if arguments.network is not None:
        figures["renders"] = _render_figures(arguments, references, full)
    lines = [("shapes", f"{len(made)} against {len(real)}, {CLOUD} points each, longest side {2 * half:g}")]
    lines += [
        (
            "COV",
            f"{100 * sets.coverage:.1f} %" + (f" ({100 * floor.coverage:.1f} % between real halves)" if floor else ""),
        )
    ]
    lines += [("MMD x 1000", f"{sets.mmd:.2f}" + (f" ({floor.mmd:.2f})" if floor else ""))]
    lines += [("1-NN accuracy", f"{sets.accuracy:.3f}" + (f" ({floor.accuracy:.3f})" if floor else ""))]
    lines += [("in one piece", f"{100 * figures['whole']:.1f} % (98 % of the volume, off the border)")]
    lines += [(name, f"{value:.3f}") for name, value in figures.get("renders", {}).items() if isinstance(value, float)]
    lines += [(f"seconds, {name}", f"{value:.2f}") for name, value in figures.get("latency", {}).items()]
    say(pairs(lines))
    say(f"sheet: {_sheet(full[:48], Path(arguments.out) / 'shapes.png')}")
    return {**settings, "sets_convention": CONVENTION, "points": CLOUD, **figures}


def _meshes_of(folder: Path, number: int | None) -> list[Any]:
    from nextscale.datasets.shapes_sources import open_source

    source = open_source(folder, number=number)
    return [source.mesh(i) for i in range(len(source.items))]


def _render_figures(arguments: Any, references: Any, made: list[Any]) -> dict[str, Any]:
    """FID and KID of grey renders from the same cameras, on white."""
    import torch

    from nextscale.datasets.shapes_views import render, ring
    from nextscale.evaluation.distances import frechet_distance, kid
    from nextscale.evaluation.networks import open_network

    real = [target.mesh for target in references]
    if any(mesh is None for mesh in real):
        raise ValueError("--network renders the references: give a folder of meshes, not of prepared points")
    network = open_network(arguments.network, arguments.device or "cpu")
    poses = ring(arguments.views, elevations=(20.0,))

    def features(mesh: Any) -> torch.Tensor:
        from dataclasses import replace

        plain = replace(mesh.normalised(1.0), colours=None)
        shown = torch.from_numpy(render(plain, poses, arguments.size).colours).movedim(-1, 1).float() / 255
        return network(shown).features.cpu()

    both = [torch.cat([features(mesh) for mesh in meshes]) for meshes in (real, made)]
    distance = kid(*both)
    return {
        "FID": frechet_distance(*both),
        "KID x 100": 100 * distance.mean,
        "network": network.identity,
        "cameras": f"{arguments.views} around at 20 degrees, distance 1.77, 39.6 degrees wide, white, grey shapes",
    }


def _picture(mesh: Any) -> Any:
    import numpy as np
    from PIL import Image

    from nextscale.datasets.shapes_views import render, ring

    if not len(mesh.faces):
        return Image.fromarray(np.full((128, 128, 3), 255, np.uint8))
    return Image.fromarray(render(mesh.normalised(0.95), ring(1, -50), 128).colours[0])


def _sheet(meshes: list[Any], path: Path) -> Path:
    from nextscale.pictures import contact_sheet, save_png

    found: Path = save_png(contact_sheet([_picture(mesh) for mesh in meshes]), path, overwrite=True)
    return found


def _reconstruction_sheet(shown: list[Any], path: Path) -> Path:
    """Targets above what was made of them; of prepared ones their points."""
    import numpy as np
    from PIL import Image

    from nextscale.pictures import contact_sheet, save_png

    tiles = []
    for target, made in shown:
        truth = _picture(target.mesh) if target.mesh is not None else _points_picture(target.points, target.normals)
        tiles.append(Image.fromarray(np.concatenate((np.asarray(truth), np.asarray(_picture(made))))))
    found: Path = save_png(contact_sheet(tiles), path, overwrite=True)
    return found


def _points_picture(points: Any, normals: Any) -> Any:
    """Points as dots, those that face the camera, the nearer ones last."""
    import numpy as np
    from PIL import Image

    from nextscale.datasets.shapes_views import FOCAL, HALF, camera

    pose = camera(-50, 20)
    scaled = points * (0.95 * HALF / np.abs(points).max())
    local = (scaled - pose[:3, 3]) @ pose[:3, :3]
    facing = -(normals @ pose[:3, 2])
    order = np.argsort(-local[:, 2])
    order = order[facing[order] > 0]
    place = ((local[order, :2] / local[order, 2:] * FOCAL + 0.5) * 128).astype(int).clip(0, 127)
    image = np.full((128, 128, 3), 255, np.uint8)
    image[place[:, 1], place[:, 0]] = np.round(60 + 150 * facing[order])[:, None]
    return Image.fromarray(image)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
