"""``nextscale control --perceive``: the control picture of an image, drawn by a model of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def perceive(arguments: Any) -> None:
    """Draw controls that belong to an image.

    Raises:
        ValueError: the model draws no controls, or not of this type.
    """
    import torch

    import nextscale
    from nextscale.cli.console import progress, say
    from nextscale.cli.control import SHOWN, control_type, fitted, read
    from nextscale.cli.parsing import drawing_options, loading_options
    from nextscale.cli.records import write_record
    from nextscale.pictures import comparison_sheet, save_png, save_pngs

    options = drawing_options(arguments)
    source, place = arguments.inputs
    model = nextscale.load(source, **loading_options(arguments))
    if not hasattr(model, "perceive"):
        raise ValueError(f"{source} is a {type(model).__name__}, which draws no controls; ControlVAR does")
    kind = control_type(model, source, arguments.type)
    size = model.tokenizer.image_size(model.config.schedule)
    photo = fitted(read(Path(place)), size, arguments.fit)
    images = photo.expand(arguments.num, -1, -1, -1)
    with progress("drawing", "scales") as report:
        controls: torch.Tensor = model.perceive(
            images, kind, arguments.class_, arguments.seed, **options, progress=report
        )
    out = Path(arguments.out)
    files = {"controls": [path.name for path in save_pngs(controls, out, stem="control")]}
    shown = min(arguments.num, SHOWN)
    headings = ["image", *(f"seed {arguments.seed + i}" for i in range(shown))]
    sheet = comparison_sheet([(kind, [photo, *controls[:shown]])], headings, scale=max(1, 128 // size[1]))
    name = save_png(sheet, out / "sheet.png").name
    record = write_record(
        out / "control.json",
        {"model": source, "image": place, "perceived": kind, "fit": arguments.fit, "class": arguments.class_}
        | {"num": arguments.num, "seed": arguments.seed, **options}
        | {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")},
        {**files, "sheet": name},
    )
    say(f"{arguments.num} {kind} picture{'s' if arguments.num > 1 else ''} in {out}: {', '.join(files['controls'])}")
    say(f"also there: {name}, {record.name}")
