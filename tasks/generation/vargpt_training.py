"""Training VARGPT: text and images in one pass, by stages in which different parts learn.

Zhuang et al. 2025 (arXiv 2501.12327, section 3.2; arXiv 2504.02949, section 3); official code
VARGPT-family/VARGPT-v1.1, ``VARGPT-family-training``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.bitwise import bit_cross_entropy, margins
from nextscale.core.training import Batch, Metrics, TrainingTask
from nextscale.tasks.generation.adapters import adapters_of, adapters_off
from nextscale.tasks.generation.infinity import Infinity
from nextscale.tasks.generation.infinity_training import InfinityLossConfig, draw_flips
from nextscale.tasks.generation.vargpt import SYSTEM, VARGPT
from nextscale.tasks.generation.vargpt_language import train_plainly

Stage = Literal["all", "1", "2", "12", "3", "0", "4", "5"]
IGNORED = -100
"""Label of a token that no loss counts."""

PARTS: dict[str, tuple[str, ...]] = {
    "text": ("language.text.", "language.words."),
    "vision": ("language.vision.",),
    "reader": ("language.reader.",),
    "projectors": ("to_language.", "from_language."),
    "labels": ("start_embedding.", "decoder.class_embedding."),
    "decoder": ("decoder.",),
}
"""What trains together, by the beginnings of parameters' names; the first that fits counts."""

_EVERYTHING = ("text", "vision", "reader", "projectors", "labels", "decoder")
_NO_VISION = ("text", "projectors", "labels", "decoder")
_DECODER = ("projectors", "labels", "decoder")
STAGES: dict[str, dict[str, tuple[str, ...]]] = {
    "v1": {
        "all": _EVERYTHING,
        "0": _EVERYTHING,
        "1": ("projectors", "labels"),
        "2": ("text",),
        "12": ("text", "reader"),
        "3": _DECODER,
    },
    "v1.1": {
        "all": _EVERYTHING,
        "0": _DECODER,
        "1": ("projectors", "labels"),
        "2": ("text",),
        "3": _DECODER,
        "4": _NO_VISION,
        "5": _EVERYTHING,
    },
}
"""Parts that learn, by version and published stage; ``all``: everything but the tokenizer."""


def freeze(model: VARGPT, stage: str) -> None:
    """Let only the parts of a stage learn; the tokenizer never does.

    Raises:
        ValueError: the version has no such stage, or the model is folded.
    """
    if model.config.folded:
        raise ValueError("a folded model cannot be trained: its maps of conditions are gone; load it unfolded")
    stages = STAGES[model.config.variant]
    if stage not in stages:
        raise ValueError(f"{model.config.variant} has no stage {stage!r}; it has {', '.join(stages)}")
    for name, parameter in model.named_parameters():
        part = next(part for part, begins in PARTS.items() if name.startswith(begins))
        parameter.requires_grad_(part in stages[stage] and not name.startswith("decoder.tokenizer."))


@dataclass(frozen=True)
class VARGPTLossConfig:
    """Attributes:

    text: which tokens of text count: ``"answers"``: those with labels; ``"published"``: where the batch has images to
        draw, all but the pads that stand for them, prompts and padding included, as the official code has it.
    train: the stage, of :data:`STAGES`.
    label_drop: share of images drawn without their label.
    flip_strength, flip_scales: v1.1: see :class:`nextscale.tasks.generation.infinity_training.InfinityLossConfig`.
    """

    text: Literal["answers", "published"] = "answers"
    train: str = "all"
    label_drop: float = 0.1
    flip_strength: float = 0.3
    flip_scales: int = 13

    def __post_init__(self) -> None:
        if self.text not in ("answers", "published"):
            raise ValueError(f"text is {self.text!r}; expected answers or published")
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"label_drop is {self.label_drop}; expected a share in [0, 1]")


def image_losses(logits: Float[Tensor, "images length choices"], tokens: Tensor) -> Float[Tensor, "images length"]:
    """Cross-entropy of every token; of bits, their mean."""
    if tokens.dtype == torch.bool:
        return bit_cross_entropy(logits, tokens).mean(-1)
    return F.cross_entropy(logits.float().mT, tokens, reduction="none")


