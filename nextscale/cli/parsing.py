"""Reading arguments: parsers, the options that commands share, and lists of classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def new_parser(name: str, description: str) -> ArgumentParser:
    """A parser that raises ValueError instead of ending the process."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(prog=name, description=description, exit_on_error=False, default_env=False)


def read(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """The arguments.

    Raises:
        ValueError: they are not understood; the message says which and names the command's help.
    """
    from jsonargparse import ArgumentError

    argv = list(argv)
    if argv[:1] == ["train"]:
        # Its options are named after the fields of configurations, which have underscores.
        argv = [re.sub(r"^--[^=]*", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in argv]
    try:
        return parser.parse_args(argv)
    except ArgumentError as error:
        from nextscale.cli import COMMANDS

        words = [word for word in argv[:1] if word in COMMANDS]
        if words == ["train"]:
            words += [word for word in argv[1:2] if not word.startswith("-")]
        text = _plain(str(error))
        raise ValueError(f"{text}. See `{' '.join(['nextscale', *words])} --help`") from None


def _plain(message: str) -> str:
    """The parser's message in one line, without the listing of what an option's type is made of."""
    text = re.sub(r"\s+", " ", message).strip().rstrip(".")
    union = re.search(r'key "([\w.]+)": Does not validate .*?\[(.*?)\].* Given value: (.*)$', text)
    if union is None:
        return text
    name, kinds, value = union.groups()
    wanted = [kind for kind in re.findall(r"[A-Za-z]+(?='>)", kinds) if kind != "NoneType"]
    return f"--{name.replace('_', '-')} is {value!r}; expected {' or '.join(wanted) or kinds}"


NEEDS = {
    "tokenizer": "of an official transformer file, where it is not beside it",
    "base": "model that an adapter was trained for, where it is not the one it names",
    "refiner": "model that draws the fine scales, where the one given first draws the coarse ones",
}
"""Models that another one builds on (:class:`nextscale.systems.Need`), as options of all commands."""


def add_loading(parser: ArgumentParser, needs: bool = True, compress: bool = True) -> None:
    """Options that go to :func:`nextscale.load`; :func:`loading_options` reads them.

    Args:
        needs: with the models that another one builds on.
        compress: with the ways of compressing a model as it is loaded.
    """
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--device", type=str | None, default=None, help="cuda, mps or cpu; whichever is there, unless named"
    )
    group.add_argument(
        "--dtype",
        type=str | None,
        default=None,
        help="of the weights: float32, bfloat16 or float16; unless named, float32 on the CPU, elsewhere as stored",
    )
    if compress:
        group.add_argument(
            "--lite", type=str | None, default=None, help="folder that nextscale calibrate wrote: compress the model so"
        )
        group.add_argument(
            "--weight-bits", type=int | None, default=None, help="8 or 4: pack the weights of linear layers so"
        )
    if needs:
        add_needs(group)


def add_needs(group: Any) -> None:
    """An option for each of :data:`NEEDS`."""
    for name, use in NEEDS.items():
        group.add_argument(f"--{name}", type=str | None, default=None, help=f"file, folder or name: {use}")
    group.add_argument(
        "--draft-scales", type=int | None, default=None, help="with --refiner: how many scales the first model draws"
    )


def needed(arguments: Any) -> dict[str, Any]:
    """What of :func:`add_needs` was given."""
    names = (*NEEDS, "draft_scales")
    return {name: given for name in names if (given := getattr(arguments, name, None)) is not None}


def loading_options(arguments: Any) -> dict[str, Any]:
    """What :func:`add_loading` has read, for :func:`nextscale.load`."""
    chosen = {name: given for name in ("lite", "weight_bits") if (given := getattr(arguments, name, None)) is not None}
    return {"device": arguments.device, "dtype": arguments.dtype, **chosen, **needed(arguments)}


PER_SCALE = ("guidance", "top_k", "top_p", "temperature")
"""Options of sampling that may be given once for all scales or once for each."""


def add_drawing(parser: ArgumentParser, *, guidance: float | None, top_p: float | None) -> None:
    """Options of sampling; the defaults are the published ones of the command's use.

    Those of :data:`PER_SCALE` take one number, or one per scale.

    Args:
        top_p: None: neither filter has a default, as models differ; see :func:`with_filters`.
    """
    group = parser.add_argument_group("drawing")
    group.add_argument("--seed", type=int, default=0, help="image i is drawn from seed + i, alone or in any batch")
    group.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        default=None if guidance is None else [guidance],
        help="strength at the last scale; more keeps closer to the class"
        + ("" if guidance else "; unless given, the model's own"),
    )
    several = "; one number, or one per scale"
    own = "; unless given, the model's own" if top_p is None else ""
    group.add_argument(
        "--top-k",
        type=int,
        nargs="+",
        default=None if top_p is None else [900],
        help=f"draw among so many likeliest codes; 0: all{several}{own}",
    )
    group.add_argument(
        "--top-p",
        type=float,
        nargs="+",
        default=None if top_p is None else [top_p],
        help=f"draw among codes of this total probability; 0: all{several}{own}",
    )
    group.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        default=None,
        help=f"below 1: likelier codes; above 1: wilder ones{several}; unless given, 1, or what a model of prompts has",
    )
    group.add_argument(
        "--smooth", action="store_true", help="mix codes: softer pictures, for looking at, not for measuring"
    )
    group.add_argument(
        "--batch-size", type=int, default=16, help="images drawn at once: memory and speed, nothing else"
    )


