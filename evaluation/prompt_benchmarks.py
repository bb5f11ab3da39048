"""Prompt lists of text-to-image benchmarks, and images in the folders that their official scripts read.

- GenEval (Ghosh et al. 2023, arXiv 2310.11513; github djghosh13/geneval): ``evaluation_metadata.jsonl``;
  ``00000/metadata.jsonl`` and ``00000/samples/00000.png``, four images a prompt.
- DPG-Bench (Hu et al. 2024, "ELLA", arXiv 2403.05135; github TencentQQGYLab/ELLA): a folder of ``NAME.txt``;
  ``NAME.png``, four images of one prompt side by side in two rows.
- HPS v2 (Wu et al. 2023, arXiv 2306.09341; github tgxs002/HPSv2): a folder of ``STYLE.json``, lists of prompts;
  ``STYLE/00000.jpg``, one image a prompt.
- Any other list: a text file with a prompt in a line, or ``.jsonl`` with an entry ``prompt``; as for GenEval.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

Name = Literal["geneval", "dpg", "hps", "list"]
Write = Callable[[Path, bytes], object]
"""Writes a file whole or not at all."""

JPEG_QUALITY = 95


class PromptListError(ValueError):
    """A list of prompts, or a folder of images drawn from one, that is not as its benchmark has it."""


@dataclass(frozen=True)
class Task:
    """One prompt of a benchmark.

    Attributes:
        key: of the prompt, part of its files' names: ``00012``, ``partiprompts4``, ``anime/00012``.
        details: what the benchmark says of the prompt beside it.
    """

    key: str
    prompt: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's form of prompts and images.

    Attributes:
        samples: images of each prompt.
    """

    name: Name
    samples: int

    def read(self, source: str | Path) -> list[Task]:
        """The prompts of the benchmark's own files.

        Raises:
            PromptListError: the source is not as the benchmark's files are.
            OSError: it cannot be read.
        """
        source = Path(source)
        if not source.exists():
            raise FileNotFoundError(f"{source} does not exist; give the benchmark's {_SOURCES[self.name]}")
        if (self.name in ("dpg", "hps")) != source.is_dir():
            raise PromptListError(f"{source} is not the benchmark's {_SOURCES[self.name]}")
        tasks = list(_READERS[self.name](source))
        if not tasks:
            raise PromptListError(f"{source} holds no prompt; give the benchmark's {_SOURCES[self.name]}")
        return tasks

    def files(self, task: Task) -> list[Path]:
        """The pictures of a prompt, from the benchmark's folder on."""
        if self.name == "dpg":
            return [Path(f"{task.key}.png")]
        if self.name == "hps":
            return [Path(f"{task.key}.jpg")]
        return [Path(task.key) / "samples" / f"{number:05d}.png" for number in range(self.samples)]

    def drawn(self, folder: Path, task: Task) -> bool:
        """Whether all pictures of a prompt are there."""
        return all((folder / path).is_file() for path in self.files(task))

    def write(self, folder: Path, task: Task, images: Sequence[Image.Image], write: Write) -> None:
        """Write a prompt's images.

        Raises:
            ValueError: there are not ``samples`` of them.
        """
        if len(images) != self.samples:
            raise ValueError(f"{len(images)} images of a prompt were given, {self.name} takes {self.samples}")
        pictures = [tiled(images)] if self.name == "dpg" else images
        if self.name in ("geneval", "list"):
            content = json.dumps({**task.details, "prompt": task.prompt}).encode()
            write(folder / task.key / "metadata.jsonl", content)
        for path, picture in zip(self.files(task), pictures, strict=True):
            write(folder / path, encoded(picture, path.suffix))

    def images(self, folder: Path, task: Task) -> list[Image.Image]:
        """A prompt's images, as they were written.

        Raises:
            PromptListError: a file is no picture, or a tiled one cannot be taken apart.
        """
        found = []
        for path in self.files(task):
            try:
                with Image.open(folder / path) as picture:
                    found.append(picture.convert("RGB"))
            except (OSError, ValueError) as error:
                raise PromptListError(f"{folder / path} cannot be read as a picture ({error})") from None
        return untiled(found[0], self.samples) if self.name == "dpg" else found


