"""``nextscale generate`` for models that read prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

CAPTION = 48
"""Characters of a prompt that captions show."""


def add_prompts(parser: Any) -> None:
    group = parser.add_argument_group("prompts, of models that read text")
    group.add_argument(
        "--prompt",
        nargs="+",
        type=str,
        default=None,
        help="one or more texts, each in quotes; repeated to --num images",
    )
    group.add_argument(
        "--prompts",
        type=str | None,
        default=None,
        help="file of prompts: one in a line, or .jsonl with an entry prompt",
    )
    group.add_argument("--negative-prompt", type=str | None, default=None, help="what to stay away from")
    group.add_argument(
        "--ratio", type=str | None, default=None, help="width:height, such as 16:9; the nearest of 15 is drawn"
    )
    group.add_argument(
        "--text-encoder", type=str | None, default=None, help="folder or hub name, where it is not the model's own"
    )
    group.add_argument("--text-device", type=str | None, default=None, help="where the text encoder runs")
    group.add_argument("--text-bits", type=int | None, default=None, help="8 or 4: its weights in so many bits")
    group.add_argument("--text-cache", type=str | None, default=None, help="folder to keep features of prompts in")


def check_no_prompts(arguments: Any, model: Any) -> None:
    """Raises:

    ValueError: an option of prompts was given to a model that reads none.
    """
    names = ("prompt", "prompts", "negative_prompt", "ratio", "text_encoder", "text_device", "text_bits", "text_cache")
    if given := [name for name in names if arguments[name] is not None]:
        raise ValueError(
            f"--{given[0].replace('_', '-')} is for models that read text; {arguments.model} is a "
            f"{type(model).__name__}, which draws classes: --classes"
        )


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a file: lines that are not empty, or the entries ``prompt`` of JSON lines.

    Raises:
        ValueError: there is none, or a line is no JSON.
        OSError: the file cannot be read.
    """
    path = Path(path)
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    prompts = [line for line in lines if line]
    if path.suffix == ".jsonl":
        try:
            prompts = [json.loads(line)["prompt"] for line in prompts]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: a line is no JSON with an entry prompt ({error})") from None
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def run_prompts(model: Any, arguments: Any, options: dict[str, Any]) -> None:
    """Draw prompts, write pictures and what made them.

    Args:
        options: as :func:`nextscale.cli.parsing.drawing_options` gives them.
    """
    from nextscale.cli.console import progress, say
    from nextscale.cli.parsing import needed
    from nextscale.cli.records import write_record

    if arguments.classes is not None or options.pop("smooth"):
        raise ValueError(f"--classes and --smooth are not for {arguments.model}, which reads text: --prompt")
    prompts = list(arguments.prompt or []) + (read_prompts(arguments.prompts) if arguments.prompts else [])
    if not prompts:
        raise ValueError(f"{arguments.model} draws prompts: give --prompt or --prompts FILE")
    _choose_encoder(model, arguments)
    number = arguments.num or len(prompts)
    given = {
        "negative_prompt": arguments.negative_prompt,
        "guidance": options["guidance"],
        "temperature": None if arguments.temperature is None else options["temperature"],
        "top_k": options["top_k"],
        "top_p": options["top_p"],
        "batch_size": options["batch_size"],
        "official_draws": arguments.official_draws,
    }
    given |= {"schedule" if name == "scales" else name: arguments[name] for name in ("ratio", "size", "scales")}
    given = {name: value for name, value in given.items() if value is not None}
    out = Path(arguments.out)
    with progress("drawing", "scales") as report:
        files = _draw(model, prompts, number, arguments, given, out, report)
    seeds = [arguments.seed + i for i in range(number)]
    record = write_record(
        out / "generate.json",
        {"model": arguments.model, **needed(arguments), "prompts": prompts, "num": number, "seed": arguments.seed}
        | {**given, "text_encoder": model.text_encoder.source}
        | {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")},
        {**files, "seeds": seeds},
    )
    first, last = files["images"][0], files["images"][-1]
    say(f"{number} image{'s' if number > 1 else ''} in {out}: {first}{f' to {last}' if number > 1 else ''}")
    extra = [files[name] for name in ("sheet", "animation", "strip", "tokens") if name in files]
    say(f"also there: {', '.join([*extra, record.name])}")


def _choose_encoder(model: Any, arguments: Any) -> None:
    """The model's text encoder, with what was asked of it."""
    from dataclasses import replace

    from nextscale.tasks.generation.text import TextEncoder

    config = model.text_encoder.config
    if arguments.text_encoder is not None:
        config = replace(config, name=arguments.text_encoder, kind=None)
    model.text_encoder = TextEncoder(
        config,
        home=model.home,
        device=arguments.text_device or model.device,
        bits=arguments.text_bits,
        cache=arguments.text_cache,
    )


def _draw(
    model: Any, prompts: list[str], number: int, arguments: Any, given: dict[str, Any], out: Path, report: Any
) -> dict[str, Any]:
    """Draw and write; returns the files' names."""
    import torch

    from nextscale.cli.generate import ANIMATION_LIMIT, SHEET_LIMIT, STRIP_LIMIT
    from nextscale.pictures import animate, comparison_sheet, contact_sheet, save_png, save_pngs

    few = ANIMATION_LIMIT if arguments.animate else 0
    paths: list[Path] = []
    kept, tokens, forming = [], [], []
    captions: list[str] = []
    for drawn in model.draw(
        prompts, number, arguments.seed, **given, release_encoder=True, forming=few, progress=report
    ):
        paths += save_pngs(drawn.images, out)
        captions += [
            f"{shortened(prompts[text])}, seed {seed}" for text, seed in zip(drawn.texts, drawn.seeds, strict=True)
        ]
        if arguments.sheet and len(captions) - len(drawn.images) < SHEET_LIMIT:
            kept.append(drawn.images)
        if arguments.tokens:
            tokens.append(drawn.tokens)
        if drawn.forming is not None:
            forming.append(drawn.forming)
    files: dict[str, Any] = {"images": [path.name for path in paths]}
    schedule = model.schedule_of(**{name: given[name] for name in ("ratio", "size", "schedule") if name in given})
    scale = max(1, 128 // model.tokenizer.image_size(schedule)[1])
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
        strip = comparison_sheet(rows, [f"{s.height} x {s.width}" for s in schedule.scales], scale=max(1, scale // 2))
        files["strip"] = save_png(strip, out / "forming.png").name
    if tokens:
        files["tokens"] = _save_bits(torch.cat(tokens), schedule, out / "tokens.npz").name
    return files


def shortened(prompt: str) -> str:
    """As captions show it."""
    text = " ".join(prompt.split())
    return text if len(text) <= CAPTION else f"{text[: CAPTION - 1]}…"


def _save_bits(tokens: Any, schedule: Any, path: Path) -> Path:
    """``tokens``, all scales in one sequence, with ``scales`` (scales, 2); bits are packed along the last axis."""
    import io

    import numpy as np

    from nextscale.pictures import write_file

    values = tokens.numpy()
    content = {"tokens": np.packbits(values, axis=-1), "bits": values.shape[-1]} if values.dtype == bool else {
        "tokens": values
    }  # fmt: skip
    buffer = io.BytesIO()
    np.savez_compressed(buffer, scales=np.array([scale.grid for scale in schedule.scales]), **content)
    return write_file(path, buffer.getvalue())
