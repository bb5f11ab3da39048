"""``nextscale list``"""

from __future__ import annotations

from typing import Any


def add_arguments(parser: Any) -> None:
    parser.add_argument(
        "pattern",
        nargs="?",
        default=None,
        type=str | None,
        help="part of the name, or a pattern with * and ?",
    )


def run(arguments: Any) -> None:
    from nextscale.cli.console import say, table
    from nextscale.models import MODELS, list_models, local_path

    names = list_models(arguments.pattern)
    if not names:
        raise ValueError(f"no model's name matches {arguments.pattern!r}; there are {', '.join(MODELS)}")
    rows = []
    for model in (MODELS[name] for name in names):
        here = local_path(model) is not None
        where = "here" if here else f"hub: {model.repository}" if model.repository else "missing"
        rows.append((model.name, model.system, where, model.summary, model.terms))
    say(table(("name", "system", "where", "what", "terms of the weights"), rows))
