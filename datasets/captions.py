"""Images with texts: side files, lists, webdataset shards, or captions made of classes and colours."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .caption_lists import read_caption_lists
from .draws import uniforms
from .errors import DatasetError, listed
from .images import ImageDataset, Key
from .shards import Side, captions_in
from .sources import Source, find

if TYPE_CHECKING:
    from torch import Tensor

FIELDS = ("caption", "text", "prompt", "long_caption")
"""Entries of a JSON side file in which a text is looked for, in this order."""
LONG_FIELDS = ("long_caption", "caption", "text", "prompt")
"""The same of a list's line, which may have two."""
SHORT_FIELD = "text"
"""Entry of a list's line with the short text, where there is a long one."""

COLOURS = {
    "black": (0, 0, 0), "white": (255, 255, 255), "grey": (128, 128, 128), "red": (200, 30, 40),
    "orange": (235, 130, 40), "yellow": (235, 215, 60), "green": (60, 140, 60), "blue": (50, 90, 190),
    "purple": (120, 60, 150), "pink": (235, 150, 180), "brown": (110, 70, 40), "light blue": (150, 190, 235),
}  # fmt: skip
"""Colours that captions name, as RGB."""


_SENTENCES = re.compile(r".+?(?:[.!?。！？]+(?=\s|$)\s*|$)", re.DOTALL)


class CaptionError(DatasetError):
    """Images without the texts that were asked for."""


def open_captions(
    source: str | Sequence[str],
    images: ImageDataset,
    *,
    captions: Literal["files", "classes"] = "files",
    field: str | None = None,
    template: str = "a photo of a {class}",
    class_names: Sequence[str] | None = None,
    choice: "Choice | None" = None,
) -> "CaptionedImages":
    """Put texts beside the images of a dataset that was opened from the same source.

    `captions` "files": a sample's text is NAME.txt, or an entry of NAME.json (`field`, else the first of `FIELDS`),
    beside the image in a folder or with it in webdataset shards, or such an entry of its line in a list; of long and
    short ones `choice` draws. "classes": the text is `template`, with the image's class in place of {class} and the
    colour that most of its pixels are nearest to in place of {colour}; names are the data's own or `class_names`.

    Raises CaptionError where samples have no text, or classes no names.
    """
    if captions == "classes":
        names = tuple(class_names or images.classes or ())
        if "{class}" in template and (images.labels is None or len(names) < images.num_classes):
            raise CaptionError(
                f"captions name classes, and the data has {images.num_classes} classes with {len(names)} names: "
                "give class_names, one for each"
            )
        return CaptionedImages(images, None, template, names)
    texts = read_texts(find(source, labels=False), images.name, field)
    if len(texts) != len(images):
        raise CaptionError(f"{len(texts)} texts were found for {len(images)} images")
    texts.choice = choice or Choice()
    return CaptionedImages(images, texts, "", ())


@dataclass(frozen=True)
class Choice:
    """Which text of an image is given (as Infinity's training chooses).

    Attributes:
        short: share of the images whose short text is given, where they have one.
        cut: give a drawn number of a long text's first sentences, from one to all, instead of all.
        seed: of the draws.
    """

    short: float = 0.0
    cut: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.short <= 1:
            raise ValueError(f"short is {self.short}; expected a share in [0, 1]")


@dataclass
class Texts:
    """The texts of images by number; `short` is empty where no image has another, short text."""

    long: list[str]
    short: list[str] = field(default_factory=list)
    choice: Choice = Choice()

    def __len__(self) -> int:
        return len(self.long)

    def vocabulary(self) -> list[str]:
        """Texts that hold every word that may come up."""
        return [*self.long, *self.short]

    def of(self, epoch: int, number: int) -> str:
        """The text of an image in an epoch."""
        text, choice = self.long[number], self.choice
        if not choice.short and not choice.cut:
            return text
        which, length = uniforms(choice.seed, epoch, number, 7)[5:]  # those before decide the view and the drop
        if which < choice.short and self.short and self.short[number]:
            return self.short[number]
        sentences = _SENTENCES.findall(text) if choice.cut else []
        return "".join(sentences[: 1 + int(length * len(sentences))]).strip() if sentences else text


