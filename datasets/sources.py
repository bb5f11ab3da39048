"""What a data source is: a folder of images or of classes, lists of images, webdataset shards, parquet files."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .caption_lists import read_caption_lists
from .errors import EmptyClassError, NoImagesError, SourceError, listed

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
LIST_SUFFIX = ".jsonl"
_KIND_NAMES = {"image": "images", "tar": "tar shards", "parquet": "parquet files", "list": "lists"}
_SPLITS = ("train", "training", "val", "validation", "valid", "dev", "test")


@dataclass(frozen=True)
class Source:
    """What was found. Images are relative to `root`; `labels` has their classes where folders are classes; `lists` are
    the files that named them, if any did."""

    kind: str  # "image", "tar" or "parquet"
    root: Path
    files: list[str]
    labels: list[int] | None = None
    classes: tuple[str, ...] | None = None
    lists: tuple[str, ...] = ()


def find(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, labels: bool) -> Source:
    """Recognise a source: a folder, a file, a pattern with `{a..b}`, `{x,y}`, `*`, or a list of files.

    Raises SourceError (missing, or a mixture of kinds), NoImagesError, EmptyClassError.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            return _folder(path, labels)
        sources: Sequence[str | os.PathLike[str]] = [source]
    else:
        sources = source
    files = _files([os.fspath(item) for item in sources])
    if not files:
        raise NoImagesError("the list of sources is empty: name a folder, or at least one file")
    kinds = Counter(_kind(name) or "" for name in files)
    if "" in kinds:
        raise SourceError(
            f"neither an image, a list, a tar nor a parquet file: {listed([f for f in files if not _kind(f)])}"
        )
    if len(kinds) > 1:
        raise _mixture(f"{len(files)} files", kinds)
    if "list" in kinds:
        return _listed_images(files)
    if "image" not in kinds:
        return Source(next(iter(kinds)), Path(), files)
    return _image_files(files)


def _image_files(files: Sequence[str | Path], lists: tuple[str, ...] = ()) -> Source:
    whole = [os.path.abspath(name) for name in files]
    root = os.path.commonpath([os.path.dirname(name) for name in whole])
    return Source("image", Path(root), [os.path.relpath(name, root) for name in whole], lists=lists)


def _listed_images(lists: list[str]) -> Source:
    images = read_caption_lists(lists)
    if not images:
        raise NoImagesError(f"no image is named in {listed(lists)}")
    return _image_files([image.path for image in images], tuple(lists))


