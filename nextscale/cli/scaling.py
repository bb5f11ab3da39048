"""``nextscale scaling``"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def add_arguments(parser: Any) -> None:
    parser.add_argument(
        "config", type=str, help="YAML file of a training run, as `nextscale train KIND --config` takes"
    )
    parser.add_argument("--kind", type=str | None, default=None, help="the KIND, where the file's name says none")
    parser.add_argument("--depths", type=str, required=True, help="one model each, such as 2,3,4,6,8")
    parser.add_argument(
        "--widths",
        type=str | None,
        default=None,
        help="one for each depth; unless given, 64 times the depth, or the file's width in its proportion to the depth",
    )
    parser.add_argument("--out", type=str | None, default=None, help="folder of the runs and what comes of them")
    parser.add_argument(
        "--set",
        type=str,
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="options in place of what the file says, for all: training.epochs=2 training.validate_every=500",
    )


def run(arguments: Any) -> None:
    from nextscale.cli.console import say
    from nextscale.cli.plan import read_recipe
    from nextscale.cli.scaling_report import write_report
    from nextscale.cli.train import located
    from nextscale.scaling import rung

    depths = numbers("--depths", arguments.depths)
    widths = [None] * len(depths) if arguments.widths is None else numbers("--widths", arguments.widths)
    if len(widths) != len(depths):
        raise ValueError(f"--widths has {len(widths)} numbers, --depths {len(depths)}: give one for each")
    if len(set(depths)) != len(depths):
        raise ValueError(f"--depths {arguments.depths} names a depth twice")
    if wrong := [text for text in arguments.set if "=" not in text]:
        raise ValueError(f"--set takes NAME=VALUE, such as training.epochs=2; got {wrong[0]!r}")
    file = Path(arguments.config)
    kind, recipe = read_recipe(file, arguments.kind, [f"--{text}" for text in arguments.set])
    out = Path(arguments.out or f"runs/scaling-{file.stem}")
    recipe = located(recipe)
    ladder = [rung(recipe, d, out / f"depth-{d:02d}", w) for d, w in zip(depths, widths, strict=True)]
    done = []
    for number, member in enumerate(ladder):
        say(f"[{number + 1} of {len(ladder)}] {kind} of depth {member.depth} and width {member.width}")
        done.append(train_rung(member))
    from accelerate import PartialState

    if PartialState().is_main_process:
        text, files = write_report(f"{kind}, {file.name}", done, out)
        say(text)
        for path in files:
            say(f"written: {path}")


def numbers(option: str, text: str) -> list[Any]:
    """Whole numbers, separated by commas or spaces.

    Raises:
        ValueError: something else is among them, or there are none.
    """
    words = text.replace(",", " ").split()
    if not words or not all(word.isdigit() for word in words):
        raise ValueError(f"{option} is {text!r}; expected whole numbers such as 2,3,4,6,8")
    return [int(word) for word in words]


def train_rung(recipe: Any) -> Any:
    """Train one size to its end, or on to it; one that is finished under the same options is only read.

    Raises:
        ValueError: there is no held-out data, or the folder holds a run with another configuration.
    """
    import json

    import yaml

    from nextscale.cli.console import say
    from nextscale.cli.train import settings, train
    from nextscale.scaling import Cost, read_rung

    folder = Path(recipe.training.output)
    kept, config = folder / "cost.json", folder / "config.yaml"
    if (folder / "model").is_dir() and kept.is_file() and yaml.safe_load(config.read_text("utf-8")) == settings(recipe):
        say(f"finished before, in {folder}")
    else:
        train(recipe, lambda runner: _prepare(recipe, runner, kept))
    return read_rung(folder, Cost(**json.loads(kept.read_text("utf-8"))))


def _prepare(recipe: Any, runner: Any, kept: Path) -> None:
    """Validate in the precision of the training, many times faster on most machines; and count the run's cost."""
    from dataclasses import asdict

    from accelerate import PartialState

    from nextscale.core.checkpoint import write_json
    from nextscale.scaling import cost_of

    validate = runner.hooks.validate
    if validate is None:
        raise ValueError("the law is of the loss on held-out data, and the configuration names none")

    def measure(step: int) -> Any:
        with runner.accelerator.autocast():
            return validate(step)

    runner.hooks.validate = measure
    cost = cost_of(recipe, runner)
    if PartialState().is_main_process:
        write_json(kept, asdict(cost))
