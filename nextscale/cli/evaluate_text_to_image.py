"""``nextscale evaluate text-to-image``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nextscale.evaluation.prompt_benchmarks import Benchmark, Task

SETTINGS, RESULTS = "settings.json", "results.json"


def add_arguments(parser: Any) -> None:
    from nextscale.cli.parsing import add_drawing, add_loading

    parser.add_argument(
        "source", type=str, help="model to draw with: name, file or folder; or a folder of images drawn before"
    )
    parser.add_argument(
        "--benchmark", type=Literal["geneval", "dpg", "hps", "list"], default="list", help="whose prompts and layout"
    )
    parser.add_argument(
        "--prompts",
        type=str,
        required=True,
        help="the benchmark's own: GenEval's evaluation_metadata.jsonl, DPG's folder of .txt, HPS's folder of .json; "
        "or any file of prompts",
    )
    parser.add_argument("--out", type=str, default="out/prompts", help="folder of the images and figures")
    parser.add_argument("--samples", type=int | None, default=None, help="images of each prompt; the benchmark's")
    parser.add_argument("--limit", type=int | None, default=None, help="only the first so many prompts")
    group = parser.add_argument_group("scores, by models of transformers (folder or hub name)")
    group.add_argument("--clip", type=str | None, default=None, help="CLIP score, and GenEval's colours: a CLIP model")
    group.add_argument("--detector", type=str | None, default=None, help="GenEval's score: a Mask2Former on COCO")
    group = parser.add_argument_group("of models that know several")
    group.add_argument("--ratio", type=str | None, default=None, help="width:height, such as 16:9")
    group.add_argument("--size", type=str | None, default=None, help="256, 512, 768 or 1024")
    add_drawing(parser, guidance=None, top_p=None)
    add_loading(parser)


def run(arguments: Any) -> None:
    from dataclasses import replace

    from nextscale.cli.console import say, table
    from nextscale.evaluation.prompt_benchmarks import BENCHMARKS

    benchmark = BENCHMARKS[arguments.benchmark]
    if arguments.samples is not None:
        if arguments.samples < 1:
            raise ValueError(f"--samples is {arguments.samples}; expected 1 or more")
        if benchmark.name == "hps" and arguments.samples != 1:
            raise ValueError("HPS has one image of each prompt; leave --samples out")
        benchmark = replace(benchmark, samples=arguments.samples)
    if arguments.detector and (benchmark.name != "geneval" or not arguments.clip):
        raise ValueError("--detector is for --benchmark geneval, and needs --clip, which names colours")
    tasks = benchmark.read(arguments.prompts)[: arguments.limit]
    folder, drawn_before = Path(arguments.source), _holds_images(arguments.source)
    out = folder if drawn_before else Path(arguments.out)
    if drawn_before:
        _check_images(benchmark, folder, tasks)
    else:
        _draw(benchmark, tasks, arguments, out)
        say(f"images of {len(tasks)} prompts in {out}, in the layout of {arguments.benchmark}")
    scores: dict[str, Any] = {}
    if arguments.clip:
        scores = _score(benchmark, tasks, arguments, out)
        shown = {name: value for name, value in scores.items() if isinstance(value, float)}
        say(table(("figure", "value"), [(name, f"{value:.4g}") for name, value in shown.items()]))
        from nextscale.core.checkpoint import write_json

        say(f"written: {write_json(Path(arguments.out) / RESULTS, scores)}")


def _holds_images(source: str) -> bool:
    folder = Path(source)
    pictures = ("*.png", "*.jpg", "*/*.jpg", "*/samples/*.png")
    return folder.is_dir() and not (folder / "config.json").exists() and any(
        next(folder.glob(pattern), None) is not None for pattern in pictures
    )  # fmt: skip


def _check_images(benchmark: Benchmark, folder: Path, tasks: Sequence[Task]) -> None:
    missing = [task.key for task in tasks if not benchmark.drawn(folder, task)]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"{folder} lacks images of {len(missing)} of {len(tasks)} prompts: {', '.join(missing[:5])}{more}. Those "
            f"of the first are to be {', '.join(str(path) for path in benchmark.files(tasks[0]))}"
        )


def _draw(benchmark: Benchmark, tasks: Sequence[Task], arguments: Any, out: Path) -> None:
    """Draw what is not there yet: image j of every prompt from seed + j."""
    import nextscale
    from nextscale.cli.console import note, progress
    from nextscale.cli.parsing import drawing_options, loading_options
    from nextscale.core.checkpoint import write_json
    from nextscale.evaluation.prompt_benchmarks import to_pictures
    from nextscale.pictures import write_file

    options = drawing_options(arguments)
    if options.pop("smooth"):
        raise ValueError("--smooth is for looking at pictures, not for measuring")
    chosen = {"ratio": arguments.ratio, "size": arguments.size, "guidance": options["guidance"]}
    chosen |= {"temperature": None if arguments.temperature is None else options["temperature"]}
    chosen |= {name: options[name] for name in ("top_k", "top_p")}
    given = {name: value for name, value in chosen.items() if value is not None}
    settings = json.loads(
        json.dumps(
            {"model": arguments.source, "benchmark": benchmark.name, "samples": benchmark.samples}
            | {"seed": arguments.seed, "dtype": arguments.dtype, **given}
        )
    )
    place = out / SETTINGS
    if place.is_file() and json.loads(place.read_text(encoding="utf-8")) != settings:
        raise ValueError(f"{out} holds images drawn with other settings ({place}): give another --out")
    missing = [task for task in tasks if not benchmark.drawn(out, task)]
    if not missing:
        return
    model = nextscale.load(arguments.source, **loading_options(arguments))
    if not hasattr(model, "painter"):
        raise ValueError(f"{arguments.source} is a {type(model).__name__}, which reads no prompts")
    if len(missing) < len(tasks):
        note(f"{len(tasks) - len(missing)} of {len(tasks)} prompts are drawn already")
    write_json(place, settings)
    with progress("drawing", "prompts") as report:
        for number, task in enumerate(missing):
            images = model.generate(
                task.prompt, benchmark.samples, arguments.seed, batch_size=options["batch_size"], **given
            )
            pictures = to_pictures(images.numpy())
            benchmark.write(out, task, pictures, lambda path, content: write_file(path, content, overwrite=True))
            report(number + 1, len(missing))


def _score(benchmark: Benchmark, tasks: Sequence[Task], arguments: Any, folder: Path) -> dict[str, Any]:
    """CLIP score of all images, and GenEval's where there is a detector."""
    from nextscale.cli.console import progress
    from nextscale.evaluation.clip import Clip
    from nextscale.evaluation.detectors import Mask2Former
    from nextscale.evaluation.geneval import COLOURS, Verdict, colour_prompts, judge, summary
    from nextscale.tasks.generation.text import quiet

    with quiet():
        clip = Clip(arguments.clip, arguments.device or "cpu")
        detector = Mask2Former(arguments.detector, arguments.device or "cpu") if arguments.detector else None

    def name_colours(pictures: Any, name: str) -> list[str]:
        return [COLOURS[found] for found in clip.classify(pictures, colour_prompts(name))]

    rows: list[dict[str, Any]] = []
    verdicts: list[tuple[str, int, Verdict]] = []
    with progress("scoring", "prompts") as report:
        for number, task in enumerate(tasks):
            pictures = benchmark.images(folder, task)
            fits = clip.score(pictures, [task.prompt] * len(pictures)).tolist()
            row: dict[str, Any] = {"key": task.key, "prompt": task.prompt, "clip_score": fits}
            if detector is not None:
                found = [judge(picture, task.details, detector(picture), name_colours) for picture in pictures]
                verdicts += [(task.details["tag"], number, verdict) for verdict in found]
                row |= {"correct": [each.correct for each in found], "reasons": [list(e.reasons) for e in found]}
            rows.append(row)
            report(number + 1, len(tasks))
    values = [value for row in rows for value in row["clip_score"]]
    scores: dict[str, Any] = {"clip_score": sum(values) / len(values), "clip": clip.source}
    if verdicts:
        figures = summary(verdicts)
        scores |= {"geneval": figures["overall"]} | {f"geneval {tag}": share for tag, share in figures["tags"].items()}
        scores |= {"geneval images": figures["images"], "geneval prompts": figures["prompts"]}
    return {**scores, "prompts": rows}
