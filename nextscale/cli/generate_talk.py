"""``nextscale generate`` for models that hold conversations: answers that begin with an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

UNKNOWN = (
    "classes", "type", "negative_prompt", "ratio", "size", "scales", "text_encoder", "text_device", "text_bits",
    "text_cache", "guidance_bound", "smooth", "official_draws", "animate", "tokens",
)  # fmt: skip


def run_talk(model: Any, arguments: Any, options: dict[str, Any]) -> None:
    """Draw prompts, each as a conversation of its own; write pictures and what made them.

    Args:
        options: as :func:`nextscale.cli.parsing.drawing_options` gives them.

    Raises:
        ValueError: there is no prompt, or something was asked that such a model knows nothing of.
    """
    from nextscale.cli.console import progress, say
    from nextscale.cli.prompts import read_prompts, shortened
    from nextscale.cli.records import write_record
    from nextscale.pictures import contact_sheet, save_png, save_pngs

    if unknown := [name for name in UNKNOWN if arguments[name]]:
        raise ValueError(
            f"--{unknown[0].replace('_', '-')} is not for {arguments.model}, which draws in conversation: --prompt, or "
            "`nextscale chat --draw`, which shows how an image forms"
        )
    prompts = list(arguments.prompt or []) + (read_prompts(arguments.prompts) if arguments.prompts else [])
    if not prompts:
        raise ValueError(f"{arguments.model} draws what it is told: give --prompt or --prompts FILE")
    number = arguments.num or len(prompts)
    given = {
        name: options[name] for name in ("guidance", "top_k", "top_p", "temperature") if arguments[name] is not None
    }
    with progress("drawing", "scales") as report:
        images = model.generate(
            prompts, number, arguments.seed, batch_size=arguments.batch_size, progress=report, **given
        )
    out = Path(arguments.out)
    paths = save_pngs(images, out)
    seeds = [arguments.seed + i for i in range(number)]
    files: dict[str, Any] = {"images": [path.name for path in paths]}
    if arguments.sheet:
        captions = [f"{shortened(prompts[i % len(prompts)])}, seed {seed}" for i, seed in enumerate(seeds)]
        sheet = contact_sheet(images, labels=captions, scale=max(1, 128 // images.shape[-1]))
        files["sheet"] = save_png(sheet, out / "sheet.png").name
    settings = {"model": arguments.model, "prompts": prompts, "num": number, "seed": arguments.seed, **given}
    settings |= {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    record = write_record(out / "generate.json", settings, {**files, "seeds": seeds})
    last = f" to {paths[-1].name}" if number > 1 else ""
    say(f"{number} image{'s' if number > 1 else ''} in {out}: {paths[0].name}{last}, {record.name}")