def read_texts(found: Source, name: Callable[[int], str], field: str | None = None) -> Texts:
    """The texts of a source's images; `name` tells a number's image.

    Raises CaptionError where images have none, or the source can hold none.
    """
    (_, read), fields = text_side(field), fields_of(field)
    short: list[str] = []
    if found.lists:
        entries = [image.entries for image in read_caption_lists(found.lists)]
        texts = [_plain(_first(each, fields if field else LONG_FIELDS)) for each in entries]
        short = [_plain(_first(each, (SHORT_FIELD,))) for each in entries]
    elif found.kind == "image":
        texts = [_beside(found.root / name, read) for name in found.files]
    elif found.kind == "tar":
        texts = [text for path in found.files for text in captions_in(Path(path), text_side(field))]
    else:
        raise CaptionError("texts of parquet files are not read: write webdataset shards or a folder of images")
    if without := [name(number) for number, text in enumerate(texts) if not text]:
        raise CaptionError(
            f"{len(without)} of {len(texts)} images have no text: {listed(without)}. Put NAME.txt, or NAME.json with "
            f"one of {', '.join(fields)}, beside each, or such an entry into its line of a list"
        )
    return Texts(texts, short)


class CaptionedImages:
    """Map-style dataset of images with texts, made by `open_captions`; a batch has `text`, a list."""

    def __init__(self, images: ImageDataset, texts: Texts | None, template: str, class_names: tuple[str, ...]) -> None:
        self.images, self.size = images, images.size
        self._texts, self._template, self._names = texts, template, class_names

    def __len__(self) -> int:
        return len(self.images)

    def vocabulary(self) -> list[str]:
        """Texts that hold every word that may come up."""
        if self._texts is not None:
            return self._texts.vocabulary()
        return [words_of(self._template, self._names)]

    def fetch(self, keys: Sequence[Key]) -> dict[str, Any]:
        """A batch at once, as `ImageDataset.fetch` gives it."""
        batch = self.images.fetch(keys)
        if self._texts is not None:
            epochs = [key[0] if isinstance(key, tuple) else 0 for key in keys]
            texts = [self._texts.of(*each) for each in zip(epochs, batch["index"].tolist(), strict=True)]
        else:
            texts = describe(batch, self._template, self._names)
        return {**batch, "text": texts}


def describe(batch: dict[str, Any], template: str, names: Sequence[str]) -> list[str]:
    """Texts made of the classes and colours of a batch."""
    colours = colours_of(batch["image"]) if "{colour}" in template else [""] * len(batch["image"])
    classes = [names[label] if names else "" for label in batch["label"].tolist()]
    return [
        template.replace("{class}", name).replace("{colour}", colour)
        for name, colour in zip(classes, colours, strict=True)
    ]


def words_of(template: str, names: Sequence[str]) -> str:
    """Every word that `describe` may use."""
    return template.replace("{class}", " ".join(names)).replace("{colour}", " ".join(COLOURS))


def fields_of(field: str | None) -> tuple[str, ...]:
    """Entries of a JSON side file that may be the text."""
    return FIELDS if field is None else (field,)


def text_side(field: str | None) -> Side:
    """How the text beside an image is read."""
    return ("txt", "json"), partial(_text, fields=fields_of(field))


def colours_of(images: "Tensor") -> list[str]:
    """The colour in `COLOURS` that most pixels of each image, (batch, 3, height, width) in [-1, 1], are nearest to."""
    names = list(COLOURS)
    return [names[place] for place in colour_shares(images).argmax(1)]


def colour_shares(images: "Tensor") -> np.ndarray:
    """Share of the pixels of each image, (batch, 3, height, width) in [-1, 1], that are nearest to each of `COLOURS`;
    (batch, colours)."""
    pixels = (images.flatten(2).numpy() + 1) * 127.5
    palette = np.array(list(COLOURS.values()), np.float32)
    distances = ((pixels[:, None] - palette[None, :, :, None]) ** 2).sum(2)
    nearest = distances.argmin(1)
    return np.stack([np.bincount(row, minlength=len(palette)) / len(row) for row in nearest])


def _beside(image: Path, read: Callable[[str, bytes], str]) -> str:
    for extension in ("txt", "json"):
        place = image.with_suffix(f".{extension}")
        if place.is_file() and (text := read(extension, place.read_bytes())):
            return text
    return ""


def _text(extension: str, data: bytes, fields: tuple[str, ...]) -> str:
    """The text in a side file; empty where there is none."""
    if extension == "txt":
        return data.decode("utf-8", "replace").strip()
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    return _first(entries, fields) if isinstance(entries, dict) else ""


def _first(entries: dict[str, Any], fields: tuple[str, ...]) -> str:
    found = next((entries[name] for name in fields if name in entries), "")
    return found.strip() if isinstance(found, str) else ""


def _plain(text: str) -> str:
    """A list's text without the settings of the generator that its image came from."""
    return text.partition("--")[0].strip()
