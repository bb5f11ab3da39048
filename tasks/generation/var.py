"""VAR: class-conditional image generation by next-scale prediction.

Tian et al. 2024, "Visual Autoregressive Modeling" (arXiv 2404.02905, NeurIPS); official code and weights
FoundationVision/VAR.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.cache import KeyValueCache
from nextscale.core.checkpoint import CheckpointError, KeyMap, assign, find_state_dict, save_folder, weightless
from nextscale.core.config import from_json, to_json
from nextscale.core.heads import CategoricalEmitter, CategoricalHead
from nextscale.core.random import Draws
from nextscale.core.sampling import Accepted, Branch, Control, ScalePyramid, ScaleStep, classifier_free, sample
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingTask
from nextscale.core.transformer import NextScaleTransformer, TransformerConfig
from nextscale.datasets.imagenet import IMAGENET
from nextscale.tasks.generation.class_conditional import ClassConditional
from nextscale.tasks.generation.official_layout import (
    MODEL_RULES,
    derived_buffers,
    from_layout,
    to_layout,
    transformer_config,
)
from nextscale.tasks.tokenizers.image_tokenizer import ImageTokenizer
from nextscale.tasks.tokenizers.residual_vq import (
    SCHEDULE_256,
    SCHEDULE_512,
    SCHEDULE_1024,
    ResidualVQ,
)

SYSTEM = "var"


@dataclass(frozen=True)
class VARConfig:
    """Attributes:

    classes: number of classes; one more embedding row stands for "no class".
    label_drop: probability that a label is replaced by "no class" in training, for guidance.
    class_names: by which classes may be asked for.
    guidance: strength to sample with where none is asked for.
    schedule: scales in training and, where none are given, in sampling.
    """

    transformer: TransformerConfig
    classes: int = 1000
    vocabulary: int = 4096
    code_channels: int = 32
    schedule: ScaleSchedule = SCHEDULE_256
    label_drop: float = 0.1
    class_names: tuple[str, ...] | None = None
    guidance: float = 1.5

    @classmethod
    def of_depth(cls, depth: int, **changes: Any) -> Self:
        """The paper's family: width 64 d, d heads, drop path 0.1 d / 24 (section 3.3)."""
        transformer = TransformerConfig(64 * depth, depth, depth, drop_path=0.1 * depth / 24)
        return cls(transformer, **changes)


PRESETS: dict[str, VARConfig] = {
    **{f"var-d{depth}": VARConfig.of_depth(depth, class_names=IMAGENET) for depth in (16, 20, 24, 30)},
    "var-d36": replace(
        VARConfig.of_depth(36, schedule=SCHEDULE_512, class_names=IMAGENET),
        transformer=replace(VARConfig.of_depth(36).transformer, conditioning="shared"),
    ),
}
"""Released models, by name."""


