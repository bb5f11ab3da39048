"""Training STAR: the backbone by teacher forcing, then the sampling head on its frozen features.

Ma et al. 2024 (arXiv 2406.10797); official code Davinci-XLab/STAR-T2I, ``trainer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nextscale.core.random import sample_draws, step_draws
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import Batch, Metrics
from nextscale.tasks.generation.star import STAR, SYSTEM
from nextscale.tasks.generation.star_transformer import STARBlock
from nextscale.tasks.generation.text import TextFeatures
from nextscale.tasks.generation.text_recipe import TextTraining

KNOWN_LOGIT = 10.0
"""Score of the class "known" at known tokens, where all codes have 0: a loss that does not depend on the weights."""


def initialize(model: STAR, *, head: float = 0.02, std: float | None = None, backbone: bool = True) -> STAR:
    """STAR's initial weights, for training anew.

    Args:
        head: factor of the backbone's last linear layer.
        std: of linear layers and embeddings; None: sqrt(1 / (3 width)), which positions always have.
        backbone: else only the sampling head is drawn, for a backbone that has its weights.
    """
    blocks = model.config.transformer
    usual = math.sqrt(1 / blocks.width / 3)
    std = usual if std is None else std
    with torch.no_grad():
        for name, module in model.named_modules():
            own = name.startswith("stable.") or (backbone and not name.startswith("tokenizer."))
            if own and isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        if model.stable is not None:
            nn.init.trunc_normal_(model.stable.start_position, std=usual)
        if not backbone:
            return model
        for table in (model.start_position, model.position_embedding):
            if table is not None:
                nn.init.trunc_normal_(table, std=usual)
        model.head.weight.mul_(head)
        for block in cast("Sequence[STARBlock]", model.transformer.blocks):
            block.attention.projection.weight.div_(math.sqrt(2 * blocks.depth))
            block.feed_forward.contract.weight.div_(math.sqrt(2 * blocks.depth))
            if blocks.conditioning == "shared":
                block.modulation_offset[:2].mul_(5e-5)
                block.modulation_offset[2:].mul_(0.5)
    return model


@dataclass(frozen=True)
class STARLossConfig:
    """Attributes:

    label_smoothing: of the loss; the metrics use none.
    spare_short: texts of at most so many characters are never replaced by the empty one.
    length: tokens that take part, where that is less than all; the others, drawn anew for every batch, are left out; 0:
        all take part. Published for 1024 px: 8800 of 9451.
    cut_from: place of the first scale that tokens are left out of.
    cut_sum: where tokens are left out, sum over the images of a batch instead of averaging, as the official trainer
        does: gradients are then clipped sooner.
    """

    label_smoothing: float = 0.0
    spare_short: int = 20
    length: int = 0
    cut_from: int = 13
    cut_sum: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1 or min(self.spare_short, self.length, self.cut_from) < 0:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, spare_short {self.spare_short}, length {self.length} and "
                f"cut_from {self.cut_from}; expected a share in [0, 1), and numbers of 0 or more"
            )


def kept_places(
    schedule: ScaleSchedule,
    config: STARLossConfig,
    permutation: Int[Tensor, " fine"] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " kept"] | None:
    """Places of the tokens that take part, rising; None: all.

    Args:
        permutation: of the tokens from the scale ``cut_from`` on, of which the first are left out; None: drawn, by
            ``generator``.

    Raises:
        ValueError: so many cannot be left out of those scales.
    """
    dropped = schedule.length - config.length
    if not config.length or dropped <= 0:
        return None
    start = schedule.ranges[config.cut_from][0] if config.cut_from < len(schedule) else schedule.length
    if dropped > schedule.length - start:
        raise ValueError(
            f"length {config.length} leaves {dropped} of {schedule.length} tokens out, and from scale "
            f"{config.cut_from} on there are {schedule.length - start}: raise length or lower cut_from"
        )
    order = permutation
    if order is None:
        order = torch.randperm(schedule.length - start, generator=generator)
    keep = torch.ones(schedule.length, dtype=torch.bool)
    keep[start + order[:dropped].cpu()] = False
    return keep.nonzero()[:, 0]


def drop_texts(texts: Sequence[str], uniform: Float[Tensor, " texts"], share: float, spare_short: int = 0) -> list[str]:
    """Texts, those with a ``uniform`` below ``share`` replaced by the empty one if they are long enough."""
    dropped = (uniform < share).tolist()
    return ["" if drop and len(text) > spare_short else text for text, drop in zip(texts, dropped, strict=True)]


class _STARTask(TextTraining):
    """What both stages of the training share.

    A batch holds ``image`` (batch, 3, height, width) in [-1, 1] and ``text``: the texts of the images, or features of
    them, which are taken as they are; ``uniform`` in [0, 1) for dropping texts.
    """

    name = SYSTEM

    def __init__(self, model: STAR, config: STARLossConfig | None = None) -> None:
        self.model, self.config = model, config or STARLossConfig()
        self.phases: dict[str, nn.Module] = {SYSTEM: model}

    def text(self, batch: Batch) -> TextFeatures:
        """The features of the batch's texts, of which some are dropped."""
        given: Any = batch["text"]
        if isinstance(given, TextFeatures):
            return given
        texts = drop_texts(list(given), batch["uniform"], self.model.config.text_drop, self.config.spare_short)
        return self.model.features(texts)

    def tokens(self, images: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor]:
        """All tokens of images, and the inputs they imply."""
        model = self.model
        quantizer, schedule = model.tokenizer.quantizer, model.config.schedule
        # The frozen tokenizer works in its own precision, outside autocast.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            tokens = torch.cat(quantizer.encode(model.tokenizer.features(images), schedule)[0], dim=1)
            return tokens, quantizer.teacher_inputs(tokens, schedule)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Metrics:
        """Loss and accuracy on a batch in which no text is dropped."""
        uniform = torch.ones(len(batch["image"]), device=self.model.device)
        loss, metrics = self.loss(self.name, self.model, {**batch, "uniform": uniform}, 0)
        return {"loss": loss, **metrics}


