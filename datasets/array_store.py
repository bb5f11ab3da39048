"""Rows of arrays packed into NumPy files that are mapped into memory, with a record of every source they came from.

A folder holds of each shard a file per column, ``surface-00000.npy`` (rows, ...), and ``records-00000.json``: a record
of each source that was looked at, whether it became a row or was refused. ``index.json`` holds settings, columns, and
each shard's numbers of rows and sources.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ShardError, listed
from .files import replace_file

INDEX, RECORDS, VERSION = "index.json", "records", 1
_NAME = re.compile(r"[a-z]+-\d{5,}\.(npy|json)")
Row = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Column:
    """Attributes:

    dtype: NumPy's name, such as "int16".
    shape: of one row.
    """

    dtype: str
    shape: tuple[int, ...]


class ArrayStoreWriter:
    """Writes a folder so that a run killed at any moment loses at most the shard it was filling.

    Args:
        kind: what the rows are; a reader asks for it.
        settings: JSON values that say how they were made; a folder begun with other settings is refused.
        columns: by name, lower-case letters.
        shard_size: sources in a shard.

    Raises:
        ShardError: the folder was begun with other settings or columns, or is damaged. OSError.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        kind: str,
        settings: Mapping[str, Any],
        columns: Mapping[str, Column],
        shard_size: int = 64,
    ) -> None:
        if shard_size < 1 or not columns or not all(re.fullmatch("[a-z]+", name) for name in columns):
            raise ValueError(
                f"shards of {shard_size} with columns {list(columns)}; expected 1 or more, and plain names"
            )
        self.folder, self.columns, self.shard_size = Path(folder), dict(columns), shard_size
        described = {name: [np.dtype(c.dtype).name, list(c.shape)] for name, c in columns.items()}
        self._index: dict[str, Any] = {
            "format": kind,
            "version": VERSION,
            "settings": json.loads(json.dumps(dict(settings))),
            "columns": described,
            "complete": False,
            "shards": [],
        }
        self._rows: list[Row] = []
        self._records: list[dict[str, Any]] = []
        self.done: list[dict[str, Any]] = []
        """Records of the sources in complete shards; the caller goes on with others."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / INDEX).exists():
            self._continue(kind)
        shards = range(len(self._index["shards"]))
        kept = {f"{name}-{number:05d}.npy" for name in columns for number in shards}
        kept |= {f"{RECORDS}-{number:05d}.json" for number in shards}
        for path in self.folder.iterdir():  # what a killed run has left
            unfinished = path.name.startswith(".") and path.name.endswith(".tmp")
            if unfinished or (_NAME.fullmatch(path.name) and path.name not in kept):
                path.unlink()

    def _continue(self, kind: str) -> None:
        before, mine = read_index(self.folder, kind), self._index
        if before["settings"] != mine["settings"] or before["columns"] != mine["columns"]:
            old, new = ({**index["settings"], "columns": index["columns"]} for index in (before, mine))
            other = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
            raise ShardError(
                f"{self.folder} was begun with another {', '.join(other)}: choose another folder, or remove this one"
            )
        _check_files(self.folder, before)
        self._index["shards"] = before["shards"]
        self.done = read_records(self.folder, before)

    def write(self, record: Mapping[str, Any], row: Row | None) -> None:
        """Add a source: its record, and its row, or None where it was refused.

        Raises:
            ValueError: a column is missing, or has another shape or type.
        """
        if row is not None:
            found = {name: (np.dtype(value.dtype).name, value.shape) for name, value in row.items()}
            wanted = {name: (np.dtype(c.dtype).name, c.shape) for name, c in self.columns.items()}
            if found != wanted:
                raise ValueError(f"a row has {found}, expected {wanted}")
            self._rows.append(row)
        self._records.append({**record, "row": row is not None})
        if len(self._records) == self.shard_size:
            self._flush()

    def finish(self) -> None:
        """Write the last shard and mark the folder as complete."""
        self._index["complete"] = True
        self._flush()

    def _flush(self) -> None:
        if self._records:
            number = len(self._index["shards"])
            for name, column in self.columns.items():
                values = [row[name] for row in self._rows]
                buffer = io.BytesIO()
                stacked = np.stack(values) if values else np.zeros((0, *column.shape), column.dtype)
                np.save(buffer, stacked, allow_pickle=False)
                replace_file(self.folder / f"{name}-{number:05d}.npy", buffer.getvalue())
            text = "[\n" + ",\n".join(json.dumps(record) for record in self._records) + "\n]\n"
            replace_file(self.folder / f"{RECORDS}-{number:05d}.json", text.encode())
            self._index["shards"].append({"rows": len(self._rows), "sources": len(self._records)})
            self.done += self._records
        # Last: a shard counts only once the index speaks of it.
        replace_file(self.folder / INDEX, json.dumps(self._index, indent=1).encode())
        self._rows, self._records = [], []


def read_index(folder: Path, kind: str) -> dict[str, Any]:
    """What ``index.json`` holds.

    Raises:
        ShardError: there is none, or it is damaged or of another kind.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
        good = (
            index["format"] == kind
            and index["version"] == VERSION
            and isinstance(index["settings"], dict)
            and all(
                isinstance(np.dtype(dtype).name, str) and shape is not None
                for dtype, shape in index["columns"].values()
            )
            and all(0 <= shard["rows"] <= shard["sources"] for shard in index["shards"])
        )
    except FileNotFoundError:
        raise ShardError(f"{folder} holds no {INDEX}: it is no folder of {kind}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise ShardError(f"{path} is damaged, or not of {kind}: prepare the data again in another folder")
    return dict(index)


def read_records(folder: Path, index: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of all sources, in order.

    Raises:
        ShardError: a file of them is missing or damaged.
    """
    records: list[dict[str, Any]] = []
    for number, shard in enumerate(index["shards"]):
        path = folder / f"{RECORDS}-{number:05d}.json"
        try:
            found = json.loads(path.read_bytes())
            good = len(found) == shard["sources"] and sum(bool(record["row"]) for record in found) == shard["rows"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good:
            raise ShardError(f"{path} is missing or damaged: copy it again, or prepare the data again")
        records += found
    return records


def _check_files(folder: Path, index: Mapping[str, Any]) -> None:
    wrong = []
    for number in range(len(index["shards"])):
        for name in index["columns"]:
            try:
                _open_column(folder, index, name, number)
            except (OSError, ValueError) as error:
                wrong.append(f"{name}-{number:05d}.npy ({error})")
    if wrong:
        raise ShardError(f"{folder} is damaged: {listed(wrong)}. Copy it again, or prepare the data again.")


def _open_column(folder: Path, index: Mapping[str, Any], name: str, number: int) -> np.ndarray:
    dtype, shape = index["columns"][name]
    rows = index["shards"][number]["rows"]
    # Of nothing there is no map.
    mode: Any = "r" if rows and np.prod(shape) else None
    array: np.ndarray = np.load(folder / f"{name}-{number:05d}.npy", mmap_mode=mode, allow_pickle=False)
    if array.shape != (rows, *shape) or array.dtype != np.dtype(dtype):
        raise ValueError(f"holds {array.dtype} {array.shape} instead of {dtype} {(rows, *shape)}")
    return array


class ArrayStore:
    """Reads such a folder.

    Attributes:
        settings: the writer's. records: of the sources that became rows, in the rows' order. refused: of the others.

    Raises:
        ShardError: the folder is not complete, or damaged; all damaged files are named.
    """

    def __init__(self, folder: str | os.PathLike[str], kind: str) -> None:
        self.folder = Path(folder)
        self._index = read_index(self.folder, kind)
        _check_files(self.folder, self._index)
        if not self._index["complete"]:
            sources = sum(shard["sources"] for shard in self._index["shards"])
            raise ShardError(
                f"{folder} is not complete ({sources} sources are done): run what was writing it again, which continues"
            )
        everything = read_records(self.folder, self._index)
        self.records = [record for record in everything if record["row"]]
        self.refused = [record for record in everything if not record["row"]]
        self.settings: dict[str, Any] = self._index["settings"]
        self.columns = {name: Column(dtype, tuple(shape)) for name, (dtype, shape) in self._index["columns"].items()}
        self._firsts = np.cumsum([0, *(shard["rows"] for shard in self._index["shards"])])
        self._open: dict[tuple[str, int], np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def row(self, name: str, number: int) -> np.ndarray:
        """One row of a column, as it lies in the file: copy what is to be changed."""
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        shard = int(np.searchsorted(self._firsts, number, "right")) - 1
        if (name, shard) not in self._open:
            self._open[name, shard] = _open_column(self.folder, self._index, name, shard)
        found: np.ndarray = self._open[name, shard][number - self._firsts[shard]]
        return found

    def rows(self, name: str, numbers: Sequence[int]) -> np.ndarray:
        """Rows of a column (n, ...)."""
        return np.stack([self.row(name, int(number)) for number in numbers])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a pickled map would carry all it maps


def is_store(folder: str | os.PathLike[str], kind: str) -> bool:
    """Whether a folder is one of packed rows of this kind."""
    try:
        return json.loads((Path(folder) / INDEX).read_bytes())["format"] == kind
    except (OSError, ValueError, KeyError, TypeError):
        return False
