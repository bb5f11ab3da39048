"""``nextscale evaluate depth``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from nextscale.evaluation.depth_protocols import Protocol
    from nextscale.tasks.depth.evaluation import Job

METRIC_PROTOCOLS = {
    ("kitti", "eigen-lidar"): "monodepth2-eigen",
    ("kitti", "selection"): "kitti-server",
    "kitti": "bts-kitti",
    "nyu": "bts-nyu",
    "diode": "diode",
    "ibims": "ibims",
    "sunrgbd": "dar-sunrgbd",
}
"""By (data set, split) or data set, of metric depth; ``metric`` for others."""

RELATIVE_PROTOCOLS = {
    ("kitti", "eigen-lidar"): "monodepth2-eigen",
    "kitti": "marigold-kitti",
    "nyu": "depthart-nyu",
    "eth3d": "depthart-eth3d",
    "tum": "depthart-tum",
    "ibims": "depthart-ibims",
    "diode": "marigold-diode",
    "hypersim": "marigold-hypersim",
}
"""The same of relative depth; ``median`` for others."""


def add_arguments(parser: Any) -> None:
    from nextscale.cli.parsing import add_loading

    parser.add_argument(
        "model", type=str, help="name, file or folder of a model; or a folder (or .npy array) of predictions"
    )
    parser.add_argument(
        "--dataset",
        type=str | None,
        default=None,
        help="kitti, nyu, hypersim, eth3d, ibims, tum, diode, sunrgbd, scenes (prepared ones) or folder (a YAML file)",
    )
    parser.add_argument("--data", type=str, required=True, help="folder of the data set, or the YAML file")
    parser.add_argument("--depth-data", type=str | None, default=None, help="folder of the depth files, if another")
    parser.add_argument("--split", type=str | None, default=None, help="as the data set names it, such as eigen")
    parser.add_argument("--list", type=str | None, default=None, help="text file of samples instead of the split's")
    parser.add_argument("--limit", type=int | None, default=None, help="only the first so many images")
    parser.add_argument("--out", type=str, default="out/depth-evaluation", help="folder; an interrupted run goes on")
    parser.add_argument("--threads", type=int | None, default=None, help="for files of predictions; one for each core")
    group = parser.add_argument_group("protocol")
    group.add_argument("--protocol", type=str | None, default=None, help="such as bts-kitti; `list` shows all of them")
    group.add_argument("--alignment", type=str | None, default=None, help="instead of the protocol's, such as median")
    group.add_argument("--crop", type=str | None, default=None, help="instead of the protocol's; `none` for none")
    group.add_argument("--min-depth", type=float | None, default=None, help="metres, instead of the protocol's")
    group.add_argument("--max-depth", type=float | None, default=None, help="metres, instead of the protocol's")
    group.add_argument("--metrics", nargs="+", type=str | None, default=None, help="instead of the protocol's")
    group = parser.add_argument_group("predictions of a model")
    group.add_argument("--flip", action="store_true", help="average with the mirrored image")
    group.add_argument("--samples", type=int | None, default=None, help="drawn and averaged; as published")
    group.add_argument("--seed", type=int, default=0, help="image i is drawn from seed + i")
    group = parser.add_argument_group("predictions from files")
    group.add_argument("--kind", type=Literal["depth", "disparity"] | None, default=None, help="what the files hold")
    group.add_argument(
        "--scale", type=float | None, default=None, help="stored values per metre; of PNG the data set's"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--top", type=int, default=6, help="best and worst images on the page; 0 for no page")
    group.add_argument("--error-maps", action="store_true", help="a PNG of the errors of every image")
    group.add_argument("--save-predictions", action="store_true", help="every prediction as .npy")
    group.add_argument(
        "--export",
        type=str | None,
        default=None,
        help="write predictions for a benchmark: kitti (and a "
        "ZIP for its server), nyu, tum, ibims, sunrgbd, hypersim, diode, eth3d, vkitti or metres",
    )
    add_loading(parser, needs=False)


def run(arguments: Any) -> None:
    from nextscale.cli.console import note, progress, say, table
    from nextscale.evaluation.depth_protocol_list import PROTOCOLS

    if arguments.protocol == "list":
        say(table(("protocol", "source"), [(name, protocol.source) for name, protocol in PROTOCOLS.items()]))
        return
    for name, least in (("limit", 1), ("threads", 1), ("top", 0), ("samples", 1)):
        if arguments[name] is not None and arguments[name] < least:
            raise ValueError(f"--{name} is {arguments[name]}; expected {least} or more")
    from nextscale.datasets.depth import DEFAULT_SPLITS, open_source, recognise
    from nextscale.evaluation.depth_published import published
    from nextscale.tasks.depth.evaluation import evaluate, ranked

    dataset = arguments.dataset or recognise(arguments.data)
    split = arguments.split or DEFAULT_SPLITS.get(dataset)
    source = open_source(dataset, arguments.data, split, list_file=arguments.list, depth_root=arguments.depth_data)
    source.check()
    job, protocol = _job(arguments, dataset, split, source)
    out = Path(arguments.out)
    settings = {
        "model": arguments.model,
        "dataset": dataset,
        "data": arguments.data,
        "split": split,
        "list": arguments.list,
        "flip": arguments.flip,
        "draws": arguments.samples,
        "seed": arguments.seed,
        "kind": job.kind,
        "scale": arguments.scale,
    }
    outputs = _outputs(arguments, dataset)
    with progress("evaluating", "images") as done:
        report = evaluate(
            job,
            out,
            settings=settings,
            outputs=outputs,
            limit=arguments.limit,
            threads=arguments.threads,
            progress=done,
        )
    others = published(dataset, protocol) if not _changed(arguments) else []
    from nextscale.depth_page import figures_table, write_report_page

    header, rows = figures_table(report, others)
    say(table(header, rows))
    if report["planes_and_edges"]:
        say(table(("planes and boundaries", ""), [(k, f"{v:.4g}") for k, v in report["planes_and_edges"].items() if v]))
    say(f"{report['images']} images by protocol {protocol}: {out / 'report.json'}")
    if report["skipped"]:
        note(f"{len(report['skipped'])} images have no pixel to compare; the report names them")
    if arguments.top:
        metric = "abs_rel" if "abs_rel" in report["mean"] else next(iter(report["mean"]))
        title = f"{Path(arguments.model).name} on {dataset}" + (f" ({split})" if split else "")
        ranking = ranked(out, metric)
        say(
            f"page: {write_report_page(out / 'index.html', job, report, ranking, metric, others, title, arguments.top)}"
        )
    if arguments.export == "kitti":
        say(f"for the server: {_zipped(out / 'export', out / 'kitti-submission.zip')}")


def _job(arguments: Any, dataset: str, split: str | None, source: Any) -> tuple[Job, str]:
    """What to evaluate, and the protocol's name."""
    from nextscale.tasks.depth.evaluation import Job, file_predictions, model_predictions

    predictions = _predictions(arguments, source)
    if predictions is not None:
        protocol, name = _protocol(arguments, dataset, split, relative=predictions.kind == "disparity")
        return Job(source, file_predictions(predictions), protocol, predictions.kind), name
    import nextscale

    model = nextscale.load(arguments.model, device=arguments.device, dtype=arguments.dtype)
    if not hasattr(model, "predict") or not hasattr(model, "unit"):
        raise ValueError(f"{arguments.model} is a {type(model).__name__}, which predicts no depth")
    protocol, name = _protocol(arguments, dataset, split, relative=model.unit == "relative")
    predict = model_predictions(model, source, protocol, flip=arguments.flip, n=arguments.samples, seed=arguments.seed)
    return Job(source, predict, protocol, parallel=False), name


