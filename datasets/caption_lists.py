"""Lists of images with texts: a line of JSON for each image, as the official code of Infinity reads them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DatasetError, listed

PATH_FIELDS = ("image_path", "file_name")
"""Entries that name the image: of Infinity's lists, and of `metadata.jsonl` on the Hugging Face hub."""


class CaptionListError(DatasetError):
    """Lines of a list that cannot be used."""


@dataclass(frozen=True)
class ListedImage:
    """One line. `path` is absolute, or as from the working directory; `ratio` is height / width where it is given."""

    path: Path
    entries: dict[str, Any]
    ratio: float | None


def read_caption_lists(files: Sequence[str | Path]) -> list[ListedImage]:
    """All images of some lists, in order.

    A line is an object with the image's path (`image_path` or `file_name`; a relative one is looked for from the
    list's folder), texts, and perhaps `h_div_w`, its height / width. Empty lines are passed over.

    Raises CaptionListError, naming all lines that are no such object or name a file that is not there; OSError.
    """
    found: list[ListedImage] = []
    wrong: list[str] = []
    for file in map(Path, files):
        with file.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                item = _listed(line, file.parent)
                if isinstance(item, str):
                    wrong.append(f"{file}, line {number} ({item})")
                else:
                    found.append(item)
    if wrong:
        raise CaptionListError(
            f"{len(wrong)} lines cannot be used: {listed(wrong)}. Expected of each an object such as "
            '{"image_path": "photos/1.jpg", "long_caption": "a red fox", "h_div_w": 1.333}'
        )
    return found


def _listed(line: str, folder: Path) -> ListedImage | str:
    """What a line says, or what is wrong with it."""
    try:
        entries = json.loads(line)
    except (ValueError, RecursionError):
        return "no JSON"
    if not isinstance(entries, dict):
        return "no object"
    name = next((entries[key] for key in PATH_FIELDS if isinstance(entries.get(key), str)), "")
    if not name:
        return f"no {' or '.join(PATH_FIELDS)}"
    if "\0" in name or not (folder / name).is_file():
        return f"{name} is not there"
    ratio = entries.get("h_div_w")
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1e3):
        return f"h_div_w is {ratio!r}"
    return ListedImage(folder / name, entries, None if ratio is None else float(ratio))
