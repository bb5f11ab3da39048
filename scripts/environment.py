"""Prints what the running environment was made from; exits with 1 where files of a package are gone.

Two lines: a digest of the interpreter and of the project's folder (an environment's scripts name both), and
one of the package list. A package is whole when pip finished it (the list of its files is written last) and
what that list names is there. Only the first two parts of each path are looked at: 0.2 s for all.
"""

import csv
import hashlib
import sys
from importlib.metadata import distributions
from pathlib import Path


def missing_parts() -> list[str]:
    """Names what pip recorded and what is no longer there, or the package whose record is gone."""
    missing = []
    for distribution in distributions():
        record = distribution.read_text("RECORD")
        if record is None:
            missing.append(f"{distribution.name}: RECORD")
            continue
        parts = {"/".join(row[0].split("/")[:2]) for row in csv.reader(record.splitlines())}
        missing += [
            part
            for part in parts
            # Scripts lie outside; caches may be cleaned away.
            if not part.startswith("../")
            and "__pycache__" not in part
            and not Path(str(distribution.locate_file(part))).exists()
        ]
    return missing


def digest(*parts: bytes) -> str:
    """SHA-256 of the parts, which are kept apart by a zero byte."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


if __name__ == "__main__":
    if missing := missing_parts():
        sys.exit(f"missing: {', '.join(sorted(missing)[:5])}")
    print(digest(sys.version.encode(), str(Path.cwd()).encode()))
    print(digest(Path("pyproject.toml").read_bytes()))