def image_log_probabilities(logits: Float[Tensor, "images length choices"], tokens: Tensor) -> Float[Tensor, " images"]:
    """Log-probability of every image: the sum over its tokens (and their bits)."""
    bits = tokens.shape[-1] if tokens.dtype == torch.bool else 1
    return -image_losses(logits, tokens).sum(1) * bits


class VARGPTTraining(TrainingTask):
    """Trains a :class:`nextscale.tasks.generation.vargpt.VARGPT`.

    A batch holds ``ids`` and ``mask`` (batch, length); ``labels``, :data:`IGNORED` where nothing counts; ``pixels`` and
    ``grids`` of the images to read, where there are any; ``image`` (images, 3, height, width) in [-1, 1] to draw, where
    there are any; and, where conversations are packed, ``talks`` (batch, length): the number of each token's, 0 where
    there is none. ``dropped`` and ``flips`` are drawn where they are missing.
    """

    name = SYSTEM

    def __init__(self, model: VARGPT, config: VARGPTLossConfig | None = None) -> None:
        self.model, self.config = model, config or VARGPTLossConfig()
        freeze(model, self.config.train)
        train_plainly(model.language.text, model.device)
        self.phases: dict[str, nn.Module] = {SYSTEM: model}

    def flips(self, count: int) -> list[Tensor]:
        """Bits to turn over in so many images; none in v1."""
        decoder = self.model.decoder
        if not isinstance(decoder, Infinity):
            return []
        config = InfinityLossConfig(self.config.flip_strength, self.config.flip_scales)
        return draw_flips(decoder, count, self.model.config.schedule, config)

    @torch.no_grad()
    def teacher_forced(self, batch: Batch) -> tuple[Tensor, Float[Tensor, "images rest channels"]]:
        """Tokens of the images to draw, and the decoder's inputs."""
        images, schedule, tokenizer = batch["image"], self.model.config.schedule, self.model.tokenizer
        with torch.autocast(images.device.type, enabled=False):
            features = tokenizer.features(images.float())
            if self.model.config.infinity is None:
                tokens = torch.cat(tokenizer.quantizer.encode(features, schedule)[0], dim=1)
                return tokens, tokenizer.quantizer.teacher_inputs(tokens, schedule)
            flips = batch.get("flips")
            flips = self.flips(len(images)) if flips is None else flips
            bits, totals = tokenizer.quantizer.encode(features, schedule, flips=flips)
            return torch.cat(bits, dim=1), tokenizer.quantizer.inputs(totals, schedule)

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        states, logits, tokens = self.run(module, batch)
        text = self.text_loss(states, batch)
        metrics: Metrics = {"text_loss": text.detach()}
        if logits is None or tokens is None:
            return text, metrics
        image = image_losses(logits, tokens).mean()
        with torch.no_grad():
            guess = margins(logits) > 0 if tokens.dtype == torch.bool else logits.argmax(-1)
            metrics |= {"image_loss": image.detach(), "accuracy": 100 * (guess == tokens).float().mean()}
        return text + self.model.config.image_weight * image, metrics

    def run(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Hidden states, and scores and tokens of the images to draw."""
        model, device = self.model, self.model.device
        ids, mask = batch["ids"], batch["mask"]
        pixels, features = batch.get("pixels"), None
        if pixels is not None and len(pixels):
            features = model.language.see(pixels, batch["grids"])
        given: dict[str, Any] = {"features": features}
        talks = batch.get("talks")
        if talks is not None:
            mask, given["positions"] = packed_view(talks, model.language.axes)
            given["talks"] = talks
        images = batch.get("image")
        if images is None or not len(images):
            states, _ = module(ids, mask, **given)
            return states, None, None
        tokens, inputs = self.teacher_forced(batch)
        dropped = batch.get("dropped")
        if dropped is None:
            dropped = torch.rand(len(images), device=device) < self.config.label_drop
        states, logits = module(ids, mask, inputs, dropped, **given)
        return states, logits, tokens

    def text_loss(self, states: Float[Tensor, "batch length width"], batch: Batch) -> Float[Tensor, ""]:
        """Mean cross-entropy of the next token; scores are computed where it counts, and nowhere else."""
        ids, images = batch["ids"], batch.get("image")
        if self.config.text == "published" and images is not None and len(images):
            labels = ids.masked_fill(ids == self.model.config.marks.pad, IGNORED)
        else:
            labels = batch["labels"]
        wanted, before = labels[:, 1:], states[:, :-1]
        talks = batch.get("talks")
        counts = wanted != IGNORED
        if talks is not None:  # the first token of a conversation does not follow from the one before
            counts = counts & (talks[:, 1:] == talks[:, :-1])
        logits = self.model.language.words(before[counts]).float()
        if not len(logits):
            return states.sum() * 0.0
        return F.cross_entropy(logits, wanted[counts])

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Metrics:
        """Losses of a batch in which no label is dropped."""
        count = len(batch["image"]) if batch.get("image") is not None else 0
        kept = torch.zeros(count, dtype=torch.long, device=self.model.device)
        loss, metrics = self.loss(SYSTEM, self.model, {**batch, "dropped": kept}, 0)
        return {"loss": loss, **metrics}


def packed_view(talks: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """What each token of packed conversations sees, and where it stands.

    Args:
        talks: (batch, length): number of each token's conversation.

    Returns:
        bool (batch, 1, length, length): True where a token (row) sees another (column), the same conversation up to
        itself; and positions (axes, batch, length), from 0 in every conversation.
    """
    length = talks.shape[1]
    steps = torch.arange(length, device=talks.device)
    same = talks[:, :, None] == talks[:, None, :]
    visible = same & (steps[:, None] >= steps)
    first = torch.where(same, steps, length).min(-1).values
    return visible[:, None], (steps - first).expand(axes, -1, -1)


# --- preferences ----------------------------------------------------------------------------------------


class VARGPTPreference(VARGPTTraining):
    """Trains by pairs of images of one prompt, of which one is liked better (DPO: Rafailov et al. 2023, arXiv
    2305.18290; arXiv 2504.02949, section 3.3): the log-probability of an image is all that counts, no text.

    A batch is that of :class:`VARGPTTraining` with one image to draw in each row, liked in the first half of the rows,
    disliked in the other, under the same prompts.

    Args:
        reference: what the model started from; None: the model itself with its adapters turned off.
        beta: how far the model may leave the reference.
        redraw: turn other bits over for the reference than for the model, as the published code does.
    """

    def __init__(
        self,
        model: VARGPT,
        reference: VARGPT | None,
        config: VARGPTLossConfig | None = None,
        *,
        beta: float = 0.1,
        redraw: bool = False,
    ) -> None:
        super().__init__(model, config)
        if beta <= 0:
            raise ValueError(f"beta is {beta}; expected more than 0, such as 0.1")
        self.reference, self.beta, self.redraw = reference, beta, redraw
        if reference is not None:
            reference.requires_grad_(False).eval()
        elif not adapters_of(model):
            raise ValueError("preferences need what the model started from: give reference, or train adapters (LoRA)")

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        images = batch["image"]
        if len(images) % 2 or len(images) != len(batch["ids"]):
            raise ValueError(f"{len(images)} images are no pairs of liked and disliked ones, one image to each row")
        given = dict(batch)
        given.setdefault("dropped", torch.zeros(len(images), dtype=torch.long, device=images.device))
        if given.get("flips") is None:
            given["flips"] = self.flips(len(images))
        own = self.log_probabilities(module, given)
        if self.redraw:
            given["flips"] = self.flips(len(images))
        with torch.no_grad():
            if self.reference is not None:
                base = self.log_probabilities(self.reference, given)
            else:
                with adapters_off(self.model):
                    base = self.log_probabilities(self.model, given)
        gained, lost = (own - base).chunk(2)
        margin = self.beta * (gained - lost)
        metrics: Metrics = {
            "margin": margin.detach().mean(),
            "preferred": 100 * (margin > 0).float().mean(),
            "gained": self.beta * gained.detach().mean(),
        }
        return -F.logsigmoid(margin).mean(), metrics

    def log_probabilities(self, module: nn.Module, batch: Batch) -> Float[Tensor, " images"]:
        """Of every image of the batch."""
        _, logits, tokens = self.run(module, batch)
        assert logits is not None and tokens is not None
        return image_log_probabilities(logits, tokens)
