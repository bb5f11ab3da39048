"""What all text-to-image generators offer: pictures of prompts, from seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.checkpoint import assign, save_folder, weightless
from nextscale.core.config import from_json, to_json
from nextscale.core.random import BatchDraws, Draws, ImageDraws, image_seeds
from nextscale.core.sampling import ScaleStep
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.text import TextEncoder, TextEncoderConfig, TextFeatures

Painter = Callable[[Sequence[int], Draws], Iterator[ScaleStep]]
"""Draws images of some of the texts it was made with: of their numbers, one per image."""


Prompt = str | Sequence[str] | TextFeatures


@dataclass(frozen=True)
class DrawnText:
    """One batch.

    Attributes:
        images: in [0, 1], on the CPU.
        texts: number of each image's prompt among those given.
        forming: what is decoded after each scale, coarse to fine, for the first few images of the batch; None where it
            was not asked for.
    """

    images: Float[Tensor, "batch 3 height width"]
    texts: list[int]
    seeds: list[int]
    tokens: Int[Tensor, "batch length ..."]
    forming: Float[Tensor, "scales few 3 height width"] | None = None


class TextToImage(nn.Module):
    """A network and its frozen tokenizer, and the text encoder that it was trained with.

    Attributes:
        tokenizer: takes no gradient and stays in evaluation form.
        home: the folder it was loaded from, where a text encoder may lie too.
        schedule_of: the scales to draw, of the system's options of sampling.
        system, config_class, tokenizer_class: what saved folders are marked with, and what their parts are.
        painter: the network with the texts it is to draw: of their features, the features of what to stay away from
            (for each text; None: no text), and the system's options of sampling.
    """

    system: ClassVar[str]
    config_class: ClassVar[type]
    tokenizer_class: ClassVar[Any]
    config: Any
    tokenizer: Any
    schedule_of: Callable[..., ScaleSchedule]
    painter: Callable[..., Painter]

    def __init__(self, text: TextEncoderConfig) -> None:
        super().__init__()
        self.home: Path | None = None
        self._text_config = text
        self._encoder: list[TextEncoder] = []  # in a list, as it is no part of the network

    # --- as any module -----------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.tokenizer.eval()
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def picture(self, total: Tensor) -> Float[Tensor, "batch 3 height width"]:
        """The images, in [0, 1], of what the scales amount to (:attr:`nextscale.core.sampling.ScaleStep.total`)."""
        return (self.tokenizer.decode_features(total) + 1) / 2

    # --- text --------------------------------------------------------------------------------------------

    @property
    def text_encoder(self) -> TextEncoder:
        """The encoder of prompts; set it to one with other options (device, few bits, a cache)."""
        if not self._encoder:
            self._encoder = [TextEncoder(self._text_config, home=self.home)]
        return self._encoder[0]

    @text_encoder.setter
    def text_encoder(self, encoder: TextEncoder) -> None:
        self._encoder = [encoder]

    def save_encoder(self, folder: str | Path) -> TextEncoderConfig:
        """Copy the text encoder into a folder, where it is a small one in a folder of its own.

        Returns:
            What names it from there.
        """
        return self.text_encoder.save(folder)

    def save(self, folder: str | Path) -> Path:
        """Write ``model.safetensors``, tokenizer included, and ``config.json``; a small text encoder goes along."""
        own = replace(self.config, text=self.save_encoder(folder))
        config = {"transformer": to_json(own), "tokenizer": to_json(self.tokenizer.config)}
        return save_folder(folder, self.state_dict(), {"system": self.system, "config": config})

    @classmethod
    def from_saved(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """From the content of a folder written by :meth:`save`."""
        parts, kind = config["config"], cls.tokenizer_class
        make: Callable[..., Self] = cls
        with weightless():
            tokenizer = kind(from_json(kind.config_class, parts["tokenizer"]))
            model = make(from_json(cls.config_class, parts["transformer"]), tokenizer)
        assign(model, state, f"the saved {cls.__name__}")
        return model.eval()

    def features(self, prompt: Prompt) -> TextFeatures:
        """What the network reads of prompts.

        Raises:
            ValueError: the encoder is not of the width the network was made for.
        """
        if isinstance(prompt, TextFeatures):
            found = prompt
        else:
            found = self.text_encoder.encode([prompt] if isinstance(prompt, str) else list(prompt))
        width = found.states.values.shape[-1]
        if width != self.config.text_width:
            raise ValueError(
                f"the text encoder gives {width} channels, the model reads {self.config.text_width}: it was trained "
                f"with {self._text_config.name}"
            )
        return found

    def no_prompt(self, **given: Any) -> str | None:
        """The prompt that stands for no text, in systems that learn nothing else for it; options as :meth:`draw`'s."""
        return None

    # --- drawing -----------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        n: int | None = None,
        seed: int | Sequence[int] = 0,
        **options: Any,
    ) -> Float[Tensor, "n 3 height width"]:
        """Images in [0, 1], on the CPU.

        Args:
            prompt: a text or several, repeated to ``n`` images, or features made of them before.
            n: number of images; None: as many as there are prompts.
            seed: image i is drawn from ``seed + i``, so it comes out the same alone and in any batch; or one seed per
                image.
            options: of :meth:`draw`, and the system's own.

        Raises:
            ValueError: there is no prompt, ``n`` is below 1, or the number of seeds is another.
        """
        return torch.cat([batch.images for batch in self.draw(prompt, n, seed, **options)])

    @torch.inference_mode()
    def draw(
        self,
        prompt: Prompt,
        n: int | None = None,
        seed: int | Sequence[int] = 0,
        *,
        negative_prompt: Prompt | None = None,
        batch_size: int = 4,
        official_draws: bool = False,
        release_encoder: bool = False,
        forming: int = 0,
        progress: Callable[[int, int], None] | None = None,
        **given: Any,
    ) -> Iterator[DrawnText]:
        """The images of :meth:`generate`, by batches.

        Args:
            negative_prompt: what to stay away from: one text, or one for each prompt.
            batch_size: images computed at once; only memory and speed depend on it, without ``official_draws``.
            official_draws: consume one generator per batch in the official code's order, seeded with the batch's first
                seed.
            release_encoder: let the text encoder go before images are drawn, so that both need not fit into memory.
            forming: keep what is decoded after each scale for so many images, the first.
            progress: called with (scales done, scales in all) over all batches.
            given: the system's options of sampling.
        """
        # First of all, so that what is wrong with them shows before anything is computed.
        schedule = self.schedule_of(**given)
        single = isinstance(prompt, str)
        if not single and not len(prompt):
            raise ValueError("the list of prompts is empty; give at least one")
        count = 1 if single else len(prompt)
        n = count if n is None else n
        seeds = image_seeds(seed, n)
        wanted = self.features(prompt)
        negative_prompt = self.no_prompt(**given) if negative_prompt is None else negative_prompt
        others = None if negative_prompt is None else self.features(negative_prompt)
        if others is not None and len(others) not in (1, count):
            raise ValueError(
                f"{len(others)} negative prompts were given for {count} prompts: give one, or one for each"
            )
        if release_encoder and self._encoder:
            self.text_encoder.release()
        total_scales = len(schedule) * -(-n // batch_size)
        painted: tuple[int, ...] = ()
        done = 0
        for start in range(0, n, batch_size):
            texts = [i % count for i in range(start, min(start + batch_size, n))]
            different = tuple(sorted(set(texts)))
            if different != painted:  # else the texts have been read already
                negative = None if others is None else others.select([i % len(others) for i in different])
                painter, painted = self.painter(wanted.select(different), negative, **given), different
            own = seeds[start : start + batch_size]
            draws = self.draws(own, official_draws)
            few = max(min(forming - start, len(texts)), 0)
            tokens, totals = [], []
            for step in painter([different.index(text) for text in texts], draws):
                tokens.append(step.tokens.cpu())
                if few:
                    totals.append(step.total[:few])
                done += 1
                if progress is not None:
                    progress(done, total_scales)
            images = self.picture(step.total).cpu()
            pictures = torch.stack([self.picture(total).cpu() for total in totals]) if few else None
            yield DrawnText(images, texts, own, torch.cat(tokens, 1), pictures)

    def draws(self, seeds: Sequence[int], official: bool = False) -> Draws:
        """Randomness for a batch: a generator per image, or one on the model's device in the official order."""
        if official:
            return BatchDraws(torch.Generator(self.device).manual_seed(seeds[0]))
        return ImageDraws(seeds)
