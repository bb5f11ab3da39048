"""``nextscale prepare scenes``"""

from __future__ import annotations

import re
from typing import Any


def add_arguments(parser: Any) -> None:
    parser.add_argument("out", type=str, help="folder; an interrupted run goes on there")
    parser.add_argument("--number", type=int, default=1000, help="pairs of a picture and its depth")
    parser.add_argument("--size", type=str, default="128x96", help="WIDTHxHEIGHT in pixels")
    parser.add_argument("--seed", type=int, default=0, help="other scenes; take another seed for those held out")
    parser.add_argument("--streets", type=float, default=0.3, help="share of streets; the others are rooms")
    parser.add_argument("--workers", type=int | None, default=None, help="processes; one for each core, unless given")
    parser.add_argument("--sheet", type=str | None, default=None, help="write a PNG of the first 24 too")


def run(arguments: Any) -> None:
    from nextscale.cli.console import progress, say

    if arguments.number < 1 or (arguments.workers is not None and arguments.workers < 0):
        raise ValueError(f"--number is {arguments.number} and --workers {arguments.workers}; expected 1, 0 or more")
    match = re.fullmatch(r"(\d+)x(\d+)", arguments.size)
    if match is None:
        raise ValueError(f"--size is {arguments.size!r}; expected WIDTHxHEIGHT, such as 128x96")
    from nextscale.datasets.depth_store import DepthStore
    from nextscale.datasets.scenes import SceneSettings
    from nextscale.datasets.scenes_write import write_scenes

    settings = SceneSettings(height=int(match[2]), width=int(match[1]), seed=arguments.seed, streets=arguments.streets)
    with progress("rendering", "scenes") as report:
        folder = write_scenes(arguments.out, settings, arguments.number, workers=arguments.workers, progress=report)
    say(f"{arguments.number} scenes of {settings.width} x {settings.height} pixels in {folder}")
    if arguments.sheet is not None:
        say(f"the first of them: {_sheet(DepthStore(folder), arguments.sheet)}")


def _sheet(store: Any, path: str) -> Any:
    """Pictures with their depth under them."""
    import numpy as np
    from PIL import Image

    from nextscale.pictures import contact_sheet, save_png
    from nextscale.pictures.depth import depth_picture

    numbers = range(min(24, len(store)))
    shown = [depth_picture(depth).transpose(1, 2, 0) for depth in store.depths(numbers)]
    tiles = [Image.fromarray(np.concatenate(pair)) for pair in zip(store.images(numbers), shown, strict=True)]
    return save_png(contact_sheet(tiles), path)
