"""``nextscale prepare conversations``"""

from __future__ import annotations

from typing import Any


def add_arguments(parser: Any) -> None:
    parser.add_argument("source", type=str, help="images with classes: class folders, shards, or a pattern of them")
    parser.add_argument("out", type=str, help="folder of images, conversations and questions")
    parser.add_argument("--size", type=int, default=32, help="side that images are cropped to, in pixels")
    parser.add_argument(
        "--class-names", nargs="+", type=str | None, default=None, help="in the order of labels that have no names"
    )
    parser.add_argument("--number", type=int | None, default=None, help="only the first so many images")
    parser.add_argument("--seed", type=int, default=0, help="of what is asked")


def run(arguments: Any) -> None:
    from nextscale.cli.console import progress, say

    if arguments.number is not None and arguments.number < 1:
        raise ValueError(f"--number is {arguments.number}; expected 1 or more")
    from nextscale.datasets.conversations import write_conversations
    from nextscale.datasets.images import open_images

    images = open_images(arguments.source, size=arguments.size, crop="center", resize_ratio=1.0)
    with progress("writing", "images") as report:
        counts = write_conversations(
            arguments.out, images, arguments.class_names, seed=arguments.seed, limit=arguments.number, progress=report
        )
    say(f"{arguments.out}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
