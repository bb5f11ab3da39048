"""Images as VARGPT's vision models take them, and the text around them: what a processor of transformers does.

Its own classes ask for torchvision; these are the same steps on Pillow and NumPy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.core.checkpoint import write_atomically
from nextscale.tasks.generation.vargpt_config import VARGPTConfig

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN, SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, of the channels."""
TEMPLATES = {
    "v1": (
        "{{ 'A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human\\'s questions. ' }}"
        "{% for message in messages %}{{ message['role'].upper() }}: "
        "{% for part in message['content'] if part['type'] == 'image' %}{{ image }}\n{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
        "{{ ' ' if message['role'] == 'user' else '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "v1.1": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "{% endif %}"
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        "<|vision_start|>{{ image }}<|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
"""Chat templates of the published models, for tokenizers that bring none; ``image`` is the mark of an image."""


class MessageError(ValueError):
    """A message cannot be read as it is: it is empty, or its images and marks do not belong together."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """Conversations, padded on the left, with the images in them.

    Attributes:
        pixels, grids: see :meth:`nextscale.tasks.generation.vargpt_language.LanguageModel.see`; None: no image.
    """

    ids: Int[Tensor, "batch length"]
    mask: Int[Tensor, "batch length"]
    pixels: Tensor | None
    grids: Int[Tensor, "images 3"]


def open_image(source: Any) -> Image:
    """A picture from a path, a Pillow image, an array (height, width, 3) of bytes, or a tensor (3, height, width) in
    [0, 1].

    Raises:
        MessageError: it cannot be read.
    """
    from PIL import Image as Pillow

    if isinstance(source, Tensor):
        source = (source.detach().cpu().clamp(0, 1).movedim(0, -1) * 255).round().byte().numpy()
    if isinstance(source, np.ndarray):
        source = Pillow.fromarray(source)
    if isinstance(source, Pillow.Image):
        return source.convert("RGB")
    try:
        with Pillow.open(Path(source).expanduser()) as opened:
            return opened.convert("RGB")
    except (OSError, TypeError, ValueError, Pillow.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise MessageError(f"the image {source} cannot be read ({reason}): give a file such as PNG or JPEG") from None


class Processor:
    """Tokenizer and images of a model.

    Args:
        tokenizer: of transformers.
        least, most: v1.1: pixels that an image is resized to have, at least and at most.
    """

    def __init__(self, config: VARGPTConfig, tokenizer: Any, *, least: int = 56 * 56, most: int = 12_845_056) -> None:
        self.config, self.tokenizer, self.least, self.most = config, tokenizer, least, most

    @classmethod
    def load(cls, config: VARGPTConfig, folder: Path) -> Processor:
        """From a model's folder.

        Raises:
            FileNotFoundError: it holds no tokenizer.
        """
        from transformers import AutoTokenizer

        place = folder / FOLDER if (folder / FOLDER).is_dir() else folder
        if not any((place / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise FileNotFoundError(
                f"{folder} holds no tokenizer, without which texts cannot be read: put tokenizer.json and "
                "tokenizer_config.json of the model there"
            )
        sizes = {}
        if (place / "preprocessor_config.json").is_file():
            found = json.loads((place / "preprocessor_config.json").read_text(encoding="utf-8"))
            names = (("least", "min_pixels"), ("most", "max_pixels"))
            sizes = {own: int(found[name]) for own, name in names if isinstance(found.get(name), int)}
        return cls(config, AutoTokenizer.from_pretrained(place, trust_remote_code=False), **sizes)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder."""
        save_tokenizer(self.tokenizer, folder)

    # --- text ----------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Mapping[str, Any]], answering: bool = True) -> tuple[str, list[Any]]:
        """The text of a conversation, and the sources of the images in it.

        Args:
            messages: as chat templates of transformers take them: ``role``, and ``content``: a text, or parts of type
                ``text`` and ``image`` (with the picture under ``image``, ``path`` or ``url``).
            answering: an answer is to come.

        Raises:
            MessageError: a message is empty or is not of this form.
        """
        if not messages:
            raise MessageError("there is no message; give at least one of the user's")
        plain, images = [], []
        for number, message in enumerate(messages, 1):
            if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
                raise MessageError(f"message {number} has no role and content; expected a mapping with both")
            content = message["content"]
            parts: list[dict[str, Any]] = []
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part.get("type") == "image":
                    source = next((part[name] for name in ("image", "path", "url") if part.get(name) is not None), None)
                    if source is None:
                        raise MessageError(f"message {number} names an image without giving one, under 'image'")
                    images.append(source)
                    parts.append({"type": "image"})
                elif part.get("type") == "text":
                    parts.append({"type": "text", "text": str(part["text"])})
                else:
                    raise MessageError(
                        f"message {number} has a part of type {part.get('type')!r}; expected text or image"
                    )
            if not any(part["type"] == "image" or part["text"].strip() for part in parts):
                raise MessageError(f"message {number} is empty: write something, or add an image")
            plain.append({"role": str(message["role"]), "content": parts})
        template = None if getattr(self.tokenizer, "chat_template", None) else TEMPLATES[self.config.variant]
        mark = self.tokenizer.convert_ids_to_tokens(self.config.marks.image)
        text = self.tokenizer.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=answering, chat_template=template, image=mark
        )
        return text, images

    def encode(
        self, text: str, images: Sequence[Any] = (), first: bool = True
    ) -> tuple[list[int], list[tuple[Tensor, tuple[int, ...]]]]:
        """Numbers of the tokens, marks of images repeated for every feature, and what the images are to the model.

        Args:
            first: a conversation begins with the text.

        Raises:
            MessageError: marks and images are not as many.
        """
        return self.place(self.numbers(text, first), images)

    def numbers(self, text: str, first: bool = True) -> list[int]:
        """Numbers of the tokens, with one mark for each image."""
        # Llama's texts begin with a token of their own.
        ids: list[int] = self.tokenizer(text, add_special_tokens=first and self.config.var is not None)["input_ids"]
        return ids

    def place(
        self, ids: Sequence[int], images: Sequence[Any]
    ) -> tuple[list[int], list[tuple[Tensor, tuple[int, ...]]]]:
        """The same with marks for every feature, and what the images are to the model; see :meth:`encode`."""
        marks = self.config.marks
        if (found := ids.count(marks.image)) != len(images):
            raise MessageError(
                f"the text has {found} marks of images and {len(images)} images were given: give every image as a part "
                f"of its message, and do not write {self.tokenizer.convert_ids_to_tokens(marks.image)} yourself"
            )
        seen = [self.image(open_image(source)) for source in images]
        counts, result = iter(self.features_of(grid) for _, grid in seen), list[int]()
        for number in ids:
            result += [number] * (next(counts) if number == marks.image else 1)
        return result, seen

    def read(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> Prompt:
        """Conversations as the model takes them.

        Raises:
            MessageError: one cannot be read, or is too long for the model.
        """
        rows, pixels, grids = [], [], []
        limit = self.config.language.get("max_position_embeddings", 2048)
        for messages in conversations:
            ids, seen = self.encode(*self.render(messages))
            if len(ids) >= limit:
                raise MessageError(
                    f"the conversation has {len(ids):,} tokens, the model reads {limit:,} at most, with its answer: "
                    "shorten it, or begin anew"
                )
            marks = self.config.marks
            if any(number in (marks.start, marks.pad, marks.end) for number in ids):
                raise MessageError("the text holds the mark of an image to draw, which only answers have: leave it out")
            rows.append(ids)
            pixels += [each for each, _ in seen]
            grids += [grid for _, grid in seen]
        return Prompt(*self.pad(rows), torch.cat(pixels) if pixels else None, self.grids(grids))

    def grids(self, grids: Sequence[tuple[int, ...]]) -> Int[Tensor, "images 3"]:
        """Patch grids of images."""
        return torch.tensor([list(grid) for grid in grids if grid], dtype=torch.long).view(-1, 3)

    def pad(self, rows: Sequence[Sequence[int]], left: bool = True) -> tuple[Tensor, Tensor]:
        """Texts of various length as one batch, and where they are."""
        longest, empty = max(len(row) for row in rows), self.config.marks.empty
        fills = [[empty] * (longest - len(row)) for row in rows]
        ids = [[*fill, *row] if left else [*row, *fill] for row, fill in zip(rows, fills, strict=True)]
        ones = [
            [0] * len(f) + [1] * len(r) if left else [1] * len(r) + [0] * len(f)
            for r, f in zip(rows, fills, strict=True)
        ]
        return torch.tensor(ids), torch.tensor(ones)

    def decode(self, ids: Sequence[int]) -> str:
        """Words, without marks."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    # --- images --------------------------------------------------------------------------------------------

    def features_of(self, grid: tuple[int, ...]) -> int:
        """Features of an image of this patch grid; () in v1, where all images have as many."""
        vision = self.config.vision
        if not grid:
            return (vision["image_size"] // vision["patch_size"]) ** 2 + self.config.keep_class_token
        return math.prod(grid) // vision.get("spatial_merge_size", 2) ** 2

    def image(self, image: Image) -> tuple[Tensor, tuple[int, ...]]:
        """Pixels as the vision model takes them, and the patch grid; () in v1."""
        from PIL.Image import Resampling

        vision = self.config.vision
        if self.config.var is not None:
            size = vision["image_size"]
            scale = size / min(image.size)
            width, height = (max(size, int(side * scale)) for side in image.size)
            left, top = (width - size) // 2, (height - size) // 2
            image = image.resize((width, height), Resampling.BICUBIC).crop((left, top, left + size, top + size))
            return _normal(image)[None], ()
        patch, merge = vision.get("patch_size", 14), vision.get("spatial_merge_size", 2)
        height, width = fitted(image.height, image.width, patch * merge, self.least, self.most)
        pixels = _normal(image.resize((width, height), Resampling.BICUBIC))
        frames, rows, columns = vision.get("temporal_patch_size", 2), height // patch, width // patch
        # Patches come merge x merge at a time, as they are merged into one feature.
        cut = pixels.view(3, rows // merge, merge, patch, columns // merge, merge, patch)
        flat = cut.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5).expand(-1, -1, -1, -1, -1, frames, -1, -1)
        return flat.reshape(rows * columns, -1), (1, rows, columns)


FOLDER = "processor"
"""Where a saved model keeps its tokenizer."""


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the files of a tokenizer of transformers into a folder, each whole or not at all."""
    with TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        for path in sorted(each for each in Path(temporary).rglob("*") if each.is_file()):
            content = path.read_bytes()
            write_atomically(folder / path.relative_to(temporary), partial(_put, content=content))


def _put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _normal(image: Image) -> Float[Tensor, "3 height width"]:
    values = torch.from_numpy(np.asarray(image, np.float32) / 255)
    return ((values - torch.tensor(MEAN)) / torch.tensor(SPREAD)).movedim(-1, 0).contiguous()


def fitted(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Sides that are multiples of a factor, near an image's, with pixels within bounds (arXiv 2409.12191, section 2.1).

    Raises:
        MessageError: one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise MessageError(f"an image of {width} x {height} pixels is too narrow to read: cut it")
    sides = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if math.prod(sides) > most:
        shrink = math.sqrt(height * width / most)
        sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif math.prod(sides) < least:
        grow = math.sqrt(least / (height * width))
        sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return sides[0], sides[1]
