"""Webdataset and parquet shards: an index of their images and labels."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .blobs import BlobStore, Names
from .errors import DatasetError, LabelError, ShardError, listed
from .packing import Memory, Pack, cached
from .tarfiles import Member, Stream, TarDamage, members

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
PARQUET_IMAGES = ("image", "img", *IMAGE_KEYS)
LABEL_KEYS = ("label", "cls")
NO_LABEL = ""

Side = tuple[tuple[str, ...], Callable[[str, bytes], str]]
"""Files that are read beside images, by extension, and how: the text in such a file, empty where it has none."""

_REMEDY = "Fetch or write it again, or leave it out."


@dataclass
class Index:
    """The samples of one or more shards. A label is text: a number, a class name, or NO_LABEL."""

    blob: bytes | Path
    names: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, name: str, label: str, offset: int, size: int) -> None:
        self.names.append(name)
        self.labels.append(label)
        self.offsets.append(offset)
        self.sizes.append(size)


def open_shards(
    paths: list[Path], kind: str, *, labels: bool = True
) -> tuple[BlobStore, Names, list[str], tuple[str, ...] | None]:
    """(images, names, labels as text, class names if the files give them) of all shards of one kind.

    `kind` is `tar` or `parquet`. Class names are looked for only with `labels`. Raises ShardError with what
    is wrong in any of the shards, and LabelError where shards name their classes differently.
    """
    memory = Memory()
    indexes: list[Index] = []
    broken: list[str] = []
    classes: dict[tuple[str, ...], Path] = {}
    for path in paths:
        try:
            if kind == "parquet":
                from .parquet import class_names, parquet_index

                if labels and (given := class_names(path)) is not None:
                    classes.setdefault(given, path)
                indexes.append(_from_cache(path) or parquet_index(path, memory))
            elif path.name.endswith(".tar"):
                indexes.append(_plain(path))
            else:
                indexes.append(_from_cache(path) or _compressed(path, memory))
        except ShardError as error:
            broken.append(str(error))
    if broken:
        raise ShardError("\n".join(broken))
    if len(classes) > 1:
        raise LabelError(f"shards disagree on the names of the classes: {listed(list(classes.values()))}")
    counts = [len(index.names) for index in indexes]
    store = BlobStore(
        [index.blob for index in indexes],
        np.repeat(np.arange(len(indexes), dtype=np.int32), counts),
        np.array([offset for index in indexes for offset in index.offsets], np.int64),
        np.array([size for index in indexes for size in index.sizes], np.int64),
    )
    names = Names(name for index in indexes for name in index.names)
    return store, names, [label for index in indexes for label in index.labels], next(iter(classes), None)


def _from_cache(path: Path) -> Index | None:
    found = cached(path)
    if found is None:
        return None
    blob, offsets, sizes, names, labels = found
    every = range(len(names))
    return Index(blob, [names[i] for i in every], [labels[i] for i in every], offsets.tolist(), sizes.tolist())


def _plain(path: Path) -> Index:
    """A .tar file serves as it is: the index points into it."""
    index = Index(path)
    total = path.stat().st_size
    with path.open("rb") as file:
        for name, label, offset, size, _ in samples_in(path, file, total):
            index.add(name, label, offset, size)
    return index


def _compressed(path: Path, memory: Memory) -> Index:
    pack = Pack(path, memory)
    try:
        index = Index(b"")
        with gzip.open(path, "rb") as file:
            for name, label, _, size, image in samples_in(path, file, None):
                index.add(name, label, pack.append(image), size)
            try:
                while file.read(2**20):  # to the end, where the checksum is
                    pass
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ShardError(f"{path} is damaged: {error}. {_REMEDY}") from error
        index.blob = pack.finish(np.array(index.offsets), np.array(index.sizes), index.names, index.labels)
        return index
    except BaseException:
        pack.discard()
        raise


def captions_in(path: Path, side: Side) -> list[str]:
    """The text of each sample of a tar shard, in the order of `open_shards`; empty where it has none."""
    if path.name.endswith(".tar"):
        with path.open("rb") as plain:
            return [text for _, text, *_ in samples_in(path, plain, path.stat().st_size, side)]
    with gzip.open(path, "rb") as packed:
        return [text for _, text, *_ in samples_in(path, packed, None, side)]


def samples_in(
    path: Path | str, file: Stream, total: int | None, side: Side | None = None, first: int = 0
) -> Iterator[tuple[str, str, int, int, bytes]]:
    """(name, label, offset, size, image bytes unless `total` is known) of each sample of a tar stream.

    The files of a sample follow each other and share their name up to the first dot (the webdataset
    convention). Labels that stand apart from their images are refused: they would be lost without a word.
    `path`: for messages. `side`: what is read beside the images instead of labels. `first`: the image bytes of the
    samples before this one are not read.
    """
    extensions, read = side or LABELS
    key: str | None = None
    image: tuple[int, int, bytes] | None = None
    label = NO_LABEL
    count = 0
    last = ""
    alone: list[str] = []  # labels without an image
    try:
        for member in members(file):
            folder, _, base = member.name.replace("\\", "/").rpartition("/")
            stem, _, extension = base.partition(".")
            if not stem:  # `.DS_Store`, `._image.jpg` and the like
                continue
            if (name := f"{folder}/{stem}") != key:
                if key is not None and image is not None:
                    count, last = count + 1, key
                    yield _safe(key), label, *image
                elif key is not None and label != NO_LABEL:
                    alone.append(_safe(key))
                key, image, label = name, None, NO_LABEL
            extension = extension.lower()
            if total is not None and member.offset + member.size > total:
                raise TarDamage(f"it ends at byte {total}, inside {member.name}")
            if extension in IMAGE_KEYS:
                if image is not None:
                    raise DatasetError(f"{path}: sample {_safe(key)} has two images; leave one of them out")
                unread = total is not None or count < first
                image = (member.offset, member.size, b"" if unread else _read(file, member))
            elif extension in extensions:
                label = read(extension, _read(file, member)) or label
        if key is not None and image is not None:
            yield _safe(key), label, *image
        elif key is not None and label != NO_LABEL:
            alone.append(_safe(key))
    except (TarDamage, EOFError, zlib.error, gzip.BadGzipFile) as error:
        if image is not None and key is not None:  # came whole, only what follows it did not
            count, last = count + 1, key
        at = f", up to {_safe(last)}" if last else ""
        raise ShardError(
            f"{path} is truncated or damaged: {error}. {count} samples are readable{at}. {_REMEDY}"
        ) from error
    if alone:
        raise ShardError(
            f"{path}: {len(alone)} labels have no image beside them: {listed(alone)}. "
            "The files of a sample must follow each other (tar --sort=name)."
        )


def _read(file: Stream, member: Member) -> bytes:
    file.seek(member.offset)
    data = file.read(member.size)
    if len(data) < member.size:
        raise TarDamage(f"it ends inside {member.name}")
    return data


def _label(extension: str, data: bytes) -> str:
    """Label as text; NO_LABEL where the side file has none that makes sense, to be reported with the rest."""
    if extension == "cls":
        return data.decode("utf-8", "replace").strip()
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return NO_LABEL
    value = next((fields[name] for name in LABEL_KEYS if name in fields), None) if isinstance(fields, dict) else None
    return str(value).strip() if isinstance(value, int | str) and not isinstance(value, bool) else NO_LABEL


LABELS: Side = (("cls", "json"), _label)
"""The class of a sample."""


def _safe(key: str) -> str:
    """A sample's name that is a harmless relative path, whatever the archive says."""
    return "/".join(part for part in key.split("/") if part not in ("", ".", ".."))
