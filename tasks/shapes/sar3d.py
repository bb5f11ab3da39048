"""SAR3D: shapes of pictures or texts by next-scale prediction on three planes.

Chen et al. 2024, "SAR3D: Autoregressive 3D Object Generation and Understanding via Multi-scale 3D VQVAE" (arXiv
2411.16856, CVPR 2025); official code and weights cyw-3d/SAR3D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.checkpoint import CheckpointError, assign, find_state_dict, save_folder, weightless
from nextscale.core.config import from_json, to_json
from nextscale.core.cross_attention import Packed
from nextscale.core.heads import CategoricalEmitter, CategoricalHead
from nextscale.core.random import Draws
from nextscale.core.sampling import ScaleStep, classifier_free, sample
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.infinity_transformer import choose_text
from nextscale.tasks.generation.official_layout import transformer_config
from nextscale.tasks.generation.text import TextEncoderConfig, TextFeatures
from nextscale.tasks.shapes.objects import Shape, ShapeGenerator
from nextscale.tasks.shapes.pictures import ImageEncoderConfig, LearnedEncoder, LearnedEncoderConfig
from nextscale.tasks.shapes.sar3d_conditions import Conditions
from nextscale.tasks.shapes.sar3d_layout import (
    TRANSFORMER_NESTED,
    planes_of,
    transformer_from_layout,
    transformer_to_layout,
)
from nextscale.tasks.shapes.sar3d_planes import PLANES
from nextscale.tasks.shapes.sar3d_sampling import ConditionedNetwork
from nextscale.tasks.shapes.sar3d_tokenizer import SCHEDULE, TriplaneVQ, TriplaneVQConfig
from nextscale.tasks.shapes.sar3d_transformer import SAR3DBlocksConfig, SAR3DTransformer

SYSTEM = "sar3d"
WIDTHS = {"image": 1024, "text": 768}
"""Channels of DINOv2-L's and of CLIP-L's features."""
DINO_L = ImageEncoderConfig("facebook/dinov2-large", resize=256, crop=224)
CLIP_L = TextEncoderConfig("openai/clip-vit-large-patch14", kind="clip", max_length=77, padded=True)


@dataclass(frozen=True)
class SAR3DConfig:
    """Attributes:

    condition: what shapes are drawn of.
    schedule: scales of three planes.
    condition_drop: probability that the pooled features are replaced by those of no condition in training, and, drawn
        apart, that the features blocks attend to are.
    guidance: strength to sample with where none is asked for.
    image, text: the encoder of the condition that the model was trained with.
    learned: a small encoder of pictures in the model itself, instead of ``image``.
    """

    transformer: SAR3DBlocksConfig
    condition: Literal["image", "text"] = "image"
    vocabulary: int = 16384
    code_channels: int = 8
    schedule: ScaleSchedule = SCHEDULE
    condition_drop: float = 0.1
    guidance: float = 4.0
    image: ImageEncoderConfig = DINO_L
    text: TextEncoderConfig = CLIP_L
    learned: LearnedEncoderConfig | None = None

    def __post_init__(self) -> None:
        if self.condition not in WIDTHS:
            raise ValueError(f"condition is {self.condition!r}, expected 'image' or 'text'")
        if self.schedule.lengths[0] != PLANES:
            raise ValueError(f"the first scale has {self.schedule.lengths[0]} tokens, expected one of each plane")
        if self.learned is not None and self.condition != "image":
            raise ValueError("a learned encoder reads pictures; a model of texts has none")

    @classmethod
    def of_depth(cls, depth: int, condition: Literal["image", "text"], **changes: Any) -> SAR3DConfig:
        """The paper's family: width 64 d, 16 heads, drop path 0.1 d / 24."""
        blocks = SAR3DBlocksConfig(
            64 * depth,
            depth,
            16,
            drop_path=0.1 * depth / 24,
            memory_width=WIDTHS[condition],
            look="before" if condition == "image" else "after",
        )
        return cls(blocks, condition, **changes)


PRESETS: dict[str, SAR3DConfig] = {
    "sar3d-image": SAR3DConfig.of_depth(24, "image"),
    "sar3d-text": SAR3DConfig.of_depth(16, "text"),
}
"""Released models, by name."""