class STARTraining(_STARTask):
    """Trains a :class:`nextscale.tasks.generation.star.STAR` without its sampling head.

    Where tokens are left out, ``permutation`` of a batch says which (:func:`kept_places`); else they are drawn.
    """

    def __init__(self, model: STAR, config: STARLossConfig | None = None) -> None:
        super().__init__(model, config)
        if model.stable is not None:
            model.stable.requires_grad_(False)

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        schedule = self.model.config.schedule
        tokens, inputs = self.tokens(batch["image"])
        common = step_draws(step, "places") if "seeds" in batch else None
        keep = kept_places(schedule, self.config, batch.get("permutation"), common)
        fine = schedule.ranges[-1][0]
        if keep is not None:
            keep = keep.to(tokens.device)
            tokens, fine = tokens[:, keep], schedule.ranges[self.config.cut_from][0]
        logits = module(inputs, self.text(batch), schedule, keep)
        flat, target = logits.flatten(0, 1), tokens.flatten()
        smoothing = self.config.label_smoothing
        losses = F.cross_entropy(flat, target, label_smoothing=smoothing, reduction="none").view(tokens.shape)
        with torch.no_grad():
            plain = F.cross_entropy(flat, target, reduction="none").view(tokens.shape) if smoothing else losses.detach()
            right = (logits.argmax(-1) == tokens).float() * 100
            metrics: Metrics = {
                "cross_entropy": plain.mean(),
                "cross_entropy_last": plain[:, fine:].mean(),
                "accuracy": right.mean(),
                "accuracy_last": right[:, fine:].mean(),
            }
        images = losses.mean(1)
        return images.sum() if keep is not None and self.config.cut_sum else images.mean(), metrics


def known_tokens(
    ratio: Float[Tensor, " batch"], uniform: Float[Tensor, "batch tokens"]
) -> Bool[Tensor, "batch tokens"]:
    """Which tokens the sampling head is shown in training: each with the probability arccos(ratio) / (pi / 2)."""
    return uniform < (ratio.arccos() / (torch.pi / 2))[:, None]


class STARHeadTraining(_STARTask):
    """Trains the sampling head alone, on the frozen backbone's features.

    A batch may hold ``ratio`` (batch,) and ``known_uniform`` (batch, fine tokens) in [0, 1), of :func:`known_tokens`;
    else they are drawn.

    Raises:
        ValueError: the model has no sampling head.
    """

    def __init__(self, model: STAR, config: STARLossConfig | None = None) -> None:
        super().__init__(model, config)
        if model.stable is None:
            raise ValueError("this STAR has no sampling head to train; make one with stable_from")
        if self.config.length:
            raise ValueError("the sampling head is trained on whole scales: leave length at 0")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("stable."))

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        model, schedule = self.model, self.model.config.schedule
        first = model.config.stable_from
        assert first is not None
        tokens, inputs = self.tokens(batch["image"])
        tokens = tokens[:, schedule.ranges[first][0] :]
        known = self.known(batch, tokens)
        codes = model.tokenizer.quantizer.lookup(tokens) * known[..., None]
        model.transformer.eval()  # features as in sampling: no block is skipped
        logits = module(inputs, self.text(batch), schedule, None, codes)
        # A class of its own for known tokens, which competes with the codes where a token is not known.
        vocabulary = model.config.vocabulary
        logits = F.pad(logits.masked_fill(known[..., None], 0.0), (0, 1))
        logits[..., -1] = known * KNOWN_LOGIT
        target = tokens.masked_fill(known, vocabulary)
        smoothing = self.config.label_smoothing
        flat = logits.flatten(0, 1)
        losses = F.cross_entropy(flat, target.flatten(), label_smoothing=smoothing, reduction="none")
        with torch.no_grad():
            plain = F.cross_entropy(flat, target.flatten()) if smoothing else losses.detach().mean()
            right = (logits.argmax(-1) == target) & ~known
            metrics: Metrics = {
                "cross_entropy": plain,
                "accuracy": 100 * right.sum() / (~known).sum().clamp(min=1),
                "known": 100 * known.float().mean(),
            }
        # Weighted as in a sequence of all scales, of which the fine ones are a part.
        return losses.view(tokens.shape).sum(1).mean() / schedule.length, metrics

    def known(self, batch: Batch, tokens: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """Which tokens are shown."""
        ratio, uniform = batch.get("ratio"), batch.get("known_uniform")
        draws, cpu = sample_draws(batch, "known"), torch.device("cpu")
        ratio = draws.uniform(tokens.shape[:1], cpu) if ratio is None else ratio
        uniform = draws.uniform(tokens.shape, cpu) if uniform is None else uniform
        return known_tokens(ratio, uniform).to(tokens.device)
