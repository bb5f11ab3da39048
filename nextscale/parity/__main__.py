"""``python -m nextscale.parity FOLDER``: replay a folder of golden cases.

Exit status: 0 where every output of every case is within its tolerance; 1 where one is not, or where a case
is damaged or not understood; 2 where there is nothing to replay.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nextscale.parity.case import Case


class NothingToReplay(ValueError):
    """The folder holds no case that was asked for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay what the command line asks for; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        paths = find_cases(options.folder, options.systems, options.cases)
    except (NothingToReplay, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    try:
        return _replay_all(paths, options.traceback)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def find_cases(folder: Path, systems: Sequence[str] = (), glob: str = "*") -> list[Path]:
    """The ``.npz`` files of a folder (or the one file) of these systems whose name matches ``glob``, sorted.

    A file that cannot be read belongs to the systems its name begins with, so that damage never hides a case.

    Raises:
        NothingToReplay: there is no such folder, it holds no case, or none of a system that was asked for.
    """
    if folder.is_file():
        files = [folder]
    elif folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix == ".npz" and path.is_file())
    else:
        raise NothingToReplay(f"{folder}: no such folder; give one that holds golden cases (.npz files)")
    if not files:
        raise NothingToReplay(f"{folder}: no .npz file in it, so there is no case to replay")
    chosen = [path for path in files if fnmatchcase(path.name, glob) or fnmatchcase(path.stem, glob)]
    if not chosen:
        raise NothingToReplay(f"{folder}: none of its {len(files)} cases is named like {glob!r}")
    if not systems:
        return chosen
    owners = {path: _system(path, systems) for path in chosen}
    if absent := [system for system in systems if system not in owners.values()]:
        there = ", ".join(sorted({owner for owner in owners.values() if owner})) or "none"
        raise NothingToReplay(f"{folder}: no case of {', '.join(absent)}; systems in it: {there}")
    return [path for path in chosen if owners[path] in systems]


def _system(path: Path, systems: Sequence[str]) -> str:
    from nextscale.parity.case import CaseError, read_system

    try:
        return read_system(path)
    except (CaseError, OSError):
        return next((system for system in systems if path.name.startswith(f"{system}_")), "")


def _replay_all(paths: Sequence[Path], with_trace: bool) -> int:
    from nextscale.parity.replay import replay
    from nextscale.parity.report import details, heading, summary

    results = []
    for index, path in enumerate(paths, 1):
        opened = False

        def announce(case: Case, index: int = index) -> None:
            nonlocal opened
            opened = True
            print(heading(index, len(paths), case.name, f"{case.system} {case.operation}"), flush=True)

        result = replay(path, announce)
        if not opened:
            print(heading(index, len(paths), result.name))
        print("\n".join(details(result)), flush=True)
        if with_trace and result.trace:
            print(result.trace)
        results.append(result)
    print("", *summary(results), sep="\n")
    return 0 if all(result.passed for result in results) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nextscale.parity",
        description="Replay golden cases: compare the library with what published implementations computed.",
    )
    parser.add_argument("folder", type=Path, help="folder of .npz cases (or one case)")
    parser.add_argument(
        "--systems",
        type=lambda text: [name for name in text.replace(",", " ").split() if name],
        default=[],
        metavar="A,B",
        help="only cases of these systems, e.g. var,flexvar (default: all)",
    )
    parser.add_argument(
        "--cases", default="*", metavar="GLOB", help="only cases whose file name matches, e.g. 'var_sample*'"
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's own choice)")
    parser.add_argument(
        "--traceback", action="store_true", help="print the traceback of a case that fails with an error"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