class SAR3D(ShapeGenerator):
    """The transformer over a pyramid of three planes, together with the tokenizer that makes and reads them.

    The tokenizer is frozen: it takes no gradient and stays in evaluation form.

    Attributes:
        conditions: makes features of pictures or texts, and holds those of no condition.
    """

    config: SAR3DConfig
    tokenizer: TriplaneVQ

    def __init__(self, config: SAR3DConfig, tokenizer: TriplaneVQ) -> None:
        super().__init__()
        own = tokenizer.config.quantizer
        if (own.vocabulary, own.channels) != (config.vocabulary, config.code_channels):
            raise ValueError(
                f"the transformer speaks {config.vocabulary} codes of {config.code_channels} numbers, the tokenizer "
                f"{own.vocabulary} of {own.channels}: they do not belong together"
            )
        self.config = config
        blocks = config.transformer
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.pooled_embedding = nn.Linear(blocks.memory_width, blocks.width)
        self.word_embedding = nn.Linear(config.code_channels, blocks.width)
        self.level_embedding = nn.Embedding(len(config.schedule), blocks.width)
        self.plane_embedding = nn.Embedding(PLANES, blocks.width)
        self.start_position = nn.Parameter(torch.zeros(1, 1, blocks.width))
        self.position_embedding = nn.Parameter(torch.zeros(1, config.schedule.length, blocks.width))
        self.transformer = SAR3DTransformer(blocks)
        self.head = CategoricalHead(blocks.width, config.vocabulary, blocks.norm_eps)
        learned = config.learned
        self.picture_encoder = None if learned is None else LearnedEncoder(learned, blocks.memory_width)
        self.conditions = Conditions(config.condition, config.image, config.text)

    @property
    def dtype(self) -> torch.dtype:
        return self.word_embedding.weight.dtype

    @property
    def home(self) -> Path | None:
        """The folder it was loaded from, where encoders and the features of no condition may lie too."""
        return self.conditions.home

    @home.setter
    def home(self, folder: Path | None) -> None:
        self.conditions.home = folder

    # --- conditions --------------------------------------------------------------------------------------

    @property
    def told_by(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("image",) if self.config.condition == "image" else ("prompt",)

    def prepare(self, condition: Any) -> TextFeatures:
        """Features of pictures or texts.

        Args:
            condition: what the model is made for: a picture (its path, a PIL image, or pixels), a text, or several; or
                features that were made before.
        """
        if isinstance(condition, TextFeatures):
            return condition
        if self.picture_encoder is None:
            return self.conditions.encode(condition, self.config.transformer.memory_width)
        pictures = self.conditions.pictures(condition, self.picture_encoder.config.size)
        with torch.no_grad():
            return self.picture_encoder(pictures.to(self.device))

    def null(self) -> TextFeatures:
        """The features of no condition: one."""
        return self.conditions.null() if self.picture_encoder is None else self.picture_encoder.null()

    def drop(self, features: TextFeatures, uniform: Float[Tensor, "2 batch"]) -> TextFeatures:
        """Features replaced by those of no condition where numbers in [0, 1) are below the configured share: pooled
        ones by the first row, those that blocks attend to by the second."""
        assert features.pooled is not None
        null, below = self.null(), uniform < self.config.condition_drop
        assert null.pooled is not None
        device = features.pooled.device
        pooled = torch.where(below[0][:, None].to(device), null.pooled.to(device), features.pooled)
        return TextFeatures(choose_text(features.states, null.states.values.to(device), below[1]), pooled)

    def read(self, features: TextFeatures) -> tuple[Float[Tensor, "n width"], Packed]:
        """What the network has of features: the pooled ones as start and condition, and what blocks attend to."""
        assert features.pooled is not None
        pooled = self.pooled_embedding(features.pooled.to(self.device, self.dtype))
        return pooled, features.states.to(self.device, self.dtype)

    # --- teacher forcing ---------------------------------------------------------------------------------

    def embed(
        self, pooled: Float[Tensor, "rows width"], inputs: Tensor | None, start: int, stop: int
    ) -> Float[Tensor, "rows positions width"]:
        """Tokens of the flat positions [start, stop).

        Args:
            pooled: the condition of each row, which is the input of the first scale.
            inputs: of the scales after the first, (batch, positions, channels), alike for all rows of a shape.
        """
        parts = []
        if start == 0:
            parts.append((pooled[:, None] + self.start_position).expand(-1, PLANES, -1))
        if inputs is not None:
            x = self.word_embedding(inputs.to(self.dtype))
            parts.append(x.repeat(len(pooled) // len(x), 1, 1))
        levels = self.config.schedule.levels(self.device)[start:stop]
        planes = planes_of(self.config.schedule).to(self.device)[start:stop]
        place = self.level_embedding(levels) + self.position_embedding[:, start:stop] + self.plane_embedding(planes)
        return torch.cat(parts, dim=1) + place

    def forward(
        self, inputs: Float[Tensor, "batch rest channels"], features: TextFeatures, scales: int | None = None
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Logits of all scales at once.

        Args:
            inputs: the quantiser's ``teacher_inputs``: of scales 1, 2, ….
            features: of each object's condition.
            scales: so many of the first; None: all.
        """
        schedule = self.config.schedule.prefix(scales or len(self.config.schedule))
        with torch.autocast(inputs.device.type, enabled=False):
            pooled, memory = self.read(features)
            x = self.embed(pooled, inputs, 0, schedule.length)
            modulations, head_modulation = self.transformer.modulate(pooled), self.head.modulate(pooled)
        x = self.transformer(x, modulations, schedule.segments, memory=memory)
        return self.head(x, head_modulation)

    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """The next-scale cross-entropy of a batch, and what to log; a batch as
        :class:`nextscale.tasks.shapes.sar3d_training.SAR3DTraining` takes it."""
        from nextscale.tasks.shapes.sar3d_training import SAR3DTraining

        return SAR3DTraining(self).loss(SYSTEM, self, dict(batch), 0)

    # --- sampling ----------------------------------------------------------------------------------------

    def steps(
        self,
        features: TextFeatures,
        *,
        draws: Draws,
        emitter: CategoricalEmitter | None = None,
        guidance: float | Sequence[float] | None = None,
    ) -> Iterator[ScaleStep]:
        """Sample, scale by scale: the lower-level form of :meth:`generate`.

        Args:
            features: of each shape's condition.
            guidance: strength t at the last scale: logits = (1 + t) conditional - t of no condition; None: the
                configuration's.
        """
        schedule, count = self.config.schedule, len(features)
        strength = self.config.guidance if guidance is None else guidance
        wanted = torch.arange(count, device=self.device)
        branches = classifier_free(wanted, torch.full_like(wanted, count), strength, schedule)
        both = TextFeatures.join([features, _like(self.null(), features)]) if len(branches) > 1 else features
        network = ConditionedNetwork(self, both)
        return sample(network, self.tokenizer.quantizer, schedule, branches, emitter or CategoricalEmitter(), draws)

    def draw_shapes(
        self,
        condition: TextFeatures,
        draws: Draws,
        advance: Callable[[], None],
        *,
        guidance: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] = 10,
        top_p: float | Sequence[float] = 0.5,
        temperature: float | Sequence[float] = 1.0,
        smooth: bool = False,
        resolution: int = 192,
        level: float = 10.0,
    ) -> list[Shape]:
        """One shape for each condition.

        Args:
            guidance: see :meth:`steps`.
            top_k, top_p, temperature, smooth: see :class:`nextscale.core.heads.CategoricalEmitter`. The defaults are
                those of the official script.
            resolution, level: see :meth:`nextscale.tasks.shapes.sar3d_tokenizer.TriplaneVQ.shape`.
        """
        emitter = CategoricalEmitter(top_k, top_p, temperature, smooth)
        for step in self.steps(condition, draws=draws, emitter=emitter, guidance=guidance):
            total = step.total
            advance()
        planes = self.tokenizer.decode_features(total)
        return [self.tokenizer.shape(each[None], resolution=resolution, level=level) for each in planes]

    # --- files -------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write ``model.safetensors``, tokenizer included, and ``config.json``; a small text encoder goes along."""
        own = replace(self.config, text=self.conditions.save_encoder(folder))
        config = {"transformer": to_json(own), "tokenizer": to_json(self.tokenizer.config)}
        null = {} if self.picture_encoder is not None else self.conditions.null_tensors()
        return save_folder(folder, self.state_dict() | null, {"system": SYSTEM, "config": config})

    @classmethod
    def from_saved(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """From the content of a folder written by :meth:`save`."""
        parts, own = config["config"], dict(state)
        with weightless():
            tokenizer = TriplaneVQ(from_json(TriplaneVQConfig, parts["tokenizer"]))
            model = cls(from_json(SAR3DConfig, parts["transformer"]), tokenizer)
        model.conditions.take_null(own)
        assign(model, own, "the saved SAR3D")
        return model.eval()

    def to_official(self) -> dict[str, Tensor]:
        """The transformer's official state dict; loads strictly into the official code."""
        others = ("tokenizer.", "picture_encoder.")
        state = {name: value for name, value in self.state_dict().items() if not name.startswith(others)}
        return transformer_to_layout(state, self.config.schedule)

    @property
    def official_name(self) -> str:
        """The file name that the official repository gives such a model."""
        return f"{self.config.condition}-condition-ckpt.pth"

    def official_differences(self) -> list[str]:
        """What the official code must be changed in to compute the same, as its files cannot say it."""
        return [] if self.picture_encoder is None else ["pictures that are read by an encoder of the model's own"]

    @property
    def parts(self) -> dict[str, Any]:
        """The models a file may hold, by what they are."""
        return {"transformer": self, **self.tokenizer.parts}

    @classmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[SAR3DConfig, dict[str, Tensor]]:
        """Configuration and flat state dict in an official file's content; overrides as for :meth:`from_official`."""
        state = find_state_dict(content, TRANSFORMER_NESTED, "plane_embed.weight")
        return config_from_official(state, **overrides), state

    @classmethod
    def from_official(cls, content: Mapping[str, Any], tokenizer: TriplaneVQ, **overrides: Any) -> Self:
        """Build from an official file's content; sizes and options are read from its keys and shapes.

        Args:
            tokenizer: its codes must fit.
            overrides: what a file may not tell: ``schedule``, ``heads`` of models without cosine attention,
                ``condition`` (None: told by the width of the features), ``text_encoder`` and ``image_encoder`` (name
                or folder), ``condition_drop``, ``guidance``, ``norm_eps``.

        Raises:
            CheckpointError: the content is not a SAR3D.
        """
        config, state = cls.read_official(content, **overrides)
        with weightless():
            model = cls(config, tokenizer)
        own = {f"tokenizer.{k}": v for k, v in tokenizer.state_dict().items()} | transformer_from_layout(state)
        assign(model, own, "SAR3D")
        return model.eval()


def _like(features: TextFeatures, other: TextFeatures) -> TextFeatures:
    """Features where others are, in their precision."""
    values = other.states.values
    pooled = None if features.pooled is None else features.pooled.to(values.device, values.dtype)
    return TextFeatures(features.states.to(values.device, values.dtype), pooled)


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is a SAR3D transformer, in the official layout."""
    try:
        state = find_state_dict(content, TRANSFORMER_NESTED, "plane_embed.weight")
    except CheckpointError:
        return False
    return {"pooler_emb.weight", "pos_1LC", "blocks.0.prenorm_ca_dino.g"} <= set(state)


def config_from_official(state: Mapping[str, Tensor], **overrides: Any) -> SAR3DConfig:
    """The configuration that an official state dict's keys and shapes imply; overrides as for ``from_official``.

    Raises:
        CheckpointError: an entry that sizes are read from is missing, or the scales cannot be told.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        memory_width, vocabulary = state["pooler_emb.weight"].shape[1], state["head.weight"].shape[0]
        channels, length = state["word_embed.weight"].shape[1], state["pos_1LC"].shape[1]
    except KeyError as error:
        raise CheckpointError(f"the state dict lacks an entry of SAR3D: {error}") from None
    schedule = ScaleSchedule.parse(given.get("schedule", SCHEDULE))
    if schedule.length != length:
        raise CheckpointError(
            f"the file has positions for {length} tokens, the scales '{schedule}' have {schedule.length}; name its own "
            'with schedule="1x1x3 2x2x3 ..."'
        )
    condition: Any = given.get("condition") or ("text" if memory_width == WIDTHS["text"] else "image")
    found = transformer_config(
        state,
        heads=given.get("heads") or (None if "blocks.0.attn.scale_mul_1H11" in state else 16),
        norm_eps=given.get("norm_eps"),
    )
    look: Literal["before", "after"] = "before" if condition == "image" else "after"
    blocks = SAR3DBlocksConfig(**vars(found), memory_width=memory_width, look=look)
    changes: dict[str, Any] = {name: given[name] for name in ("condition_drop", "guidance") if name in given}
    if "text_encoder" in given:
        changes["text"] = replace(CLIP_L, name=str(given["text_encoder"]))
    if "image_encoder" in given:
        changes["image"] = ImageEncoderConfig(str(given["image_encoder"]))
    return SAR3DConfig(blocks, condition, vocabulary, channels, schedule, **changes)
