"""``nextscale prepare gbuffers``"""

from __future__ import annotations

from typing import Any


def add_arguments(parser: Any) -> None:
    from nextscale.cli.prepare_shapes import add_source

    parser.add_argument("out", type=str, help="folder; an interrupted run goes on there")
    add_source(parser, opening="none")
    group = parser.add_argument_group("views of an object")
    group.add_argument("--views", type=int, default=12, help="the tokenizer's encoder reads the first six of 12")
    group.add_argument("--size", type=int, default=256, help="side of a picture in pixels")


def run(arguments: Any) -> None:
    from nextscale.cli.console import progress
    from nextscale.cli.prepare_shapes import chosen_source, summarise, write_sheet
    from nextscale.datasets.shapes_gbuffers import Rendering, render_all

    source = chosen_source(arguments)
    opening = None if arguments.open == "none" else arguments.open
    rendering = Rendering(arguments.views, arguments.size, opening, arguments.resolution, arguments.seed)
    with progress("rendering", "objects") as report:
        records = render_all(arguments.out, source, rendering, workers=arguments.workers, progress=report)
    summarise(records, arguments.out)
    if arguments.sheet is not None:
        write_sheet(source, records, arguments)