def add_schedule(parser: ArgumentParser) -> None:
    """Options that choose the scales, of models that take any; :func:`chosen_schedule` reads them."""
    group = parser.add_argument_group("scales, of models that take any (FlexVAR)")
    group.add_argument(
        "--scales", type=str | None, default=None, help='grids, coarse to fine, such as "1 2 4 8x16"; or the two below'
    )
    group.add_argument("--size", type=str | None, default=None, help="of the images in pixels, such as 48 or 32x64")
    group.add_argument(
        "--steps",
        type=int | None,
        default=None,
        help="number of scales to that size; of FlowAR, steps from noise to the latents of every scale",
    )


def chosen_schedule(arguments: Any, model: Any) -> Any:
    """The scales that :func:`add_schedule` asks for; None: the model's own.

    Raises:
        ValueError: the options contradict each other, or the model takes no other scales.
    """
    if (arguments.scales, arguments.size, arguments.steps) == (None, None, None):
        return None
    if not hasattr(model, "schedule_for"):
        raise ValueError(
            f"--scales, --size and --steps are for models that take any; this {type(model).__name__} has "
            f"'{model.config.schedule}'"
        )
    if arguments.scales is not None:
        if arguments.size is not None or arguments.steps is not None:
            raise ValueError("give either --scales, or --size and --steps")
        from nextscale.core.schedule import ScaleSchedule

        return ScaleSchedule.parse(arguments.scales)
    return model.schedule_for(None if arguments.size is None else parse_size(arguments.size), arguments.steps)


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) from ``48`` or ``32x64``.

    Raises:
        ValueError: it is neither.
    """
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if found is None:
        raise ValueError(f"--size is {text!r}; expected pixels such as 48, or height and width such as 32x64")
    return int(found[1]), int(found[2] or found[1])


def drawing_options(arguments: Any) -> dict[str, Any]:
    """What :func:`add_drawing` has read, checked.

    Raises:
        ValueError: a number is out of range.
    """
    for name, low, high in (("top_k", 0, None), ("top_p", 0, 1), ("batch_size", 1, None), ("seed", 0, None)):
        for value in arguments[name] or () if name in PER_SCALE else [arguments[name]]:
            if value < low or (high is not None and value > high):
                limits = f"{low} to {high}" if high is not None else f"{low} or more"
                raise ValueError(f"--{name.replace('_', '-')} is {value}; expected {limits}")
    if wrong := [value for value in arguments.temperature or () if not value > 0]:
        raise ValueError(f"--temperature is {wrong[0]}; expected more than 0")
    options = {name: arguments[name] for name in (*PER_SCALE, "smooth", "batch_size")}
    single = {name: options[name][0] for name in PER_SCALE if options[name] is not None and len(options[name]) == 1}
    return {**options, "temperature": options["temperature"] or 1.0} | single


def with_filters(options: dict[str, Any]) -> dict[str, Any]:
    """Options of sampling with the filters of VAR's official figures where none were given."""
    return options | {name: value for name, value in (("top_k", 900), ("top_p", 0.96)) if options[name] is None}


def parse_classes(words: Sequence[str] | None, no_class: int) -> list[int | str | None] | None:
    """Classes as they are typed: numbers, names, ranges such as 0-9, ``random`` and ``none``, also with commas.

    Args:
        no_class: the number that stands for no class.

    Returns:
        Numbers and names; None for a class to be drawn. None where nothing was typed.
    """
    if words is None:
        return None
    classes: list[int | str | None] = []
    for word in (part.strip() for text in words for part in text.split(",")):
        span = re.fullmatch(r"(\d+)-(\d+)", word)
        if span is not None:
            first, last = int(span[1]), int(span[2])
            if last < first:
                raise ValueError(f"the classes {word} run backwards; write {last}-{first}")
            classes += range(first, last + 1)
        elif word.isdigit():
            classes.append(int(word))
        elif word:
            classes.append({"none": no_class, "random": None}.get(word.lower(), word))
    if not classes:
        raise ValueError("no class is named; leave the option out to have classes drawn")
    return classes
