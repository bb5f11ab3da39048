"""Files that are there whole or not at all."""

import os
from pathlib import Path


def temporary(path: Path) -> Path:
    """A name beside `path`, in the same folder so that it can be renamed to it, one for each process."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def replace_file(path: Path, data: bytes) -> None:
    """Write a file by way of a temporary one. Raises OSError naming the file; nothing has changed then."""
    unfinished = temporary(path)
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror} while writing {len(data)} bytes", str(path)) from error
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