def expand_braces(pattern: str) -> list[str]:
    """`a{0..2}` -> a0 a1 a2 (padded if a bound is), `a{x,y}` -> ax ay; several are multiplied out."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    if match[3] is not None:
        choices = match[3].split(",")
    else:
        first, last = int(match[1]), int(match[2])
        padded = match[1].startswith("0") or match[2].startswith("0")
        width = max(len(match[1]), len(match[2])) if padded else 0
        step = 1 if last >= first else -1
        choices = [str(number).zfill(width) for number in range(first, last + step, step)]
    head, tail = pattern[: match.start()], expand_braces(pattern[match.end() :])
    return [head + choice + rest for choice in choices for rest in tail]


def _files(patterns: list[str]) -> list[str]:
    files: list[str] = []
    missing: list[str] = []
    folders: list[str] = []
    for pattern in patterns:
        for name in [pattern] if os.path.exists(pattern) else expand_braces(pattern):
            if os.path.isdir(name):
                folders.append(name)
            elif os.path.exists(name):
                files.append(name)
            elif found := sorted(glob.glob(name)):
                files.extend(found)
            else:
                missing.append(name)
    if missing:
        raise SourceError(f"nothing is there under this name: {listed(missing)}")
    if folders:
        raise SourceError(f"a folder cannot be part of a list of files: {listed(folders)}. Name the folder alone.")
    if twice := [name for name, count in Counter(files).items() if count > 1]:
        raise SourceError(f"named more than once: {listed(twice)}")
    return files


def _kind(name: str) -> str | None:
    name = name.lower()
    if name.endswith(IMAGE_SUFFIXES):
        return "image"
    if name.endswith(TAR_SUFFIXES):
        return "tar"
    if name.endswith(LIST_SUFFIX):
        return "list"
    return "parquet" if name.endswith(".parquet") else None


def _folder(root: Path, labels: bool) -> Source:
    entries = sorted((entry for entry in os.scandir(root) if not entry.name.startswith(".")), key=lambda e: e.name)
    folders = [entry.name for entry in entries if entry.is_dir()]
    files = [entry.name for entry in entries if entry.is_file()]
    kinds = Counter(kind for name in files if (kind := _kind(name)))
    lists = [str(root / name) for name in files if _kind(name) == "list"]
    del kinds["list"]  # beside images or shards they are notes
    if len(kinds) > 1:
        raise _mixture(str(root), kinds)
    kind = next(iter(kinds), None)
    if kind in ("tar", "parquet"):
        shards = [name for name in files if _kind(name) == kind]
        _one_split(root, kind, shards)
        return Source(kind, root, [str(root / name) for name in shards])

    below = {name: list(_walk(root, name, ())) for name in folders}
    inner = Counter(kind for names in below.values() for name in names if (kind := _kind(name)))
    del inner["list"]
    if lists and not kinds and not inner:
        return _listed_images(lists)
    if len(inner + kinds) > 1:
        raise _mixture(str(root), inner + kinds)
    if inner and "image" not in inner:
        holds = [name for name, names in below.items() if any(_kind(file) for file in names)]
        raise SourceError(
            f"{root} holds {_KIND_NAMES[next(iter(inner))]} only in folders below it: name one of {listed(holds)}"
        )
    images = {name: sorted(file for file in names if _kind(file) == "image") for name, names in below.items()}
    top = [name for name in files if _kind(name) == "image"]
    if not top and not any(images.values()):
        raise NoImagesError(
            f"{root} holds no image ({', '.join(IMAGE_SUFFIXES)}), tar or parquet shard, nor does any folder in it"
        )
    splits = [name for name in folders if name.lower() in _SPLITS]
    if len(splits) > 1 or (labels and not top and splits == folders):
        raise SourceError(f"{root} holds splits ({listed(splits)}), not classes: name one of them")
    if top or not labels:  # images beside the folders: the folders are no classes
        return Source("image", root, top + [file for name in folders for file in images[name]])
    if empty := [name for name in folders if not images[name]]:
        raise EmptyClassError(
            f"{root}: {len(empty)} of {len(folders)} class folders hold no image: {listed(empty)}. "
            "Remove them, or put their images in: class numbers follow the sorted folder names."
        )
    return Source(
        "image",
        root,
        [file for name in folders for file in images[name]],
        [number for number, name in enumerate(folders) for _ in images[name]],
        tuple(folders),
    )


def _walk(root: Path, folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Files below a folder, relative to root. Links are followed (data are often linked), not in circles."""
    stat = os.stat(root / folder)
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        return
    with os.scandir(root / folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{folder}/{entry.name}"
            if entry.is_dir():
                yield from _walk(root, name, (*above, here))
            elif _kind(entry.name) and entry.is_file():
                yield name


def _mixture(where: str, kinds: Counter[str]) -> SourceError:
    found = " and ".join(f"{count} {_KIND_NAMES[kind]}" for kind, count in sorted(kinds.items()))
    return SourceError(f"{where}: a mixture of {found}. Keep one kind, or name the files of one kind by a pattern.")


def _one_split(root: Path, kind: str, shards: list[str]) -> None:
    """Training on the test shards that lie beside the training shards would go unnoticed."""
    found = {match[0].lower(): name for name in shards if (match := re.match(r"[A-Za-z]+", name))}
    if len(splits := [split for split in _SPLITS if split in found]) > 1:
        suffix = ".parquet" if kind == "parquet" else ".tar*"
        raise SourceError(
            f"{root} holds the shards of several splits ({listed(splits)}): name one, as in {root}/{splits[0]}*{suffix}"
        )
