"""The command line, ``nextscale``.

Each command is a module with ``add_arguments(parser)`` and ``run(arguments)``; only the one that is typed is
imported, and none imports PyTorch before its arguments are read, so that help and mistakes answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

COMMANDS = {
    "list": "names of models that can be loaded",
    "info": "what a file, folder or named model holds",
    "generate": "draw images",
    "chat": "talk with a model that answers in words and images",
    "edit": "draw part of an image anew, or continue it beyond its edges",
    "describe": "what the object of a mesh is, in words",
    "shape": "3D shapes of a class, a picture or a text: meshes, pictures, turntables, a page to turn them on",
    "depth": "depth of photos: as maps, pictures, points, or seen from elsewhere",
    "restore": "clean photos: of noise, blur, rain, haze, darkness; of any size",
    "control": "draw after a control picture: edges, depth, normals; or only extract those",
    "prepare": "make data to train on: synthetic scenes with exact depth, objects of meshes",
    "tokenize": "encode images once, to train on their tokens",
    "convert": "official files to this library's format and back; take training checkpoints apart",
    "train": "train or fine-tune on your own images",
    "plan": "what a training run takes, before it starts: memory, operations, time, data",
    "scaling": "train a ladder of sizes and fit how the loss falls with size and compute",
    "calibrate": "find what a model can do without, for --lite: less attention, smaller weights and cache",
    "evaluate": "measure a model, or a folder of results, by a benchmark's protocol",
    "bench": "how fast a model draws on this machine",
    "demo": "draw with the model that ships with the library, and show it on a page",
}
TRACEBACK = "NEXTSCALE_TRACEBACK"

FAILED, STOPPED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for an error, 130 where it was interrupted."""
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return 0
    except SystemExit as done:  # help and version
        return int(done.code or 0)
    except BrokenPipeError:
        # The reader has gone (`nextscale list | head`): nothing is wrong, and nothing can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        if os.environ.get(TRACEBACK):
            raise
        return _fail("interrupted", STOPPED)
    except Exception as error:
        status = _status(error)
        if status is None or os.environ.get(TRACEBACK):
            raise
        return _fail(_message(error), status)


def _run(argv: list[str]) -> None:
    from nextscale.cli.parsing import new_parser, read

    parser = new_parser(
        "nextscale",
        "Next-scale autoregressive vision models: draw, edit, train, measure. "
        f"Set {TRACEBACK}=1 to see where in the code an error comes from.",
    )
    from nextscale import __version__

    parser.add_argument("--version", action="version", version=f"nextscale {__version__}")
    commands = parser.add_subcommands(title="commands", metavar="COMMAND", required=False)
    typed = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = new_parser(f"nextscale {name}", summary[0].upper() + summary[1:] + ".")
        commands.add_subcommand(name, command, help=summary)
        if name == typed:
            module(name).add_arguments(command)
    if typed is None and not argv:
        parser.print_help()
        return
    arguments = read(parser, argv)
    chosen = arguments.subcommand
    if chosen is None:
        parser.print_help()
        return
    module(chosen).run(arguments[chosen])


def module(command: str) -> Any:
    """The module of a command."""
    return import_module(f"nextscale.cli.{'listing' if command == 'list' else command}")


def _status(error: Exception) -> int | None:
    """The exit status of an error that is told in one line; None for what is a mistake of this library."""
    from nextscale.core.interrupt import Interrupted

    if isinstance(error, Interrupted):
        return STOPPED
    if isinstance(error, ValueError | OSError) or type(error).__name__ == "OutOfMemoryError":
        return FAILED
    return None


def _message(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ == "OutOfMemoryError":
        return f"the device's memory is full; lower --batch-size or use --dtype bfloat16 ({text.split('. ')[0]})"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return text


def _fail(message: str, status: int) -> int:
    print(f"nextscale: {message}", file=sys.stderr)
    return status