def tiled(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size, two in a row; a single one as it is."""
    if len(images) == 1:
        return images[0]
    width, height = images[0].size
    whole = Image.new("RGB", (2 * width, -(-len(images) // 2) * height))
    for number, image in enumerate(images):
        whole.paste(image, (number % 2 * width, number // 2 * height))
    return whole


def untiled(picture: Image.Image, samples: int) -> list[Image.Image]:
    """What :func:`tiled` joined.

    Raises:
        PromptListError: the picture does not divide.
    """
    if samples == 1:
        return [picture]
    columns, rows = 2, -(-samples // 2)
    if picture.width % columns or picture.height % rows:
        raise PromptListError(
            f"a picture of {picture.width} x {picture.height} pixels is not {samples} images in {rows} rows of two"
        )
    width, height = picture.width // columns, picture.height // rows
    corners = [(number % 2 * width, number // 2 * height) for number in range(samples)]
    return [picture.crop((x, y, x + width, y + height)) for x, y in corners]


def encoded(picture: Image.Image, suffix: str) -> bytes:
    """The bytes of a PNG or, with ``.jpg``, a JPEG file."""
    buffer = io.BytesIO()
    if suffix == ".jpg":
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        picture.save(buffer, "PNG")
    return buffer.getvalue()


def to_pictures(images: np.ndarray) -> list[Image.Image]:
    """Of float (n, 3, height, width) in [0, 1], rounded to 8 bits."""
    values = np.rint(images.clip(0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(value) for value in values]


# --- reading the lists --------------------------------------------------------------------------------


def _geneval(source: Path) -> Iterator[Task]:
    for number, entry in enumerate(_json_lines(source)):
        prompt, tag = entry.pop("prompt", None), entry.get("tag")
        if not isinstance(prompt, str) or not isinstance(tag, str) or not isinstance(entry.get("include"), list):
            raise PromptListError(f"{source}, line {number + 1}, has no prompt, tag and include, as GenEval's do")
        yield Task(f"{number:05d}", prompt, entry)


def _dpg(source: Path) -> Iterator[Task]:
    for path in sorted(source.glob("*.txt")):
        yield Task(path.stem, path.read_text(encoding="utf-8").strip())


def _hps(source: Path) -> Iterator[Task]:
    for path in sorted(source.glob("*.json")):
        try:
            prompts = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PromptListError(f"{path} is no JSON ({error})") from None
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise PromptListError(f"{path} is no list of prompts, as HPS has one for each style")
        for number, prompt in enumerate(prompts):
            yield Task(f"{path.stem}/{number:05d}", prompt)


def _list(source: Path) -> Iterator[Task]:
    if source.suffix == ".jsonl":
        entries = [(entry.pop("prompt", None), entry) for entry in _json_lines(source)]
    else:
        lines = source.read_text(encoding="utf-8", errors="replace").splitlines()
        entries = [(line.strip(), {}) for line in lines if line.strip()]
    for number, (prompt, details) in enumerate(entries):
        if not isinstance(prompt, str):
            raise PromptListError(f"{source}, line {number + 1}, has no entry prompt")
        yield Task(f"{number:05d}", prompt, details)


def _json_lines(source: Path) -> list[dict[str, Any]]:
    entries = []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines()):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise PromptListError(f"{source}, line {number + 1}, is no JSON ({error})") from None
        if not isinstance(entry, dict):
            raise PromptListError(f"{source}, line {number + 1}, is no JSON object")
        entries.append(entry)
    return entries


_READERS: dict[str, Callable[[Path], Iterator[Task]]] = {"geneval": _geneval, "dpg": _dpg, "hps": _hps, "list": _list}
_SOURCES = {
    "geneval": "evaluation_metadata.jsonl",
    "dpg": "folder of NAME.txt",
    "hps": "folder of STYLE.json",
    "list": "file of prompts: one in a line, or .jsonl with an entry prompt",
}

BENCHMARKS: dict[str, Benchmark] = {
    "geneval": Benchmark("geneval", 4),
    "dpg": Benchmark("dpg", 4),
    "hps": Benchmark("hps", 1),
    "list": Benchmark("list", 1),
}
"""With the number of images that is published."""
