"""``nextscale train``"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nextscale.systems import RECIPES

HARMLESS = (
    "output",
    "epochs",
    "workers",
    "log_every",
    "save_every",
    "sample_every",
    "validate_every",
    "keep",
    "sharding",
)
"""Entries of ``training`` that a run may change when it is taken up again."""


MODEL_OPTIONS = ("tokenizer", "init", "autoencoder_init", "teacher", "prior", "vision")
"""Options of recipes that name a model."""


def add_arguments(parser: Any) -> None:
    commands = parser.add_subcommands(title="what to train", metavar="WHAT")
    for kind, recipe in RECIPES.items():
        commands.add_subcommand(kind, recipe_parser(kind), help=recipe.summary)


def recipe_parser(kind: str) -> Any:
    """A parser with an option for every field of the recipe, and ``--config`` for a YAML file of them."""
    from nextscale.cli.parsing import new_parser

    parser = new_parser(f"nextscale train {kind}", f"Train a model: {RECIPES[kind].summary}.")
    parser.add_argument("--config", action="config", help="YAML file of these options; those typed after it win")
    parser.add_class_arguments(RECIPES[kind].recipe_class, None)
    for group in parser._action_groups:
        if group.title and group.title.startswith("Attributes"):
            group.title = "more options"
    return parser


def run(arguments: Any) -> None:
    kind = arguments.subcommand
    recipe = make_recipe(kind, arguments[kind])
    train(recipe)

    from accelerate import PartialState

    PartialState().destroy_process_group()


def make_recipe(kind: str, options: Any) -> Any:
    """The recipe of parsed options, with names of models replaced by where they lie."""
    from dataclasses import fields

    made, recipe_class = recipe_parser(kind).instantiate(options), RECIPES[kind].recipe_class
    return located(recipe_class(**{f.name: made[f.name] for f in fields(recipe_class)}))


def located(recipe: Any) -> Any:
    """A recipe with names of models replaced by where they lie."""
    from dataclasses import replace

    places = {name: model_place(getattr(recipe, name)) for name in MODEL_OPTIONS if getattr(recipe, name, None)}
    return replace(recipe, **places)


def model_place(source: str) -> str:
    """The path behind a model's name, or the model inside a training run's folder; else the source as it is."""
    from nextscale.models import MODELS, locate, no_such_source

    if source in MODELS:
        return str(locate(MODELS[source]))
    path = Path(source).expanduser()
    if not path.exists():
        raise no_such_source(source)
    inner = path / "model"
    return str(inner if path.is_dir() and not (path / "config.json").is_file() and inner.is_dir() else path)


def train(recipe: Any, prepare: Callable[[Any], None] | None = None) -> None:
    """Run a recipe to its end, or on from where it was stopped.

    Args:
        prepare: given the :class:`nextscale.core.training.Trainer` before it runs, on every process.

    Raises:
        ValueError: the output folder holds a run with another configuration.
        nextscale.core.training.Interrupted: stopped from outside; the state is saved.
    """
    import torch
    from accelerate import PartialState

    from nextscale.cli.console import say
    from nextscale.cli.training_view import progress_of, sampler
    from nextscale.core.training import Hooks

    folder = Path(recipe.training.output)
    check_same_run(recipe, folder)
    # Without being told, processes on CPUs do not know of each other.
    main = PartialState(cpu=not torch.cuda.is_available() and not torch.backends.mps.is_available()).is_main_process
    with progress_of(recipe.training, enabled=main) as report:
        hooks = Hooks(progress=report)
        runner = recipe.trainer(load_initial, hooks)
        runner.hooks.sample = sampler(recipe, runner)
        if prepare is not None:
            prepare(runner)
        if main:
            write_config(recipe, folder)
            start = runner.checkpoints()
            taken_up = f", taken up from {start[-1].name}" if start else ""
            say(f"training {runner.steps} steps of {recipe.training.batch_size} in {folder}{taken_up}")
        runner.run()
    if main:
        tell_skipped(folder)
        say(f"done: {recipe.finish(runner)}")


def tell_skipped(folder: Path) -> None:
    """Say, at the end of a run, that not all data could be read."""
    from nextscale.cli.console import note
    from nextscale.datasets.errors import listed

    listing = folder / "skipped.txt"
    if listing.is_file():
        names = list(dict.fromkeys(listing.read_text(encoding="utf-8").splitlines()))
        note(f"{len(names)} images or shards could not be read, or not whole: {listed(names, 3)}; all are in {listing}")


# --- the configuration beside the run -----------------------------------------------------------------


def settings(recipe: Any) -> dict[str, Any]:
    """All options, as they are kept."""
    from nextscale.core.config import to_json

    content: dict[str, Any] = to_json(recipe)
    return content


def write_config(recipe: Any, folder: Path) -> Path:
    """``config.yaml`` in the run's folder: give it to ``--config`` to train the same again."""
    import yaml

    from nextscale.core.checkpoint import write_atomically

    text = yaml.safe_dump(settings(recipe), sort_keys=False)

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write_atomically(folder / "config.yaml", write)


def check_same_run(recipe: Any, folder: Path) -> None:
    """Refuse to go on from checkpoints of another configuration.

    Raises:
        ValueError: an option other than the harmless ones differs; all are named.
    """
    import yaml

    from nextscale.core.training_state import checkpoints

    before = folder / "config.yaml"
    if not before.is_file() or not checkpoints(folder / "checkpoints"):
        return
    old, new = (_flat(each) for each in (yaml.safe_load(before.read_text("utf-8")), settings(recipe)))
    harmless = {f"training.{name}" for name in HARMLESS}
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name) and name not in harmless]
    if changed:
        listed = "; ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in changed[:5])
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise ValueError(
            f"{folder} holds a run with another configuration ({listed}{more}): give another --training.output, or go "
            f"on with --config {before}"
        )


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {prefix.rstrip("."): settings}
    return {k: v for name, value in settings.items() for k, v in _flat(value, f"{prefix}{name}.").items()}


# --- models to start from -----------------------------------------------------------------------------


def load_initial(source: str, tokenizer: Any = None) -> Any:
    """A model that a recipe starts from or builds on.

    Args:
        tokenizer: stands in for the one an official file was trained with. Where its codes are others, an empty
            tokenizer of the file's own codes is put in: the recipe then replaces it.
    """
    from nextscale.loading import build, open_source

    opened = open_source(source)
    if opened.config is not None or tokenizer is None or opened.system.name != "var":
        return build(opened)
    return build(opened, tokenizer=_fitting(opened.content, tokenizer))


def _fitting(content: Any, tokenizer: Any) -> Any:
    """The tokenizer where an official VAR speaks its codes, else one without weights that has the file's."""
    from dataclasses import replace

    import torch

    from nextscale.tasks.generation import var
    from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig

    config = var.config_from_official(var.find_state_dict(content, var.NESTED, "pos_1LC"))
    codes = tokenizer.config.quantizer
    if (codes.vocabulary, codes.channels) == (config.vocabulary, config.code_channels):
        return tokenizer
    old = ResidualVQConfig()
    old = replace(
        old,
        autoencoder=replace(old.autoencoder, latent_channels=config.code_channels),
        quantizer=replace(old.quantizer, vocabulary=config.vocabulary, channels=config.code_channels),
    )
    with torch.device("meta"):
        return ResidualVQ(old)
