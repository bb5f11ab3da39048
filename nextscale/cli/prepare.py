"""``nextscale prepare``

What can be prepared is a module each, with ``add_arguments(parser)`` and ``run(arguments)``, as commands are.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

PREPARATIONS: dict[str, str] = {
    "scenes": "synthetic rooms and streets: pictures with exact depth, to train depth models on",
    "shapes": "objects, procedural or of any folder of meshes: points, what is inside, pictures; repaired and checked",
    "gbuffers": "views of objects with depth, outline, normals and cameras, as SAR3D is trained on",
    "descriptions": "captions, questions and answers about prepared procedural objects, to train describers on",
    "conversations": "questions and answers about images with classes, and requests to draw them, to train VARGPT on",
    "index": "an index of webdataset shards, here or on a server, to stream them in trainings",
}
"""What can be prepared, ``nextscale.cli.prepare_<name>``, and its summary."""


def add_arguments(parser: Any) -> None:
    from nextscale.cli.parsing import new_parser

    kinds = parser.add_subcommands(title="what to prepare", metavar="DATA")
    for name, summary in PREPARATIONS.items():
        kind = new_parser(f"nextscale prepare {name}", summary[0].upper() + summary[1:] + ".")
        module(name).add_arguments(kind)
        kinds.add_subcommand(name, kind, help=summary)


def run(arguments: Any) -> None:
    kind = arguments.subcommand
    module(kind).run(arguments[kind])


def module(name: str) -> Any:
    """The module of a kind of data."""
    return import_module(f"nextscale.cli.prepare_{name}")