def _predictions(arguments: Any, source: Any) -> Any:
    """Predictions as files, where the argument names such; None where it names a model."""
    from nextscale.datasets.depth_encodings import ENCODINGS
    from nextscale.datasets.depth_predictions import open_predictions

    place = Path(arguments.model)
    saved = any((place / name).exists() for name in ("config.json", "model/config.json", "model.safetensors"))
    if place.suffix != ".npy" and (saved or not place.is_dir()):
        return None
    if arguments.flip or arguments.samples is not None:
        raise ValueError("--flip and --samples belong to a model; what is in files is evaluated as it is")
    encoding = ENCODINGS.get(arguments.dataset or "")
    png = encoding.scale if encoding is not None and encoding.kind == "png" and not encoding.rotated else 256.0
    names = [source.name(index) for index in range(len(source))]
    return open_predictions(
        place, names, kind=arguments.kind, scale=arguments.scale, png_scale=png, limit=arguments.limit
    )


def _protocol(arguments: Any, dataset: str, split: str | None, relative: bool) -> tuple[Protocol, str]:
    from nextscale.evaluation.depth import METRICS
    from nextscale.evaluation.depth_alignment import ALIGNMENTS
    from nextscale.evaluation.depth_protocol_list import protocol
    from nextscale.evaluation.depth_protocols import changed
    from nextscale.evaluation.depth_regions import CROPS

    usual: Any = RELATIVE_PROTOCOLS if relative else METRIC_PROTOCOLS
    otherwise = "median" if relative else "metric"
    name = arguments.protocol or usual.get((dataset, split)) or usual.get(dataset, otherwise)
    chosen = protocol(name)
    fields: dict[str, Any] = {}
    if arguments.alignment is not None:
        fields["alignment"] = _one_of("alignment", arguments.alignment, ALIGNMENTS)
    if arguments.crop is not None:
        fields["crop"] = None if arguments.crop == "none" else _one_of("crop", arguments.crop, CROPS)
    if arguments.metrics is not None:
        fields["metrics"] = tuple(_one_of("metrics", metric, METRICS) for metric in arguments.metrics)
    if arguments.min_depth is not None or arguments.max_depth is not None:
        low, high = chosen.truth_range
        bounds = (
            low if arguments.min_depth is None else arguments.min_depth,
            high if arguments.max_depth is None else arguments.max_depth,
        )
        if not 0 <= bounds[0] < bounds[1]:
            raise ValueError(f"--min-depth and --max-depth give {bounds[0]} to {bounds[1]} metres; expected a range")
        fields["truth_range"] = bounds
        if chosen.clamp is not None:
            fields["clamp"] = (max(bounds[0], 1e-6), bounds[1])
    return changed(chosen, **fields), name


