"""``nextscale demo``"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def add_arguments(parser: Any) -> None:
    from nextscale.cli.parsing import add_loading

    sections = ["prompts", "restoration", "depth", "shapes"]
    parser.add_argument("--out", type=str, default="out", help="folder; the page of an earlier demo there is made anew")
    parser.add_argument("--model", type=str, default="var-cifar10", help="name, file or folder")
    parser.add_argument(
        "--also", nargs="*", type=str, default=sections, help=f"what else is shown: any of {', '.join(sections)}"
    )
    add_loading(parser)


def run(arguments: Any) -> None:
    import nextscale
    from nextscale.cli.console import say
    from nextscale.cli.parsing import loading_options
    from nextscale.demo_tasks import SECTIONS

    if unknown := [task for task in arguments.also if task not in SECTIONS]:
        raise ValueError(f"--also {unknown[0]!r} is none of {', '.join(SECTIONS)}")
    model = nextscale.load(arguments.model, **loading_options(arguments))
    if not hasattr(model, "steps"):
        raise ValueError(f"{arguments.model} is a {type(model).__name__}, which draws no images by itself")
    from nextscale.demo import make_demo

    page = make_demo(model, Path(arguments.out), arguments.model, say, arguments.also)
    say(f"the page and its pictures: {page.resolve()}")
