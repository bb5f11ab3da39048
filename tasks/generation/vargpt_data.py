"""Conversations with images to train VARGPT on: the published JSON format, pairs of images, packing.

Official code VARGPT-family/VARGPT-v1.1, ``VARGPT-family-training`` (a fork of LLaMA-Factory; its ShareGPT-like format).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nextscale.core.training import Batch
from nextscale.datasets.draws import uniforms
from nextscale.tasks.generation.vargpt_images import MessageError, Processor, open_image
from nextscale.tasks.generation.vargpt_training import IGNORED

if TYPE_CHECKING:
    from PIL.Image import Image

SEEN, DRAWN = "<image>", "<image_gen>"
"""What stands in a text for an image to read, and for one to draw."""
KEPT = 200_000
"""Samples whose text is kept in numbers once it was read."""
_MARK = re.compile(f"({re.escape(SEEN)}|{re.escape(DRAWN)})")
Key = int | tuple[int, int]


class ConversationError(ValueError):
    """A file of conversations, or one in it, is not as it should be."""


@dataclass(frozen=True)
class Conversation:
    """One sample.

    Attributes:
        messages: role and content, images named by their marks.
        images: files, in the order of the marks. Of a pair: the one liked, then the one disliked, of the one image
            to draw.
    """

    messages: tuple[tuple[str, str], ...]
    images: tuple[Path, ...]


def read_conversations(path: str | Path, pairs: bool = False) -> list[Conversation]:
    """The samples of a JSON file: a list, or one a line, of ``messages`` (role and content, with the marks ``<image>``
    and ``<image_gen>``) and ``images`` (files, from the file's folder, in the order of the marks).

    Args:
        pairs: samples have one image to draw, and two images: the one liked better, then the other.

    Raises:
        ConversationError: the file is no such file; the sample that is wrong is named.
        FileNotFoundError: there is no such file.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        whole = text.lstrip().startswith("[")
        entries = json.loads(text) if whole else [json.loads(line) for line in text.splitlines() if line.strip()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConversationError(f"{path} is not JSON ({error})") from None
    if not entries:
        raise ConversationError(f"{path} holds no conversation")
    return [
        _conversation(entry, f"{path}, sample {number}", path.parent, pairs) for number, entry in enumerate(entries)
    ]


_ROLES = {"human": "user", "gpt": "assistant"}


def _conversation(entry: Any, where: str, folder: Path, pairs: bool) -> Conversation:
    if not isinstance(entry, dict):
        raise ConversationError(f"{where} is a {type(entry).__name__}; expected messages and images")
    given = entry.get("messages", entry.get("conversations"))
    if not isinstance(given, list) or not given:
        raise ConversationError(f"{where} has no list of messages")
    messages = []
    for message in given:
        if not isinstance(message, dict):
            raise ConversationError(f"{where} has a message that is a {type(message).__name__}")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ConversationError(f"{where} has a message without role and content")
        messages.append((_ROLES.get(role, role), content))
    if not any(role == "assistant" for role, _ in messages):
        raise ConversationError(f"{where} has no answer: nothing could be learned from it")
    images = entry.get("images") or []
    marks = [mark for _, content in messages for mark in _MARK.findall(content)]
    expected = len(marks) + pairs
    if not isinstance(images, list) or len(images) != expected:
        count = len(images) if isinstance(images, list) else 0
        raise ConversationError(f"{where} has {len(marks)} marks of images and {count} images; expected {expected}")
    if pairs and marks != [DRAWN]:
        raise ConversationError(f"{where} is no pair: it needs one {DRAWN} and no {SEEN}")
    return Conversation(tuple(messages), tuple(folder / str(image) for image in images))


@dataclass
class Encoded:
    """One sample in numbers.

    Attributes:
        seen: pixels and patch grids of the images to read.
        drawn: images to draw, in [-1, 1].
    """

    ids: list[int]
    labels: list[int]
    seen: list[tuple[Tensor, tuple[int, ...]]]
    drawn: list[Float[Tensor, "3 height width"]]


@dataclass(frozen=True)
class Piece:
    """Part of a sample's text.

    Attributes:
        numbers: of its tokens, one mark for each image.
        learned: it is an answer.
        images: to read, whose marks stand in it.
    """

    numbers: list[int]
    learned: bool
    images: int


class ConversationSet:
    """Map-style dataset of conversations; a batch is what
    :class:`nextscale.tasks.generation.vargpt_training.VARGPTTraining` takes.

    Args:
        size: side of the images to draw.
        length: most tokens of a conversation, and of a packed row.
        pack: put several conversations into a row, as many as fit, so that little is computed for padding.
        pairs: of images to prefer; the liked ones are the first half of a batch's rows.
        crop: ``"random"``, or ``"center"`` for measuring.
        resize_ratio: the shorter side is resized to this times ``size`` before the crop.
        read_ratio: images to read are cut at random to one part in so many of their sides; 1: they are left whole.
        mirror: mirror images at random, those of a sample alike.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        processor: Processor,
        size: int,
        *,
        length: int = 4096,
        pack: bool = False,
        pairs: bool = False,
        crop: str = "random",
        resize_ratio: float = 1.125,
        read_ratio: float = 1.0,
        mirror: bool = False,
        seed: int = 0,
    ) -> None:
        if read_ratio < 1:
            raise ValueError(f"read_ratio is {read_ratio}; expected 1 (images are read whole) or more")
        if pack and pairs:
            raise ValueError("pairs of images are not packed: each needs a row of its own")
        self.conversations, self.processor, self.size = list(conversations), processor, size
        self.length, self.pack, self.pairs = length, pack, pairs
        self.crop, self.resize_ratio, self.seed = crop, resize_ratio, seed
        self.read_ratio, self.mirror = read_ratio, mirror
        self._spelled: dict[int, list[Piece]] = {}

    def __len__(self) -> int:
        return len(self.conversations)

    def fetch(self, keys: Sequence[Key]) -> Batch:
        """A batch of samples, each a number or (epoch, number)."""
        places = [key if isinstance(key, tuple) else (0, key) for key in keys]
        if not self.pairs:
            return self.collate([self.encode(epoch, number) for epoch, number in places])
        return self.collate([self.encode(epoch, number, liked) for liked in (0, 1) for epoch, number in places])

    def encode(self, epoch: int, number: int, choice: int = 0) -> Encoded:
        """One sample; of a pair with its first or second image.

        Raises:
            ConversationError: an image cannot be read, or the sample is too long.
        """
        talk = self.conversations[number]
        marks = [mark for _, content in talk.messages for mark in _MARK.findall(content)]
        ids, labels = list[int](), list[int]()
        seen, drawn = list[tuple[Tensor, tuple[int, ...]]](), list[Float[Tensor, "3 size size"]]()
        try:
            sources = []
            for mark, path in zip(marks, talk.images[choice:], strict=False):
                image = self._open(path, epoch, number)
                if mark == SEEN:
                    sources.append(self._cut(image, epoch, number))
                else:
                    drawn.append(self._target(image, epoch, number))
            for piece in self._spell(number):
                own, sources = sources[: piece.images], sources[piece.images :]
                numbers, images = self.processor.place(piece.numbers, own)
                pad = self.processor.config.marks.pad
                row = [n for n in numbers for n in [n] * (self.places if n == pad else 1)]
                labels += [n if piece.learned and n != pad else IGNORED for n in row]
                ids, seen = ids + row, seen + images
        except MessageError as error:
            raise ConversationError(f"sample {number}: {error}") from None
        if len(ids) > self.length:
            raise ConversationError(
                f"sample {number} has {len(ids):,} tokens, images included; at most {self.length:,} are asked for: "
                "raise length or leave it out"
            )
        return Encoded(ids, labels, seen, drawn)

    def _spell(self, number: int) -> list[Piece]:
        """The text of a sample in numbers, message by message; found once, while there is room."""
        if number in self._spelled:
            return self._spelled[number]
        marks, tokenizer = self.processor.config.marks, self.processor.tokenizer
        drawing = "".join(tokenizer.convert_ids_to_tokens([marks.start, marks.pad, marks.end]))
        messages = []
        for role, content in self.conversations[number].messages:
            parts: list[dict[str, Any]] = []
            for piece in _MARK.split(content):
                if piece == SEEN:
                    parts.append({"type": "image", "image": SEEN})
                elif piece:
                    parts.append({"type": "text", "text": drawing if piece == DRAWN else piece})
            messages.append({"role": role, "content": parts})
        pieces, before = list[Piece](), ""
        for end, message in enumerate(messages, 1):
            answer = message["role"] == "assistant"
            asked = [(messages[: end - 1], True)] if answer and end > 1 else []
            for part, answering in [*asked, (messages[:end], False)]:
                text, _ = self.processor.render(part, answering=answering)
                if not text.startswith(before):
                    raise MessageError("the chat template does not write conversations from beginning to end")
                numbers = self.processor.numbers(text[len(before) :], first=not before)
                images = 0 if answering else self.conversations[number].messages[end - 1][1].count(SEEN)
                pieces.append(Piece(numbers, answer and not answering, images))
                before = text
        if len(self._spelled) < KEPT:
            self._spelled[number] = pieces
        return pieces

    @property
    def places(self) -> int:
        """Tokens that stand for an image to draw."""
        return self.processor.config.places

    def _open(self, path: Path, epoch: int, number: int) -> Image:
        from PIL import ImageOps

        image = open_image(path)
        mirrored = self.mirror and self._draw(epoch, number)[2] < 0.5
        return ImageOps.mirror(image) if mirrored else image

    def _draw(self, epoch: int, number: int) -> tuple[float, ...]:
        """Five numbers in [0, 1) that a sample's images are cut and mirrored by."""
        return uniforms(self.seed, epoch, number, 5)

    def _cut(self, image: Image, epoch: int, number: int) -> Image:
        """A part of an image to read."""
        if self.read_ratio == 1:
            return image
        across, down = self._draw(epoch, number)[3:]
        width, height = (side / self.read_ratio for side in image.size)
        left, top = across * (image.width - width), down * (image.height - height)
        box = (round(left), round(top), round(left + width), round(top + height))
        return image.crop(box)

    def _target(self, image: Image, epoch: int, number: int) -> Float[Tensor, "3 size size"]:
        from PIL.Image import Resampling

        scale = max(round(self.resize_ratio * self.size), self.size) / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Resampling.LANCZOS)
        place = self._draw(epoch, number)[:2] if self.crop == "random" else (0.5, 0.5)
        left, top = int(place[0] * (width - self.size + 1)), int(place[1] * (height - self.size + 1))
        left, top = min(left, width - self.size), min(top, height - self.size)
        values = np.asarray(image.crop((left, top, left + self.size, top + self.size)), np.float32)
        return torch.from_numpy(values / 127.5 - 1).movedim(-1, 0).contiguous()

    # --- batches -------------------------------------------------------------------------------------------

    def collate(self, samples: Sequence[Encoded]) -> Batch:
        """Samples as one batch; packed, they come in another order."""
        rows = (
            packed_rows([len(s.ids) for s in samples], self.length) if self.pack else [[i] for i in range(len(samples))]
        )
        ordered = [samples[i] for row in rows for i in row]
        ids, mask = self.processor.pad([[n for i in row for n in samples[i].ids] for row in rows], left=False)
        labels = torch.full_like(ids, IGNORED)
        talks = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            at = 0
            for order, i in enumerate(row, 1):
                stop = at + len(samples[i].ids)
                labels[number, at:stop] = torch.tensor(samples[i].labels)
                talks[number, at:stop] = order
                at = stop
        batch: Batch = {"ids": ids, "mask": mask, "labels": labels}
        if self.pack:
            batch["talks"] = talks
        seen = [each for sample in ordered for each in sample.seen]
        if seen:
            batch["pixels"] = torch.cat([pixels for pixels, _ in seen])
            batch["grids"] = self.processor.grids([grid for _, grid in seen])
        drawn = [image for sample in ordered for image in sample.drawn]
        if drawn:
            batch["image"] = torch.stack(drawn)
        return batch


def packed_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of the samples that share a row: the longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    left: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((row for row, free in enumerate(left) if free >= lengths[number]), None)
        if place is None:
            rows.append([])
            left.append(room)
            place = len(rows) - 1
        rows[place].append(number)
        left[place] -= lengths[number]
    return rows
