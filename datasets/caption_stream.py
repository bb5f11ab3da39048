"""Streamed images with texts: those beside them in their shards, or made of classes and colours."""

from collections.abc import Sequence
from typing import Any, Literal

from .captions import CaptionError, describe, text_side, words_of
from .shards import LABELS
from .stream_shards import NO_SIDE, StreamShards
from .streaming import BUFFER, StreamedImages, View


def open_caption_stream(
    shards: StreamShards,
    *,
    captions: Literal["files", "classes"] = "files",
    field: str | None = None,
    template: str = "a photo of a {class}",
    class_names: Sequence[str] | None = None,
    size: int,
    flip: bool = False,
    resize_ratio: float = 1.125,
    seed: int = 0,
    lanes: int | None = None,
    buffer: int | None = None,
) -> "StreamedCaptions":
    """Stream images with texts; options as of `open_captions` and `open_stream`.

    Images without a text are passed over and named, as those that cannot be read. Raises CaptionError where captions
    name classes and there are no `class_names`, ValueError.
    """
    names = tuple(class_names or ())
    by_class = captions == "classes" and "{class}" in template
    if by_class and not names:
        raise CaptionError("captions name classes, and streamed shards do not say which there are: give class_names")
    side = text_side(field) if captions == "files" else LABELS if by_class else NO_SIDE
    view = View(size, "random", flip, resize_ratio)
    images = StreamedCaptions(shards, view, side, seed=seed, lanes=lanes, buffer=BUFFER if buffer is None else buffer)
    images.template = None if captions == "files" else template
    if by_class:
        images.name_classes(None, names)
    return images


class StreamedCaptions(StreamedImages):
    """A batch also has `text`, a list.

    template: of texts made of classes and colours; None: texts lie beside the images.
    """

    template: str | None = None

    def vocabulary(self) -> list[str]:
        """Texts that hold every word that may come up. Raises CaptionError where they are yet to be read."""
        if self.template is None:
            raise CaptionError("the texts of streamed shards are not known beforehand: name a text_encoder")
        return [words_of(self.template, self.classes or ())]

    def _described(self, batch: dict[str, Any], texts: list[str]) -> dict[str, Any]:
        if self.template is None:
            return {**batch, "text": texts}
        return {**batch, "text": describe(batch, self.template, self.classes or ())}
