"""Token shards: images that were tokenized once, so that training a transformer never runs the encoder.

A folder holds safetensors shards (`tokens` uint16 or int32, of continuous tokenizers float16, (N, L);
`label` int32 (N,), -1 without; `index` int64 (N,), the number of the source image) and `index.json`:
metadata, and of each shard its samples, bytes and SHA-256. Several rows with the same source index are
*views* of one image (flipped, other crops).
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from .draws import uniforms_of
from .errors import LabelError, TokenShardError, listed
from .files import replace_file
from .token_index import FORMAT, INDEX, SHARD_NAME, VERSION, check_contents, check_sizes, read_index


class TokenWriter:
    """Writes token shards so that a run killed at any moment loses at most the shard it was filling.

    `metadata` (JSON values) must have `vocabulary`, the number of codes, or `values`, "float16", where tokens are
    continuous; what else belongs to the tokens (schedule, tokenizer fingerprint, `classes`, views) is kept as
    it is. With `resume`, a folder that was begun with the same metadata is continued: `written` says how many
    samples are safe, and the caller goes on with the one after them. Without, what is in the folder is
    replaced.

    `close` writes the last, shorter shard and marks the folder complete. As a context manager it closes when
    the block ends well; after an exception complete shards stay, to be continued.

    Raises TokenShardError if the folder was begun with other metadata, ValueError for tokens out of range,
    OSError.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        metadata: dict[str, Any],
        shard_size: int = 65536,
        resume: bool = True,
    ) -> None:
        values = metadata.get("values")
        if values not in (None, "float16"):
            raise ValueError(f"metadata['values'] is {values!r}; continuous tokens are kept as float16")
        # Of continuous tokens there is none, and nothing reads it.
        vocabulary = metadata.get("vocabulary") if values is None else 1
        if not isinstance(vocabulary, int) or not 0 < vocabulary <= 2**31:
            raise ValueError(f"metadata['vocabulary'] is {vocabulary!r}; it must be the number of codes, 1 to 2**31")
        if shard_size < 1:
            raise ValueError(f"shard_size {shard_size} must be at least 1 sample")
        self.folder, self.vocabulary, self.shard_size = Path(folder), vocabulary, shard_size
        self._dtype = np.dtype(values or (np.uint16 if vocabulary <= 65536 else np.int32))
        # As they will read back, so that a tuple given for a list is no difference.
        self._index: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "metadata": _as_json(metadata),
            "dtype": self._dtype.name,
            "length": None,
            "complete": False,
            "shards": [],
        }
        self._rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._waiting = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / INDEX).exists():
            if resume:
                self._continue()
            else:
                (self.folder / INDEX).unlink()  # first: an index must never speak of shards that are gone
        kept = {shard["file"] for shard in self._index["shards"]}
        for path in self.folder.iterdir():  # what a killed or replaced run has left
            unfinished = path.name.startswith((f".{INDEX}.", ".tokens-")) and path.name.endswith(".tmp")
            if unfinished or (SHARD_NAME.fullmatch(path.name) and path.name not in kept):
                path.unlink()

    @property
    def written(self) -> int:
        """Samples in complete shards: those that survive a kill."""
        return sum(int(shard["samples"]) for shard in self._index["shards"])

    def write(self, tokens: Any, labels: Any, indices: Any) -> None:
        """Add samples: `tokens` (N, L), integers in [0, vocabulary) or numbers, `labels` (N,) and `indices` (N,)."""
        rows = _array(tokens), _array(labels), _array(indices)
        if rows[0].ndim != 2 or any(other.shape != rows[0].shape[:1] for other in rows[1:]):
            raise ValueError(
                f"tokens {rows[0].shape}, labels {rows[1].shape} and indices {rows[2].shape} must be (N, L), (N,), (N,)"
            )
        continuous = self._dtype.kind == "f"
        if any(array.dtype.kind not in ("f" if continuous and array is rows[0] else "iu") for array in rows):
            kind = "tokens must be floating-point numbers" if continuous else "tokens must be integers"
            raise ValueError(f"{kind}, labels and indices integers, not {[str(a.dtype) for a in rows]}")
        length = rows[0].shape[1]
        if self._index["length"] not in (None, length):
            raise ValueError(f"{length} tokens a sample, but {self._index['length']} in the samples before")
        if continuous and not np.abs(rows[0]).max(initial=0) <= np.finfo(self._dtype).max:
            raise ValueError(f"tokens reach from {rows[0].min()} to {rows[0].max()}, beyond what {self._dtype} holds")
        if not continuous and rows[0].size and not 0 <= rows[0].min() <= rows[0].max() < self.vocabulary:
            raise ValueError(
                f"tokens {rows[0].min()} to {rows[0].max()} leave the vocabulary 0 to {self.vocabulary - 1}"
            )
        self._index["length"] = length
        self._index["complete"] = False
        # Copies: the caller may reuse its buffers.
        self._rows.append((rows[0].astype(self._dtype), rows[1].astype(np.int32), rows[2].astype(np.int64)))
        self._waiting += len(rows[0])
        while self._waiting >= self.shard_size:
            self._flush(self.shard_size)

    def close(self) -> None:
        """Write what waits, and mark the folder complete."""
        if self._waiting:
            self._flush(self._waiting)
        self._index["complete"] = True
        self._write_index()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def _continue(self) -> None:
        before = read_index(self.folder)
        wanted = self._index["metadata"]
        if before["metadata"] != wanted:
            keys = sorted({*before["metadata"], *wanted})
            other = [key for key in keys if before["metadata"].get(key) != wanted.get(key)]
            raise TokenShardError(
                f"{self.folder} holds tokens made with another {', '.join(other)}: "
                "choose another folder, or start over (resume=False)"
            )
        check_sizes(self.folder, before)
        self._index = before

    def _flush(self, count: int) -> None:
        from safetensors.numpy import save

        columns = [np.concatenate(column) for column in zip(*self._rows, strict=True)]
        now, later = [column[:count] for column in columns], [column[count:] for column in columns]
        name = f"tokens-{len(self._index['shards']):05d}.safetensors"
        data = save({"tokens": now[0], "label": now[1], "index": now[2]})
        replace_file(self.folder / name, data)
        self._index["shards"].append(
            {"file": name, "samples": count, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        )
        self._write_index()
        self._rows = [(later[0], later[1], later[2])] if len(later[0]) else []
        self._waiting = len(later[0])

    def _write_index(self) -> None:
        replace_file(self.folder / INDEX, json.dumps(self._index, indent=1).encode())


def open_tokens(
    folder: str | os.PathLike[str], *, seed: int = 0, views: Sequence[int] | None = None, verify: bool = False
) -> "TokenDataset":
    """Open a folder that a TokenWriter has completed.

    `views`: which views of each image may be drawn, by their order of writing (default all; `[0]` for the
    first alone, as in validation). `verify` also reads every shard and compares its SHA-256; sizes are
    compared always. Raises TokenShardError.
    """
    folder = Path(folder)
    index = read_index(folder)
    check_sizes(folder, index)
    if verify:
        check_contents(folder, index)
    if not index["complete"]:
        safe = sum(shard["samples"] for shard in index["shards"])
        raise TokenShardError(
            f"{folder} is not complete ({safe} samples are there): run what was writing it again, which continues"
        )
    if not index["shards"]:
        raise TokenShardError(f"{folder} is complete and holds no sample: make the tokens again")
    return TokenDataset(folder, index, seed=seed, views=views)


class TokenDataset:
    """Map-style dataset over memory-mapped token shards, made by `open_tokens`; as long as there are images.

    A key is an image's place, or (epoch, place), 0 <= place < len; images are ordered by source index. Where
    an image has several views, (seed, epoch, place) decides which one is given. `dataset[key]` is a dict:
    `tokens` int64 (L,), or float32 where they are continuous, `label` int (-1 without), `index` int, the source
    image's number. `metadata` is the writer's.
    """

    def __init__(
        self, folder: Path, index: dict[str, Any], *, seed: int = 0, views: Sequence[int] | None = None
    ) -> None:
        self.folder, self.seed = folder, seed
        self.metadata: dict[str, Any] = index["metadata"]
        self.length: int = index["length"]
        self._files: list[Path] = [folder / shard["file"] for shard in index["shards"]]
        counts = [shard["samples"] for shard in index["shards"]]
        self._dtype = np.dtype(index["dtype"])
        self._first_rows = np.cumsum([0, *counts])
        self._places = [
            _places(path, count, self.length, self._dtype) for path, count in zip(self._files, counts, strict=True)
        ]
        self._maps: list[np.ndarray | None] = [None] * len(counts)
        labels = np.concatenate([self._column(shard, "label") for shard in range(len(counts))])
        sources = np.concatenate([self._column(shard, "index") for shard in range(len(counts))])
        # Rows sorted by image, views in the order of writing: image i has the rows _rows[_starts[i]:_starts[i
        # + 1]].
        self._rows = np.argsort(sources, kind="stable")
        self.sources, self._starts = np.unique(sources[self._rows], return_index=True)
        self._starts = np.append(self._starts, len(sources))
        if views is not None:
            self._keep(views)
        self._labels = labels
        self.labels: np.ndarray = labels[self._rows[self._starts[:-1]]].astype(np.int64)

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, if the writer knew them."""
        names = self.metadata.get("classes")
        return tuple(names) if isinstance(names, list) else None

    @property
    def num_classes(self) -> int:
        """Number of class names, else the largest label + 1."""
        return len(self.classes) if self.classes is not None else int(self.labels.max()) + 1

    def label_counts(self) -> np.ndarray:
        """int64 (num_classes,): images of each class."""
        return np.bincount(self.labels[self.labels >= 0], minlength=self.num_classes).astype(np.int64)

    def require_labels(self) -> Self:
        """Returns the dataset itself. Raises LabelError if images have no class."""
        if without := int((self.labels < 0).sum()):
            raise LabelError(
                f"{without} of {len(self)} images in {self.folder} have no class: make the tokens from labelled images"
            )
        return self

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        batch = self.fetch([key])
        return {
            "tokens": batch["tokens"][0],
            "label": int(batch["label"][0]),
            "index": int(batch["index"][0]),
        }

    def fetch(self, keys: Sequence[int | tuple[int, int]]) -> dict[str, Any]:
        """A batch at once: `tokens` int64 or float32 (B, L), `label` int64 (B,), `index` int64 (B,)."""
        import torch

        pairs = np.array([key if isinstance(key, tuple) else (0, key) for key in keys], np.int64).reshape(-1, 2)
        epochs, places = pairs.T
        if len(places) and not 0 <= places.min() <= places.max() < len(self):
            raise IndexError(f"image {places.min()} to {places.max()} of {len(self)}")
        first = self._starts[places]
        counts = self._starts[places + 1] - first
        if (counts > 1).any():
            drawn = uniforms_of(self.seed, epochs, places, 1)[:, 0]
            first = first + (drawn * counts).astype(np.int64)
        rows = self._rows[first]
        tokens = np.empty((len(rows), self.length), np.float32 if self._dtype.kind == "f" else np.int64)
        shards = np.searchsorted(self._first_rows, rows, "right") - 1
        several = len(rows) > 0 and bool((shards != shards[0]).any())
        for shard in np.unique(shards) if several else shards[:1]:
            of_shard = shards == shard if several else slice(None)
            tokens[of_shard] = self._tokens(shard)[rows[of_shard] - self._first_rows[shard]]
        return {
            "tokens": torch.from_numpy(tokens),
            "label": torch.from_numpy(self._labels[rows].astype(np.int64)),
            "index": torch.from_numpy(self.sources[places]),
        }

    def _keep(self, views: Sequence[int]) -> None:
        counts = np.diff(self._starts)
        if not len(views) or min(views) < 0 or (short := self.sources[counts <= max(views)]).size:
            few = "" if not len(views) or min(views) < 0 else f"; images with fewer: {listed(short.tolist())}"
            raise TokenShardError(f"views {list(views)} must be numbers from 0 to {counts.min() - 1}{few}")
        chosen = np.array(sorted(set(views)))
        self._rows = self._rows[(self._starts[:-1, None] + chosen).ravel()]
        self._starts = np.arange(len(self.sources) + 1) * len(chosen)

    def _tokens(self, shard: int) -> np.ndarray:
        mapped = self._maps[shard]
        if mapped is None:
            mapped = self._maps[shard] = self._column(shard, "tokens").view(np.ndarray)  # which is indexed faster
        return mapped

    def _column(self, shard: int, name: str) -> np.ndarray:
        dtype, shape, offset = self._places[shard][name]
        return np.memmap(self._files[shard], dtype, "r", offset, shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": [None] * len(self._maps)}  # a pickled map would carry all it maps


Place = tuple[np.dtype, tuple[int, ...], int]


def _places(path: Path, samples: int, length: int, dtype: np.dtype) -> dict[str, Place]:
    """Type, shape and place of each tensor in a safetensors file, checked against what it must hold.

    Read here because the library's own reader copies a tensor instead of mapping it.
    """
    size = path.stat().st_size
    wanted = {"tokens": (dtype, (samples, length)), "label": (np.dtype(np.int32), (samples,))}
    wanted["index"] = (np.dtype(np.int64), (samples,))
    codes = {np.dtype(np.uint16): "U16", np.dtype(np.int32): "I32", np.dtype(np.int64): "I64"}
    codes[np.dtype(np.float16)] = "F16"
    try:
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            if header_size > size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(header_size))
        places: dict[str, Place] = {}
        for name, (kind, shape) in wanted.items():
            entry = header[name]
            begin, end = entry["data_offsets"]
            bytes_needed = int(np.prod(shape)) * kind.itemsize
            if (
                (entry["dtype"], entry["shape"]) != (codes[kind], list(shape))
                or end - begin != bytes_needed
                or not 0 <= begin <= end <= size - 8 - header_size
            ):
                raise ValueError(f"{name} is {entry}, expected {kind} {shape}")
            places[name] = (kind, shape, 8 + header_size + begin)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TokenShardError(f"{path} is damaged ({error}). Copy it again, or make the tokens again.") from error
    return places


def _as_json(metadata: dict[str, Any]) -> Any:
    try:
        return json.loads(json.dumps(metadata))
    except TypeError as error:
        raise ValueError(f"metadata must consist of JSON values (text, numbers, lists, …): {error}") from error


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values)
