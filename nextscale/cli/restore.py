"""``nextscale restore``"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "restore.json"
"""In the output folder: what was restored from what, by which model."""

WORK = ".restoring"
"""In the output folder: tiles of photographs that are not finished."""


def add_arguments(parser: Any) -> None:
    from nextscale.cli.parsing import add_loading

    parser.add_argument("photos", type=str, nargs="+", help="image files, or folders of them; of any size")
    parser.add_argument(
        "--model", type=str | None, default=None, help="name, file or folder; unless named, the one that ships"
    )
    parser.add_argument(
        "--out",
        type=str,
        default="out/restored",
        help="folder for PNG files named like the photos; what is there is kept",
    )
    parser.add_argument(
        "--overlap", type=int | None, default=None, help="pixels that neighbouring tiles share; a quarter of a tile"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, help="tiles restored at once: memory and speed, nothing else"
    )
    add_loading(parser, needs=False, compress=False)


def run(arguments: Any) -> None:
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size is {arguments.batch_size}; expected 1 or more")
    photos, out = find_photos(arguments.photos), Path(arguments.out)
    import nextscale
    from nextscale.cli.console import note, say
    from nextscale.cli.parsing import loading_options
    from nextscale.core.checkpoint import fingerprint
    from nextscale.models import shipped

    source = arguments.model or shipped("restorer", "varformer")
    model = nextscale.load(source, **loading_options(arguments))
    if not hasattr(model, "restore"):
        raise ValueError(f"{source} is a {type(model).__name__}, which restores no photos; VarFormer does")
    overlap = model.side // 4 if arguments.overlap is None else arguments.overlap
    if not 0 <= overlap <= model.side // 2:
        raise ValueError(f"--overlap is {overlap}; expected 0 to {model.side // 2}, half a tile of {model.side}")
    owner = f"{fingerprint(model.state_dict())} {model.config} {model.dtype} {overlap}"
    record, failed = Record(out / RECORD), list[str]()
    for name, path in photos:
        key = record.key(path, owner)
        if (made := record.made(name, key)) is not None:
            note(f"{path}: restored before, {made}")
            continue
        try:
            written, told = restore_one(model, path, name, out, f"{owner} {key}", overlap, arguments.batch_size)
        except ValueError as error:
            failed.append(str(error))
            note(f"passed over {error}")
            continue
        record.add(name, key, written, {"model": source, "photo": str(path), "overlap": overlap})
        say(f"{written}: {told}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(photos)} photos could not be restored: {'; '.join(failed[:3])}")


def restore_one(model: Any, path: Path, name: str, out: Path, owner: str, overlap: int, batch: int) -> tuple[Path, str]:
    """Restore a photograph and write it; rows of tiles that are done outlive an interruption.

    Returns:
        The file, and what there is to say of it.

    Raises:
        ValueError: the photograph cannot be read.
    """
    from nextscale.cli.console import note, progress
    from nextscale.datasets.pairs import as_float, read_rgb
    from nextscale.pictures import save_png
    from nextscale.tasks.restoration.tiling import TileStore

    pixels = read_rgb(path)
    if pixels.is_floating_point():
        note(f"{path} has 16 bits a channel; the restored photo has 8")
    image = as_float(pixels)
    store = TileStore(out / WORK / name, owner)
    start = time.perf_counter()
    with progress(f"restoring {path.name}", "tiles") as report:
        restored: Tensor = model.restore(image, overlap=overlap, batch=batch, progress=report, store=store)
    seconds, megapixels = time.perf_counter() - start, image.shape[-2] * image.shape[-1] / 1e6
    written = save_png(restored, out / f"{name}.png")
    store.clear()
    _remove_empty(out / WORK / name, out)
    size = f"{image.shape[-1]} x {image.shape[-2]} pixels"
    return written, f"{size} in {seconds:.1f} s, {seconds / megapixels:.1f} s per megapixel"


def _remove_empty(folder: Path, top: Path) -> None:
    while folder != top and (not folder.is_dir() or not any(folder.iterdir())):
        if folder.is_dir():
            folder.rmdir()
        folder = folder.parent


def find_photos(given: Iterable[str]) -> list[tuple[str, Path]]:
    """Files by the names that their results get, without suffix; of folders all images in them, with their tree.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: two photos would get the same name.
    """
    from nextscale.datasets.sources import IMAGE_SUFFIXES

    photos: dict[str, Path] = {}
    for text in given:
        path = Path(text).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"{text}: no such file or folder")
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{text} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        for file in files:
            relative = file.relative_to(path) if path.is_dir() else Path(file.name)
            name = relative.with_suffix("").as_posix()
            if photos.setdefault(name, file).resolve() != file.resolve():
                raise ValueError(f"{photos[name]} and {file} would both become {name}.png: restore them separately")
    return list(photos.items())


class Record:
    """What was restored from what: a file in the output folder, written anew after every photograph.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, dict[str, Any]] = {}
        try:
            content = json.loads(path.read_text("utf-8"))
            self._entries = {name: entry for name, entry in content.items() if isinstance(entry, dict)}
        except (FileNotFoundError, ValueError, AttributeError):
            pass  # nothing yet, or nothing that this command wrote: photos are restored anew

    @staticmethod
    def key(photo: Path, owner: str) -> str:
        """Tells a photograph's content, the model and its settings apart from others.

        Raises:
            OSError: the photograph cannot be read.
        """
        import hashlib

        return hashlib.sha256(photo.read_bytes() + owner.encode()).hexdigest()[:16]

    def made(self, name: str, key: str) -> Path | None:
        """The result, where it was made already and is still there."""
        entry = self._entries.get(name, {})
        made = self.path.parent / str(entry.get("result"))
        return made if entry.get("key") == key and made.is_file() else None

    def add(self, name: str, key: str, result: Path, settings: Mapping[str, Any]) -> None:
        """Note a result."""
        from nextscale.core.checkpoint import write_json

        place = result.relative_to(self.path.parent).as_posix()
        self._entries[name] = {**settings, "result": place, "key": key}
        write_json(self.path, self._entries)
