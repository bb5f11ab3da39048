"""``nextscale describe``"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def add_arguments(parser: Any) -> None:
    from nextscale.cli.parsing import add_loading

    parser.add_argument("meshes", nargs="+", type=str, help="files: glb, obj, ply, off, stl; or clouds of points")
    parser.add_argument(
        "--model", type=str | None, default=None, help="name, file or folder; unless named, the describer that ships"
    )
    parser.add_argument("--question", type=str | None, default=None, help="ask this; unless given, what it is")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest word")
    parser.add_argument("--top-p", type=float, default=0.0, help="draw among words of this total probability; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the points or views that are looked at, and of words")
    parser.add_argument("--json", type=str | None, default=None, help="write questions and answers to this file too")
    add_loading(parser, compress=False)


def run(arguments: Any) -> None:
    if missing := [each for each in arguments.meshes if not Path(each).is_file()]:
        raise FileNotFoundError(f"{missing[0]}: no such mesh")
    source = arguments.model or embedded()
    import nextscale
    from nextscale.cli.console import say
    from nextscale.cli.parsing import loading_options
    from nextscale.core.checkpoint import write_json

    model = nextscale.load(source, **loading_options(arguments))
    if not hasattr(model, "describe"):
        raise ValueError(f"{source} is a {type(model).__name__}, which describes no shapes")
    found = []
    for path in arguments.meshes:
        text = model.describe(
            path,
            arguments.question,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
        )
        say(text if len(arguments.meshes) == 1 else f"{path}: {text}")
        found.append({"mesh": path, "question": arguments.question or model.config.question, "answer": text})
    if arguments.json is not None:
        say(f"{write_json(Path(arguments.json), {'model': source, 'answers': found})}")


def embedded() -> str:
    """The describer that ships with the library.

    Raises:
        ValueError: none does.
    """
    from nextscale.models import MODELS

    found = [model.name for model in MODELS.values() if model.system == "describer" and model.repository is None]
    if not found:
        raise ValueError("no describer ships with this library: train one (docs/describing.md) and name it by --model")
    return found[0]
