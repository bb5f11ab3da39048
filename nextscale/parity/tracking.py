"""A mapping that remembers which of its values were read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any


class Tracked(Mapping[str, Any]):
    """A read-only mapping that remembers what was read, nested mappings included.

    The replay uses it to prove that every option of a case took part: a value that nothing read is reported,
    instead of silently meaning nothing.

    Args:
        values: the mapping; mappings in it, also within lists, are tracked in turn.
        path: how error messages name this mapping, e.g. ``options``.
    """

    def __init__(self, values: Mapping[str, Any], path: str):
        self.path = path
        self._values = {key: _track(value, f"{path}.{key}") for key, value in values.items()}
        self._read: set[str] = set()
        self._ignored: list[str] = []

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise MissingValue(f"the case gives no {self.path}.{key}; it has: {', '.join(self._values) or 'none'}")
        self._read.add(key)
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values  # asking whether a value is there is not reading it

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self._values else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"{self.path}: {self._values!r}"

    def ignore(self, *globs: str) -> None:
        """Declare that values whose key matches one of ``globs`` cannot change this operation's outputs."""
        self._ignored.extend(globs)

    def unread(self) -> list[str]:
        """The paths of all values that were neither read nor declared irrelevant."""
        paths = []
        for key, value in self._values.items():
            if any(fnmatchcase(key, glob) for glob in self._ignored):
                continue
            if key not in self._read:
                paths.append(f"{self.path}.{key}")
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, Tracked):
                    paths += child.unread()
        return paths


class MissingValue(KeyError):
    """A value that an operation needs is not in the case."""

    def __str__(self) -> str:
        return str(self.args[0])


def _track(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        return Tracked(value, path)
    if isinstance(value, list):
        return [_track(item, f"{path}[{index}]") for index, item in enumerate(value)]
    return value
