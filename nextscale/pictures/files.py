"""Files that appear whole or not at all, under names that do not replace what is there."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

_DIGITS = 4


def free_path(path: str | os.PathLike[str]) -> Path:
    """`path` where nothing is there yet, else the first of name-0001.ext, name-0002.ext, ... that is free."""
    path = Path(path)
    number = 0
    candidate = path
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.stem}-{number:0{_DIGITS}d}{path.suffix}")
    return candidate


def first_free_number(folder: Path, stem: str, suffix: str) -> int:
    """The number after the highest among the folder's files stem-N.suffix; 0 where there is none."""
    pattern = re.compile(re.escape(stem) + r"-(\d+)" + re.escape(suffix))
    numbers = [int(match[1]) for name in os.listdir(folder) if (match := pattern.fullmatch(name))]
    return max(numbers, default=-1) + 1


def write_file(path: str | os.PathLike[str], content: bytes, *, overwrite: bool = False) -> Path:
    """Write `content` to `path` in one step, making its folder where needed; returns the path it was written
    to.

    Without `overwrite` a taken name is kept and the file gets a number (see `free_path`), also where another
    process takes the name at the same moment. Raises OSError where the folder cannot be written or the disk
    is full; then nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; pictures get the rights any new file of this user gets.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        if overwrite:
            os.replace(temporary, path)
            return path
        return _publish(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _publish(temporary: str, path: Path) -> Path:
    while True:
        target = free_path(path)
        try:
            # Unlike a rename, a hard link fails where the name has been taken meanwhile.
            os.link(temporary, target)
        except FileExistsError:
            continue
        except OSError:
            # File systems without hard links (FAT, some network shares).
            os.replace(temporary, target)
            return target
        os.unlink(temporary)
        return target
