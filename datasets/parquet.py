"""Parquet files with an image column, as Hugging Face's datasets are published."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import ShardError, SourceError, listed
from .packing import Memory, Pack
from .shards import LABEL_KEYS, NO_LABEL, PARQUET_IMAGES, Index

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_ROWS = 256  # read at a time


def class_names(path: Path) -> tuple[str, ...] | None:
    """Names of the classes, where the file carries them (Hugging Face's ClassLabel)."""
    file = _open(path)
    schema = file.schema_arrow
    column = next((name for name in LABEL_KEYS if name in schema.names), None)
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(str(name) for name in names)


def parquet_index(path: Path, memory: Memory) -> Index:
    """Unpack the images of a file. Raises ShardError (damaged) and SourceError (no image column)."""
    import pyarrow

    file = _open(path)
    columns = file.schema_arrow.names
    image = next((name for name in PARQUET_IMAGES if name in columns), None)
    if image is None:
        raise SourceError(
            f"{path} has no image column: looked for {listed(PARQUET_IMAGES)}, found {listed(columns) or 'none'}"
        )
    label = next((name for name in LABEL_KEYS if name in columns), None)
    pack = Pack(path, memory)
    index = Index(b"")
    try:
        for batch in file.iter_batches(_ROWS, columns=[image] if label is None else [image, label]):
            values = batch.column(image).to_pylist()
            labels = [NO_LABEL] * len(values) if label is None else batch.column(label).to_pylist()
            for value, given in zip(values, labels, strict=True):
                row = len(index.names)
                data = _bytes(path, row, value)
                index.add(f"{path.stem}/{row:08d}", _text(given), pack.append(data), len(data))
        index.blob = pack.finish(np.array(index.offsets), np.array(index.sizes), index.names, index.labels)
        return index
    except BaseException as error:
        pack.discard()
        if isinstance(error, pyarrow.ArrowException | OSError) and not isinstance(error, MemoryError):
            raise ShardError(
                f"{path} is damaged: {error}. {len(index.names)} of {file.metadata.num_rows} samples are "
                "readable. Fetch or write it again, or leave it out."
            ) from error
        raise


def _open(path: Path) -> "ParquetFile":
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise SourceError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        return ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ShardError(
            f"{path} is truncated or no parquet file: {error}. Nothing in it is readable. "
            "Fetch or write it again, or leave it out."
        ) from error


def _bytes(path: Path, row: int, value: object) -> bytes:
    if isinstance(value, dict) and "bytes" in value:
        if value["bytes"] is None and value.get("path"):
            raise SourceError(
                f"{path}, row {row}: the image is not in the file, which only names {value['path']!r}; "
                "write it with the images embedded, or point at the folder that holds them"
            )
        value = value["bytes"]
    if value is None:
        return b""  # unreadable when its turn comes: skipped, counted and named like a damaged image
    if not isinstance(value, bytes):
        raise SourceError(f"{path}, row {row}: the image is {type(value).__name__}, not the bytes of an image file")
    return value


def _text(value: object) -> str:
    return str(value).strip() if isinstance(value, int | str) and not isinstance(value, bool) else NO_LABEL
