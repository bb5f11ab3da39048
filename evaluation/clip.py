"""How well images fit texts, by a CLIP model of transformers.

CLIP score (Hessel et al. 2021, arXiv 2104.08718): the cosine of an image's and its text's embedding, 0 where it is
negative. It is given times 100, as text-to-image papers report it (the original paper multiplies by 2.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor


class Clip:
    """A CLIP model with its preprocessing.

    Args:
        source: folder or hub name, such as ``openai/clip-vit-large-patch14``.

    Raises:
        ValueError: the source holds no CLIP model.
        OSError: it is not here and cannot be fetched.
    """

    def __init__(self, source: str | Path, device: str | torch.device = "cpu") -> None:
        from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        kind = AutoConfig.from_pretrained(source).model_type
        if kind != "clip":
            raise ValueError(f"{source} is a {kind!r} model of transformers, expected a CLIP with both its towers")
        self.source, self.device = str(source), torch.device(device)
        self.model: Any = CLIPModel.from_pretrained(source).to(self.device).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
        self._processor: Any = CLIPImageProcessorPil.from_pretrained(source)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image], batch_size: int = 32) -> Float[Tensor, "images channels"]:
        """Unit embeddings of images."""
        parts = []
        for start in range(0, len(images), batch_size):
            pixels = self._processor(list(images[start : start + batch_size]), return_tensors="pt")["pixel_values"]
            vision = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
            parts.append(self.model.visual_projection(vision))
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str], batch_size: int = 256) -> Float[Tensor, "texts channels"]:
        """Unit embeddings of texts, cut to what the model reads."""
        limit = self.model.config.text_config.max_position_embeddings
        parts = []
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            read = self._tokenizer(batch, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            given = {name: read[name].to(self.device) for name in ("input_ids", "attention_mask")}
            parts.append(self.model.text_projection(self.model.text_model(**given).pooler_output))
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    def score(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Float[Tensor, " images"]:
        """CLIP scores, 0 to 100, of images and the text of each."""
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} texts were given: give one text for each image")
        cosines = (self.images(images) * self.texts(texts)).sum(-1)
        return 100 * cosines.clamp(min=0)

    def classify(self, images: Sequence[Image.Image], prompts: Sequence[Sequence[str]]) -> list[int]:
        """For each image the class whose texts, as unit embeddings averaged and normalised anew, lie nearest.

        Args:
            prompts: the texts of each class.
        """
        flat = self.texts([text for texts in prompts for text in texts])
        means = [part.mean(0) for part in flat.split([len(texts) for texts in prompts])]
        classes = torch.nn.functional.normalize(torch.stack(means), dim=-1)
        return (self.images(images) @ classes.T).argmax(1).tolist()
