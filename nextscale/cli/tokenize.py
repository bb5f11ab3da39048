"""``nextscale tokenize``"""

from __future__ import annotations

from typing import Any


def add_arguments(parser: Any) -> None:
    from typing import Literal

    from nextscale.cli.parsing import add_loading

    parser.add_argument("tokenizer", type=str, help="name, file or folder; of a whole model, its tokenizer is taken")
    parser.add_argument(
        "source", type=str, help="images: folder, class folders, parquet or webdataset shards, or a pattern"
    )
    parser.add_argument("out", type=str, help="folder of token shards; an interrupted run goes on there")
    parser.add_argument(
        "--scales",
        type=str | None,
        default=None,
        help='such as "1 2 3 5 8"; the tokenizer\'s own, unless given',
    )
    parser.add_argument("--size", type=int | None, default=None, help="pixels; what the scales stand for, unless given")
    parser.add_argument("--views", type=int, default=1, help="crops per image")
    parser.add_argument("--crop", type=Literal["random", "center"], default="random", help="of the resized image")
    parser.add_argument(
        "--resize-ratio", type=float, default=1.125, help="the shorter side becomes this times the size"
    )
    parser.add_argument("--mirrored", action="store_true", help="keep each crop's mirror image too")
    parser.add_argument("--seed", type=int, default=0, help="of the crops")
    parser.add_argument("--batch-size", type=int, default=64, help="images encoded at once")
    add_loading(parser, needs=False, compress=False)


def run(arguments: Any) -> None:
    from nextscale.cli.console import progress, say

    for name in ("views", "batch_size"):
        if arguments[name] < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {arguments[name]}; expected 1 or more")
    if arguments.views > 1 and arguments.crop == "center":
        raise ValueError(f"--views {arguments.views} of --crop center are all the same; use --crop random")
    import nextscale
    from nextscale.core.schedule import ScaleSchedule
    from nextscale.datasets.images import open_images
    from nextscale.tasks.tokenizers.image_tokenizer import ImageTokenizer
    from nextscale.tasks.tokenizers.tokenize import write_tokens

    model = nextscale.load(arguments.tokenizer, device=arguments.device, dtype=arguments.dtype)
    tokenizer = model if isinstance(model, ImageTokenizer) else getattr(model, "tokenizer", None)
    if not isinstance(tokenizer, ImageTokenizer):
        raise ValueError(f"{arguments.tokenizer} is a {type(model).__name__}, expected a tokenizer")
    own = getattr(model.config, "schedule", tokenizer.config.schedule)
    schedule = own if arguments.scales is None else ScaleSchedule.parse(arguments.scales)
    size = tokenizer.image_size(schedule)[0]
    if arguments.size is not None and arguments.size != size:
        raise ValueError(
            f"--size is {arguments.size}, but the scales '{schedule}' stand for {size} pixels; let them end at "
            f"{arguments.size / tokenizer.stride:g}"
        )
    dataset = open_images(
        arguments.source,
        size=size,
        crop=arguments.crop,
        resize_ratio=arguments.resize_ratio,
        seed=arguments.seed,
    )
    with progress("encoding", "samples") as report:
        folder = write_tokens(
            tokenizer,
            dataset,
            arguments.out,
            schedule=schedule,
            views=arguments.views,
            mirrored=arguments.mirrored,
            batch_size=arguments.batch_size,
            progress=report,
        )
    views = arguments.views * (2 if arguments.mirrored else 1)
    say(
        f"{len(dataset)} images ({dataset.num_classes or 'no'} classes), views of each: {views}, "
        f"tokens of a view: {schedule.length}, in {folder}"
    )
