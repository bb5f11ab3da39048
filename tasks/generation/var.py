"""VAR: class-conditional image generation by next-scale prediction.

Tian et al. 2024, "Visual Autoregressive Modeling" (arXiv 2404.02905, NeurIPS); official code and weights
FoundationVision/VAR.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.cache import KeyValueCache
from nextscale.core.checkpoint import CheckpointError, KeyMap, assign, find_state_dict
from nextscale.core.heads import CategoricalEmitter, CategoricalHead
from nextscale.core.random import BatchDraws, Draws, ImageDraws
from nextscale.core.sampling import Control, ScaleStep, classifier_free, sample
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import NextScaleTransformer, TransformerConfig
from nextscale.tasks.tokenizers.residual_vq import SCHEDULE_256, SCHEDULE_512, SCHEDULE_1024, ResidualVQ


@dataclass(frozen=True)
class VARConfig:
    """Attributes:

    classes: number of classes; one more embedding row stands for "no class".
    label_drop: probability that a label is replaced by "no class" in training, for guidance.
    schedule: scales in training and, where none are given, in sampling.
    """

    transformer: TransformerConfig
    classes: int = 1000
    vocabulary: int = 4096
    code_channels: int = 32
    schedule: ScaleSchedule = SCHEDULE_256
    label_drop: float = 0.1

    @classmethod
    def of_depth(cls, depth: int, **changes: Any) -> VARConfig:
        """The paper's family: width 64 d, d heads, drop path 0.1 d / 24 (section 3.3)."""
        transformer = TransformerConfig(64 * depth, depth, depth, drop_path=0.1 * depth / 24)
        return cls(transformer, **changes)


PRESETS: dict[str, VARConfig] = {
    **{f"var-d{depth}": VARConfig.of_depth(depth) for depth in (16, 20, 24, 30)},
    "var-d36": replace(
        VARConfig.of_depth(36, schedule=SCHEDULE_512),
        transformer=replace(VARConfig.of_depth(36).transformer, conditioning="shared"),
    ),
}
"""Released models, by name."""


class VAR(nn.Module):
    """The transformer over a token pyramid, together with the tokenizer that makes and draws it.

    The tokenizer is frozen: it takes no gradient and stays in evaluation form.
    """

    def __init__(self, config: VARConfig, tokenizer: ResidualVQ) -> None:
        super().__init__()
        quantizer = tokenizer.config.quantizer
        if (quantizer.vocabulary, quantizer.channels) != (config.vocabulary, config.code_channels):
            raise ValueError(
                f"the transformer speaks {config.vocabulary} codes of {config.code_channels} numbers, the tokenizer "
                f"{quantizer.vocabulary} of {quantizer.channels}: they do not belong together"
            )
        self.config = config
        width = config.transformer.width
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.class_embedding = nn.Embedding(config.classes + 1, width)
        self.word_embedding = nn.Linear(config.code_channels, width)
        self.level_embedding = nn.Embedding(len(config.schedule), width)
        self.start_position = nn.Parameter(torch.empty(1, config.schedule.lengths[0], width))
        self.position_embedding = nn.Parameter(torch.empty(1, config.schedule.length, width))
        self.transformer = NextScaleTransformer(config.transformer)
        self.head = CategoricalHead(width, config.vocabulary, config.transformer.norm_eps)

    def train(self, mode: bool = True) -> VAR:
        super().train(mode)
        self.tokenizer.eval()
        return self

    @property
    def device(self) -> torch.device:
        return self.class_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.word_embedding.weight.dtype

    # --- teacher forcing ---------------------------------------------------------------------------------

    def embed(self, inputs: Tensor | None, schedule: ScaleSchedule, start: int, stop: int) -> Tensor:
        """Tokens of the flat positions [start, stop), without the class at the first scale.

        Args:
            inputs: (batch, positions, code channels); None at the first scale.
        """
        place = self.position_embedding[:, start:stop] + self.level_embedding(schedule.levels(self.device)[start:stop])
        if inputs is None:
            return self.start_position + place
        return self.word_embedding(inputs.to(self.dtype)) + place

    def drop_labels(self, labels: Int[Tensor, " batch"], uniform: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Labels replaced by "no class" where ``uniform`` in [0, 1) is below the configured share."""
        return torch.where(uniform < self.config.label_drop, self.config.classes, labels)

    def forward(
        self,
        inputs: Float[Tensor, "batch rest channels"],
        labels: Int[Tensor, " batch"],
        schedule: ScaleSchedule | None = None,
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Logits of all scales at once.

        Args:
            inputs: the quantiser's ``teacher_inputs``: of scales 1, 2, ….
            labels: 0 to ``classes``; ``classes`` is "no class".
            schedule: a prefix of the model's own list (progressive training); the whole list by default.
        """
        schedule = schedule or self.config.schedule
        first = schedule.lengths[0]
        device = inputs.device.type
        with torch.autocast(device, enabled=False):
            condition = self.class_embedding(labels)
            x = self.embed(None, schedule, 0, first) + condition[:, None]
            if len(schedule) > 1:
                x = torch.cat((x, self.embed(inputs, schedule, first, schedule.length)), dim=1)
        x = self.transformer(x, self.transformer.modulate(condition), schedule.segments)
        return self.head(x, self.head.modulate(condition))

    # --- sampling ----------------------------------------------------------------------------------------

    def start(self, conditions: Int[Tensor, " rows"], schedule: ScaleSchedule) -> VARSession:
        """Fold the class labels of all rows into a session (see :class:`nextscale.core.sampling.Session`)."""
        if schedule.lengths != self.config.schedule.lengths[: len(schedule)]:
            raise ValueError(
                f"this model has positions for the scales '{self.config.schedule}' only, not for '{schedule}'; "
                "fine-tune it on the new list"
            )
        return VARSession(self, conditions, schedule)

    def steps(
        self,
        labels: Int[Tensor, " batch"],
        *,
        draws: Draws,
        emitter: CategoricalEmitter | None = None,
        guidance: float = 1.5,
        controls: Sequence[Control] = (),
    ) -> Iterator[ScaleStep]:
        """Sample, scale by scale: the lower-level form of :meth:`generate`.

        Args:
            labels: one class per image; ``classes`` is "no class".
            guidance: strength t at the last scale: logits = (1 + t) conditional - t unconditional.
        """
        schedule = self.config.schedule
        branches = classifier_free(labels, torch.full_like(labels, self.config.classes), guidance, schedule)
        quantizer = self.tokenizer.quantizer
        codebook = quantizer.codebook.weight.float()
        return sample(self, quantizer, codebook, schedule, branches, emitter or CategoricalEmitter(), draws, controls)


class VARSession:
    """VAR in the middle of sampling."""

    def __init__(self, model: VAR, labels: Tensor, schedule: ScaleSchedule) -> None:
        self._model, self._schedule = model, schedule
        self._condition = model.class_embedding(labels)
        self._modulations = model.transformer.modulate(self._condition)
        self._head_modulation = model.head.modulate(self._condition)
        self._cache: KeyValueCache = model.transformer.allocate_cache(
            len(labels), schedule.length, self._modulations[0].dtype
        )

    def step(self, index: int, inputs: Tensor | None) -> Tensor:
        model, rows = self._model, len(self._condition)
        x = model.embed(inputs, self._schedule, *self._schedule.ranges[index])
        if inputs is None:
            x = x + self._condition[:, None]
        else:
            x = x.repeat(rows // len(x), 1, 1)
        return model.transformer(x, self._modulations, cache=self._cache)

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        return self._model.head(hidden[rows], self._head_modulation[rows])
