"""Where objects come from: the procedural ones, folders of files, ShapeNet, Objaverse."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .errors import SourceError
from .objects_procedural import CLASSES, VERSION, make_object
from .shapes_files import SUFFIXES, Axis, Mesh, read_mesh


@dataclass(frozen=True)
class Item:
    """Attributes:

    name: of the object, one of its kind in the source.
    category: its class; None: it has none.
    stamp: changes where the object does.
    """

    name: str
    category: str | None
    stamp: str


class Source(Protocol):
    """Objects that can be made or read one by one, in any process.

    Attributes:
        items: in order. classes: names of all classes, in the order of their numbers. settings: JSON values.
    """

    @property
    def items(self) -> Sequence[Item]: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    def mesh(self, number: int) -> Mesh:
        """One object, z up, of any size. Raises MeshError with the reason, or OSError."""
        ...


@dataclass(frozen=True)
class Procedural:
    """Objects of :mod:`.objects_procedural`, the classes in turn."""

    number: int
    seed: int = 0
    classes: tuple[str, ...] = CLASSES

    def __post_init__(self) -> None:
        if self.number < 1 or self.seed < 0 or not self.classes:
            raise ValueError(f"{self.number} objects of {len(self.classes)} classes, seed {self.seed}; expected some")
        if unknown := [name for name in self.classes if name not in CLASSES]:
            raise ValueError(f"there is no class {', '.join(unknown)}; choose among {', '.join(CLASSES)}")

    @property
    def items(self) -> Sequence[Item]:
        names = self.classes
        return [Item(f"{names[i % len(names)]}-{i:06d}", names[i % len(names)], "") for i in range(self.number)]

    @property
    def settings(self) -> dict[str, Any]:
        return {"source": "procedural", "version": VERSION, "seed": self.seed}

    def mesh(self, number: int) -> Mesh:
        return make_object(self.seed, number, self.classes)[0]


@dataclass(frozen=True)
class Files:
    """Files of meshes and clouds of points.

    Attributes:
        root: folder. paths: of the files, relative to it. categories: of each.
        up: axis that is up in all of them; None: as is usual for their kinds.
    """

    root: Path
    paths: tuple[str, ...] = field(repr=False)
    categories: tuple[str | None, ...] = field(repr=False)
    up: Axis | None = None

    @property
    def items(self) -> Sequence[Item]:
        found = []
        for path, category in zip(self.paths, self.categories, strict=True):
            stat = (self.root / path).stat()
            found.append(Item(path, category, f"{stat.st_size}-{stat.st_mtime_ns}"))
        return found

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(sorted({name for name in self.categories if name is not None}))

    @property
    def settings(self) -> dict[str, Any]:
        return {"source": "files", "up": self.up}

    def mesh(self, number: int) -> Mesh:
        return read_mesh(self.root / self.paths[number], self.up)


def open_source(
    source: str | Path,
    *,
    number: int | None = None,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    split: str | None = None,
    up: Axis | None = None,
) -> Source:
    """The source of a name or folder.

    ``procedural``; or a folder: of ShapeNet (``SYNSET/MODEL/models/model_normalized.obj``, or SYNSET folders of files,
    with ``SYNSET/train.lst`` and so on), of Objaverse (``object-paths.json.gz``, or ``glbs/000-000/UID.glb``), or any
    other, whose first level of folders names the classes.

    Args:
        number: of procedural objects (1000), or only the first files. seed: of procedural objects.
        classes: only these. split: of ShapeNet's lists: train, val or test.

    Raises:
        SourceError: it is none of these, or holds no mesh.
    """
    if str(source) == "procedural":
        chosen = CLASSES if classes is None else tuple(classes)
        return Procedural(1000 if number is None else number, seed, chosen)
    root = Path(source)
    if root.is_file():
        return Files(root.parent, (root.name,), (None,), up)
    if not root.is_dir():
        raise SourceError(f"{root}: no such folder; give one that holds meshes, or `procedural`")
    rows = _rows(root, split)
    if classes is not None:
        known = {category for _, category in rows}
        if unknown := [name for name in classes if name not in known]:
            raise SourceError(
                f"{root} has no class {', '.join(unknown)}; it has {', '.join(sorted(filter(None, known)))}"
            )
        rows = [row for row in rows if row[1] in classes]
    rows = rows[:number]
    if not rows:
        raise SourceError(f"{root} holds no mesh of the kinds {', '.join(SUFFIXES)}")
    return Files(root, tuple(path for path, _ in rows), tuple(category for _, category in rows), up)


_SYNSET = re.compile(r"0\d{7}")


def _rows(root: Path, split: str | None) -> list[tuple[str, str | None]]:
    """(path, category) of a folder's files, sorted."""
    listed = _objaverse(root)
    if listed is not None:
        return listed
    paths = sorted(
        path.relative_to(root)
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )
    if any(_SYNSET.fullmatch(path.parts[0]) for path in paths):
        names = _synset_names(root)
        kept = {synset: _list(root / synset, split) for synset in {path.parts[0] for path in paths}} if split else {}
        rows: list[tuple[str, str | None]] = []
        for path in paths:
            synset = path.parts[0]
            model = path.parts[1] if len(path.parts) > 2 else path.stem
            if _SYNSET.fullmatch(synset) and (split is None or model in kept[synset]):
                rows.append((path.as_posix(), names.get(synset, synset)))
        return rows
    if split is not None:
        raise SourceError(f"{root} has no splits: only ShapeNet's lists (SYNSET/{split}.lst) give some")
    if paths and all(path.parts[0] == "glbs" for path in paths):
        return [(path.as_posix(), None) for path in paths]
    return [(path.as_posix(), path.parts[0] if len(path.parts) > 1 else None) for path in paths]


def _list(folder: Path, split: str) -> set[str]:
    path = folder / f"{split}.lst"
    if not path.is_file():
        raise SourceError(f"{path} is not there; it lists the models of the split, one a line")
    return {line.strip().split("/")[-1] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()}


def _synset_names(root: Path) -> Mapping[str, str]:
    """ShapeNet's names of classes, from its ``taxonomy.json`` where it is there: the first word of each."""
    try:
        rows = json.loads((root / "taxonomy.json").read_text(encoding="utf-8"))
        return {str(row["synsetId"]): str(row["name"]).split(",")[0].strip() for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _objaverse(root: Path) -> list[tuple[str, str | None]] | None:
    """Files by Objaverse's ``object-paths.json.gz``, those that are there; classes by ``lvis-annotations.json.gz``."""
    import gzip

    table = root / "object-paths.json.gz"
    if not table.is_file():
        return None
    try:
        paths = json.loads(gzip.decompress(table.read_bytes()))
        named = root / "lvis-annotations.json.gz"
        groups = json.loads(gzip.decompress(named.read_bytes())) if named.is_file() else {}
        category = {uid: str(name) for name, uids in groups.items() for uid in uids}
        places = sorted((str(path), category.get(uid)) for uid, path in paths.items())
    except (OSError, EOFError, ValueError, AttributeError, TypeError) as error:
        raise SourceError(f"{table} is damaged ({error})") from None
    inside = [row for row in places if (root / row[0]).resolve().is_relative_to(root.resolve())]
    return [row for row in inside if (root / row[0]).is_file()]
