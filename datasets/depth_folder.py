"""Pairs of the user's own, described in a small YAML file beside them."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from .depth_encodings import ENCODINGS, Encoding
from .depth_lists import read_list
from .depth_pairs import Camera, DepthPair, PairFiles, none_found
from .errors import DatasetError

_KEYS = {"image", "depth", "mask", "encoding", "camera", "fov_x", "splits"}


def described(path: Path, split: str | None) -> PairFiles:
    """The pairs that a YAML file describes.

    ``image``, ``depth`` and, if there is one, ``mask`` (0 = not measured) are patterns of files relative to the YAML
    file with ``{name}`` in them once, which may stand for several folders. ``encoding`` is a name of
    ``depth_encodings.ENCODINGS`` or fields of ``Encoding`` (kind, scale, ...). ``camera`` has fx, fy, cx, cy in
    pixels, or ``fov_x`` is the horizontal angle of view in degrees. ``splits``: {name: text file with one ``{name}``
    a line}.

    Args:
        split: of ``splits``; None for every image that is there.

    Raises:
        DatasetError: the description is not understood. OSError: a file cannot be read.
    """
    import yaml

    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is no YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or not {"image", "depth"} <= set(content):
        raise DatasetError(f"{path} must have `image: FOLDER/{{name}}.jpg` and `depth: FOLDER/{{name}}.png`")
    if unknown := sorted(set(content) - _KEYS):
        raise DatasetError(
            f"{path}: {', '.join(map(str, unknown))} is not understood; known: {', '.join(sorted(_KEYS))}"
        )
    patterns = {key: _pattern(path, key, content[key]) for key in ("image", "depth", "mask") if key in content}
    encoding = _encoding(path, content.get("encoding", "nyu"))
    camera, fov = _camera(path, content.get("camera")), content.get("fov_x")
    if fov is not None and (not isinstance(fov, int | float) or not 0 < fov < 180):
        raise DatasetError(f"{path}: fov_x is {fov!r}; expected degrees between 0 and 180")
    root = path.parent
    names = _split(path, content.get("splits") or {}, split) if split is not None else _names(root, patterns["image"])
    pairs = [
        DepthPair(
            name,
            root / patterns["image"].format(name=name),
            root / patterns["depth"].format(name=name),
            (root / patterns["mask"].format(name=name),) if "mask" in patterns else (),
            camera,
            None if fov is None else math.radians(fov),
        )
        for name in names
    ]
    if not pairs:
        raise none_found(root, f"image like {patterns['image']}")
    return PairFiles(pairs, encoding)


def _pattern(path: Path, key: str, value: object) -> str:
    text = str(value)
    if text.count("{") != 1 or "{name}" not in text or text.count("}") != 1:
        raise DatasetError(f"{path}: {key} is {value!r}; expected a file name with {{name}} in it once")
    return text


def _encoding(path: Path, value: object) -> Encoding:
    if isinstance(value, str):
        if value not in ENCODINGS:
            raise DatasetError(f"{path}: unknown encoding {value!r}; known: {', '.join(ENCODINGS)}")
        return ENCODINGS[value]
    known = {field.name for field in fields(Encoding)}
    if not isinstance(value, dict) or (unknown := sorted(set(value) - known)):
        named = f"; {', '.join(unknown)} is not understood" if isinstance(value, dict) else ""
        raise DatasetError(f"{path}: encoding takes a name or the fields {', '.join(sorted(known))}{named}")
    if value.get("size") is not None:
        value = {**value, "size": tuple(value["size"])}
    encoding = Encoding(**value)
    if not isinstance(encoding.scale, int | float) or not 0 < encoding.scale < math.inf:
        raise DatasetError(f"{path}: scale is {encoding.scale!r}; expected stored values per metre, more than 0")
    return encoding


def _camera(path: Path, value: object) -> Camera | None:
    if value is None:
        return None
    try:
        fx, fy, cx, cy = (float(value[key]) for key in ("fx", "fy", "cx", "cy"))  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        raise DatasetError(f"{path}: camera is {value!r}; expected fx, fy, cx and cy in pixels") from None
    return fx, fy, cx, cy


def _split(path: Path, splits: dict[str, str], split: str) -> list[str]:
    if split not in splits:
        raise DatasetError(f"{path} has no split {split!r}; it has: {', '.join(splits) or 'none'}")
    return [words[0] for words in read_list(path.parent / splits[split])]


def _names(root: Path, pattern: str) -> list[str]:
    before, _, after = pattern.partition("{name}")
    folder = root / before.rpartition("/")[0]
    start = before.rpartition("/")[2]
    form = re.compile(re.escape(start) + "(.+)" + re.escape(after))
    found = []
    for path in folder.rglob("*"):
        match = form.fullmatch(path.relative_to(folder).as_posix())
        if match and path.is_file():
            found.append(match[1])
    return sorted(found)