def _one_of(option: str, value: str, known: Any) -> str:
    if value not in known:
        raise ValueError(f"--{option} is {value!r}; expected one of {', '.join(known)}")
    return value


def _changed(arguments: Any) -> bool:
    """Whether figures cannot stand beside those of the protocol."""
    names = ("alignment", "crop", "min_depth", "max_depth", "limit", "list")
    return any(arguments[name] is not None for name in names)


def _outputs(arguments: Any, dataset: str) -> Any:
    from nextscale.datasets.depth_encodings import ENCODINGS
    from nextscale.tasks.depth.evaluation import Outputs

    export = None if arguments.export is None else ENCODINGS[_one_of("export", arguments.export, ENCODINGS)]
    if export is not None and export.kind == "pgm":
        raise ValueError("--export kinect is a format that is only read; choose another")

    def last_part(name: str, index: int) -> str:
        return name.rsplit("/", 1)[-1]

    def whole(name: str, index: int) -> str:
        return name

    # The server's images lie in one folder.
    flat = dataset == "kitti" and arguments.split in ("server", "selection")
    return Outputs(arguments.error_maps, arguments.save_predictions, export, last_part if flat else whole)


def _zipped(folder: Path, path: Path) -> Path:
    """The files of a folder in a ZIP, as the server takes them."""
    import zipfile

    from nextscale.core.checkpoint import write_atomically

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for file in sorted(folder.rglob("*.png")):
                archive.write(file, file.relative_to(folder))

    return write_atomically(path, write)