class VAR(ClassConditional):
    """The transformer over a token pyramid, together with the tokenizer that makes and draws it.

    The tokenizer is frozen: it takes no gradient and stays in evaluation form.

    Attributes:
        system, config_class, tokenizer_class: what saved folders are marked with, and what their parts are.
    """

    system: ClassVar[str] = SYSTEM
    config_class: ClassVar[type[VARConfig]] = VARConfig
    tokenizer_class: ClassVar[type[ImageTokenizer]] = ResidualVQ

    def __init__(self, config: VARConfig, tokenizer: ImageTokenizer) -> None:
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
        self.make_places()
        self.transformer = NextScaleTransformer(config.transformer)
        self.head = CategoricalHead(width, config.vocabulary, config.transformer.norm_eps)

    def make_places(self) -> None:
        """The parameters that :meth:`place` reads, and the start of the sequence."""
        config, width = self.config, self.config.transformer.width
        self.level_embedding = nn.Embedding(len(config.schedule), width)
        self.start_position = nn.Parameter(torch.empty(1, config.schedule.lengths[0], width))
        self.position_embedding = nn.Parameter(torch.empty(1, config.schedule.length, width))

    @property
    def dtype(self) -> torch.dtype:
        return self.word_embedding.weight.dtype

    # --- teacher forcing ---------------------------------------------------------------------------------

    def embed(self, inputs: Tensor | None, schedule: ScaleSchedule, start: int, stop: int) -> Tensor:
        """Tokens of the flat positions [start, stop), without the class at the first scale.

        Args:
            inputs: (batch, positions, code channels); None at the first scale.
        """
        place = self.place(schedule, start, stop)
        if inputs is None:
            return self.start_position + place
        return self.word_embedding(inputs.to(self.dtype)) + place

    def place(self, schedule: ScaleSchedule, start: int, stop: int) -> Float[Tensor, "1 positions width"]:
        """What tells the flat positions [start, stop) and their levels."""
        return self.position_embedding[:, start:stop] + self.level_embedding(schedule.levels(self.device)[start:stop])

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
        x, condition = self.enter(inputs, labels, schedule)
        x = self.transformer(x, self.transformer.modulate(condition), schedule.segments)
        return self.head(x, self.head.modulate(condition))

    def enter(self, inputs: Tensor, labels: Tensor, schedule: ScaleSchedule) -> tuple[Tensor, Tensor]:
        """The embedded sequence and the condition, both float32 whatever the precision of the blocks."""
        first = schedule.lengths[0]
        with torch.autocast(inputs.device.type, enabled=False):
            condition = self.class_embedding(labels)
            x = self.embed(None, schedule, 0, first) + condition[:, None]
            if len(schedule) > 1:
                x = torch.cat((x, self.embed(inputs, schedule, first, schedule.length)), dim=1)
        return x, condition

    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """The next-scale cross-entropy of a batch, and what to log.

        Args:
            batch: ``label`` (batch,), and ``tokens`` (batch, length) or ``image`` (batch, 3, height, width) in
                [-1, 1]; ``uniform`` (batch,) in [0, 1) decides which labels are dropped, drawn where it is missing.
        """
        batch = {"uniform": torch.rand(len(batch["label"]), device=self.device), **batch}
        return self.training_task().loss(self.system, self, batch, 0)

    def training_task(self) -> TrainingTask:
        """The loss that such a model is trained with."""
        from nextscale.tasks.generation.var_training import VARTraining

        return VARTraining(self)

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
        guidance: float | None = None,
        controls: Sequence[Control] = (),
        accepted: Accepted | None = None,
        stop: int | None = None,
    ) -> Iterator[ScaleStep]:
        """Sample, scale by scale: the lower-level form of :meth:`generate`.

        Args:
            labels: one class per image; ``classes`` is "no class".
            guidance: strength t at the last scale: logits = (1 + t) conditional - t unconditional; None: the
                configuration's.
            accepted, stop: begin later or end earlier (:func:`nextscale.core.sampling.sample`).
        """
        branches = self.guided(labels, self.config.guidance if guidance is None else guidance)
        emitter = emitter or CategoricalEmitter()
        return sample(self, self.pyramid, self.config.schedule, branches, emitter, draws, controls, accepted, stop)

    def guided(self, labels: Int[Tensor, " batch"], strength: float | Sequence[float]) -> list[Branch]:
        """The passes that :meth:`steps` weighs, with class and without."""
        unconditional = torch.full_like(labels, self.config.classes)
        return classifier_free(labels, unconditional, strength, self.config.schedule)

    @property
    def pyramid(self) -> ScalePyramid:
        """How accepted codes become the next input."""
        pyramid: ScalePyramid = self.tokenizer.quantizer
        return pyramid

    # --- files -------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write ``model.safetensors``, tokenizer included, and ``config.json``."""
        config = {"transformer": to_json(self.config), "tokenizer": to_json(self.tokenizer.config)}
        return save_folder(folder, self.state_dict(), {"system": self.system, "config": config})

    @classmethod
    def from_saved(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """From the content of a folder written by :meth:`save`."""
        parts = config["config"]
        with weightless():
            tokenizer = cls.tokenizer_class(from_json(cls.tokenizer_class.config_class, parts["tokenizer"]))
            model = cls(from_json(cls.config_class, parts["transformer"]), tokenizer)
        assign(model, state, f"the saved {cls.__name__}")
        return model.eval()

    def to_official(self) -> dict[str, Tensor]:
        """The transformer's official state dict; loads strictly into the official code."""
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("tokenizer.")}
        return to_layout(_KEYS, state) | derived_buffers(self.config.schedule)

    @property
    def official_name(self) -> str:
        """The file name that the official repository gives such a model."""
        return f"var_d{self.config.transformer.depth}.pth"

    @classmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[VARConfig, dict[str, Tensor]]:
        """Configuration and flat state dict in an official file's content; overrides as for :meth:`from_official`."""
        state = find_state_dict(content, NESTED, "pos_1LC")
        return config_from_official(state, **overrides), state

    @classmethod
    def from_official(cls, content: Mapping[str, Any], tokenizer: ImageTokenizer, **overrides: Any) -> Self:
        """Build from an official file's content; sizes and options are read from its keys and shapes.

        Args:
            tokenizer: its codes must fit.
            overrides: what a file may not tell: ``schedule``, ``heads`` of models without cosine attention,
                ``label_drop``, ``norm_eps``.

        Raises:
            CheckpointError: the content is not a VAR.
        """
        config, state = cls.read_official(content, **overrides)
        with weightless():
            model = cls(config, tokenizer)
        own = {f"tokenizer.{k}": v for k, v in tokenizer.state_dict().items()} | from_layout(_KEYS, state)
        assign(model, own, cls.__name__)
        return model.eval()


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

    def step(self, index: int, inputs: Tensor | None, first: int | None = None) -> Tensor:
        model, schedule, rows = self._model, self._schedule, len(self._condition)
        begin, stop = index if first is None else first, schedule.ranges[index][1]
        parts: list[Tensor] = []
        if begin == 0:
            parts.append(model.embed(None, schedule, 0, schedule.lengths[0]) + self._condition[:, None])
        if inputs is not None:
            x = model.embed(inputs, schedule, stop - inputs.shape[1], stop)
            parts.append(x.repeat(rows // len(x), 1, 1))
        x = torch.cat(parts, dim=1)
        return model.transformer(x, self._modulations, schedule.causal(begin, index), self._cache)

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        return self._model.head(hidden[rows], self._head_modulation[rows])


# --- the official checkpoint --------------------------------------------------------------------------

NESTED = (("trainer", "var_wo_ddp"), ("state_dict",), ("model",))
_KEYS = KeyMap(MODEL_RULES)


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is a VAR transformer, in the official layout."""
    try:
        state = find_state_dict(content, NESTED, "pos_1LC")
    except CheckpointError:
        return False
    return {"lvl_embed.weight", "class_emb.weight", "word_embed.weight", "head_nm.ada_lin.1.weight"} <= set(state)


def config_from_official(state: Mapping[str, Tensor], **overrides: Any) -> VARConfig:
    """The configuration that an official state dict's keys and shapes imply.

    Raises:
        CheckpointError: an entry that sizes are read from is missing, or the scale list cannot be told.
    """
    transformer = transformer_config(state, heads=overrides.get("heads"), norm_eps=overrides.get("norm_eps"))
    try:
        code_channels = state["word_embed.weight"].shape[1]
        classes, vocabulary = state["class_emb.weight"].shape[0] - 1, state["head.weight"].shape[0]
        schedule = overrides.get("schedule") or schedule_from_official(state)
    except KeyError as error:
        raise CheckpointError(f"the state dict lacks an entry of VAR: {error}") from None
    return VARConfig(
        transformer,
        classes,
        vocabulary,
        code_channels,
        ScaleSchedule.parse(schedule),
        overrides.get("label_drop", 0.1),
        IMAGENET if classes == len(IMAGENET) else None,
    )


def schedule_from_official(state: Mapping[str, Tensor]) -> ScaleSchedule:
    """The scale list: from the level index, else the known list of that length.

    Raises:
        CheckpointError: it is no known list.
    """
    length, scales = state["pos_1LC"].shape[1], state["lvl_embed.weight"].shape[0]
    if "lvl_1L" in state:
        counts = torch.bincount(state["lvl_1L"].flatten(), minlength=scales).tolist()
        sides = [math.isqrt(count) for count in counts]
        if [side * side for side in sides] == counts:
            return ScaleSchedule.squares(*sides)
    for known in (SCHEDULE_256, SCHEDULE_512, SCHEDULE_1024):
        if (known.length, len(known)) == (length, scales):
            return known
    raise CheckpointError(
        f"the file has {length} positions in {scales} scales, which is no published list, and no level index "
        '(lvl_1L) that would tell the sides; name them with schedule="1 2 3 ..."'
    )
