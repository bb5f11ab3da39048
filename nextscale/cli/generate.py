"""``nextscale generate``"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

SHEET_LIMIT, STRIP_LIMIT, ANIMATION_LIMIT = 400, 8, 16
"""Pictures on a contact sheet, rows of the strip of scales, and pictures in the animation, at most."""


def add_arguments(parser: Any) -> None:
    from nextscale.cli.parsing import add_drawing, add_loading, add_schedule
    from nextscale.cli.prompts import add_prompts

    parser.add_argument("model", type=str, help="name, file or folder; `nextscale list` shows names")
    parser.add_argument(
        "--classes",
        "--condition",
        nargs="+",
        type=str,
        default=None,
        help="numbers, names, ranges such as 0-9, none or random; repeated to --num images; drawn, unless named",
    )
    parser.add_argument(
        "--num", type=int | None, default=None, help="number of images; one per class, or 8, unless given"
    )
    parser.add_argument(
        "--type",
        type=str | None,
        default=None,
        help="ControlVAR, which draws a control picture with every image: what it shows; drawn, unless named",
    )
    add_prompts(parser)
    add_schedule(parser)
    add_drawing(parser, guidance=None, top_p=None)
    parser.add_argument(
        "--guidance-bound",
        type=float | None,
        default=None,
        help="FlowAR, which draws from noise: guide from this time on, 1 (noise) to 0; unless given, the model's own",
    )
    parser.add_argument(
        "--official-draws",
        action="store_true",
        help="consume random numbers in the official code's order: one generator a batch, seeded with its first seed",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=str, default="out/images", help="folder; what is there is kept")
    group.add_argument("--sheet", type=bool, default=True, help="all pictures on one, with captions: sheet.png")
    group.add_argument(
        "--animate",
        action="store_true",
        help="how the pictures form, coarse to fine: forming.webp and forming.png",
    )
    group.add_argument("--tokens", action="store_true", help="the drawn tokens: tokens.npz")
    add_loading(parser)


def run(arguments: Any) -> None:
    from nextscale.cli.console import progress, say
    from nextscale.cli.parsing import drawing_options, parse_classes
    from nextscale.cli.records import write_record

    options = drawing_options(arguments)
    if arguments.num is not None and arguments.num < 1:
        raise ValueError(f"--num is {arguments.num}; expected 1 or more")
    import nextscale
    from nextscale.cli.parsing import loading_options, needed, with_filters
    from nextscale.cli.prompts import check_no_prompts, run_prompts

    model = nextscale.load(arguments.model, **loading_options(arguments))
    if not hasattr(model, "generate"):
        raise ValueError(f"{arguments.model} is a {type(model).__name__}, which draws no images by itself")
    if hasattr(model, "painter"):
        run_prompts(model, arguments, options)
        return
    if hasattr(model, "chat"):
        from nextscale.cli.generate_talk import run_talk

        run_talk(model, arguments, options)
        return
    check_no_prompts(arguments, model)
    options = with_filters(options)
    if options["guidance"] is None:
        options["guidance"] = model.config.guidance
    options["official_draws"] = arguments.official_draws
    classes = parse_classes(arguments.classes, model.config.classes)
    number = arguments.num or (len(classes) if classes else 8)
    given, out = _given(model, arguments), Path(arguments.out)
    with progress("drawing", "scales") as report:
        files, shown = _draw(model, classes, number, arguments, options, given, out, report)
    files |= {"images": [path.name for path in files["images"]]}
    record = write_record(
        out / "generate.json",
        {"model": arguments.model, **needed(arguments)}
        | {"classes": classes, "num": number, "seed": arguments.seed, **options}
        | ({"type": arguments.type} if "controls" in files else {})
        | ({"scales": str(given["schedule"])} if "schedule" in given else {})
        | {name: given[name] for name in ("ode_steps", "guidance_bound") if name in given}
        | {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")},
        {**files, "labels": shown["labels"], "seeds": shown["seeds"]},
    )
    first, last = files["images"][0], files["images"][-1]
    say(f"{number} image{'s' if number > 1 else ''} in {out}: {first}{f' to {last}' if number > 1 else ''}")
    extra = [files[name] for name in ("sheet", "animation", "strip", "tokens") if name in files]
    say(f"also there: {', '.join([*extra, record.name])}")


def _draw(
    model: Any,
    classes: Any,
    number: int,
    arguments: Any,
    options: dict[str, Any],
    given: dict[str, Any],
    out: Path,
    report: Any,
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Draw and write; returns the files' names and what each image shows."""
    import torch

    from nextscale.pictures import animate, comparison_sheet, contact_sheet, save_png, save_pngs
    from nextscale.tasks.generation.drawing import class_name, draw

    labels: list[int] = []
    seeds: list[int] = []
    paths: list[Path] = []
    kept, tokens, forming = [], [], []
    few = ANIMATION_LIMIT if arguments.animate else 0
    controls: list[Path] = []
    for drawn in draw(model, classes, number, arguments.seed, **options, forming=few, progress=report, given=given):
        images = drawn.images
        if "show" in given:  # the control above the image
            above, images = images.chunk(2, dim=2)
            controls += save_pngs(above, out, stem="control")
        paths += save_pngs(images, out)
        labels, seeds = labels + drawn.labels, seeds + drawn.seeds
        if arguments.sheet and len(labels) - len(drawn.labels) < SHEET_LIMIT:
            kept.append(drawn.images)
        if arguments.tokens:
            tokens.append(drawn.tokens)
        if drawn.forming is not None:
            forming.append(drawn.forming)
    files: dict[str, Any] = {"images": paths}
    if controls:
        files["controls"] = [path.name for path in controls]
    schedule = given.get("schedule", model.config.schedule)
    scale = max(1, 128 // model.tokenizer.image_size(schedule)[1])
    captions = [f"{class_name(model, label)}, seed {seed}" for label, seed in zip(labels, seeds, strict=True)]
    if kept:
        pictures = torch.cat(kept)[:SHEET_LIMIT]
        if len(pictures) < number:
            print(f"note: the sheet shows the first {len(pictures)} of {number} images", file=sys.stderr)
        sheet = contact_sheet(pictures, labels=captions[: len(pictures)], scale=scale)
        files["sheet"] = save_png(sheet, out / "sheet.png").name
    if forming:
        stages = torch.cat(forming, dim=1)
        count = stages.shape[1]
        frames = [contact_sheet(stage, labels=captions[:count], scale=scale) for stage in stages]
        files["animation"] = animate(frames, out / "forming.webp").name
        rows = [(captions[i], list(stages[:, i])) for i in range(min(count, STRIP_LIMIT))]
        headings = [f"{s.height} x {s.width}" for s in schedule.scales]
        strip = comparison_sheet(rows, headings, scale=max(1, scale // 2))
        files["strip"] = save_png(strip, out / "forming.png").name
    if tokens:
        files["tokens"] = _save_tokens(model, torch.cat(tokens), labels, seeds, schedule, out / "tokens.npz").name
    return files, {"labels": labels, "seeds": seeds}


def _given(model: Any, arguments: Any) -> dict[str, Any]:
    """What a model of control pictures and images is told, or one that draws from noise, and the scales, where others
    than the model's are asked for.

    Raises:
        ValueError: something was asked of a model that knows nothing of it.
    """
    from nextscale.cli.parsing import chosen_schedule

    if hasattr(model, "pairs"):
        return {"show": "pair", "control_type": arguments.type}
    if arguments.type is not None:
        raise ValueError(
            f"--type is ControlVAR's; {arguments.model} is a {type(model).__name__}, which draws images only"
        )
    if hasattr(model, "flow_emitter") and arguments.scales is None and arguments.size is None:
        given = {"ode_steps": arguments.steps, "guidance_bound": arguments.guidance_bound}
        return {name: value for name, value in given.items() if value is not None}
    if arguments.guidance_bound is not None:
        raise ValueError(
            f"--guidance-bound is FlowAR's; {arguments.model} is a {type(model).__name__}, which draws no noise"
        )
    schedule = chosen_schedule(arguments, model)
    return {} if schedule is None else {"schedule": schedule}


def _save_tokens(model: Any, tokens: Any, labels: list[int], seeds: list[int], schedule: Any, path: Path) -> Path:
    """``tokens`` (images, length), or (images, length, channels) where they are continuous, all scales in one sequence;
    ``scales`` (scales, 2), heights and widths."""
    import io

    import numpy as np

    from nextscale.pictures import write_file

    buffer = io.BytesIO()
    scales = [scale.grid for scale in schedule.scales]
    if tokens.is_floating_point():
        kind: type = np.float32
    else:
        kind = np.uint16 if model.config.vocabulary <= 65536 else np.int32
    np.savez_compressed(
        buffer,
        tokens=tokens.numpy().astype(kind),
        labels=np.array(labels),
        seeds=np.array(seeds),
        scales=np.array(scales),
    )
    return write_file(path, buffer.getvalue())
