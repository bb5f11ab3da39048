"""G3PT: shapes of classes, pictures or texts by next-scale prediction of unordered tokens.

Zhang et al. 2024, "G3PT: Unleash the Power of Autoregressive Modeling in 3D Generation via Cross-scale Querying
Transformer" (arXiv 2409.06322, IJCAI 2025). No code was published; ``docs/g3pt.md`` says what is stated and what was
chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.bitwise import BitwiseEmitter
from nextscale.core.checkpoint import assign, save_folder, weightless
from nextscale.core.config import from_json, to_json
from nextscale.core.heads import CategoricalEmitter, CategoricalHead
from nextscale.core.random import Draws
from nextscale.core.sampling import ScaleStep, classifier_free, sample
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import NextScaleTransformer, TransformerConfig
from nextscale.tasks.generation.text import TextEncoderConfig
from nextscale.tasks.shapes.g3pt_conditions import ShapeConditions
from nextscale.tasks.shapes.g3pt_reading import ConditionReader
from nextscale.tasks.shapes.g3pt_sampling import ConditionedNetwork, NumberedPyramid, behind
from nextscale.tasks.shapes.g3pt_tokenizer import SCHEDULE, PointTokenizer, PointTokenizerConfig, Unpublished
from nextscale.tasks.shapes.objects import Shape, ShapeGenerator
from nextscale.tasks.shapes.pictures import ImageEncoderConfig, LearnedEncoderConfig, PictureNetwork

SYSTEM = "g3pt"
DINO_L = ImageEncoderConfig("facebook/dinov2-large", resize=224, crop=224)
CLIP_L = TextEncoderConfig("openai/clip-vit-large-patch14", kind="clip", max_length=77, padded=True)
PATCH = 14
"""Side of DINOv2's patches, in pixels."""


@dataclass(frozen=True)
class G3PTConfig:
    """Attributes:

    code_width: channels of what enters at a scale, the tokenizer's width.
    bits: of a token.
    symbols: what is predicted of a token: its ``"number"``, one of 2^bits, or every of its ``"bits"`` by itself.
    classes, class_names: what the model is told by class; 0: nothing.
    image: the encoder of the pictures it is told by; None: it sees none, unless ``learned``.
    learned: a small encoder of pictures in the model itself.
    picture_width: channels of the pictures' features.
    text: the encoder of the texts it is told by; None: it reads none. text_width: channels of its pooled features.
    condition_drop: share of shapes that training shows no condition of.
    guidance: strength to sample with where none is asked for.
    """

    transformer: TransformerConfig
    code_width: int = 512
    bits: int = 13
    schedule: ScaleSchedule = SCHEDULE
    symbols: Literal["number", "bits"] = "number"
    classes: int = 0
    class_names: tuple[str, ...] | None = None
    image: ImageEncoderConfig | None = None
    learned: LearnedEncoderConfig | None = None
    picture_width: int = 1024
    text: TextEncoderConfig | None = None
    text_width: int = 768
    condition_drop: float = 0.1
    guidance: float = 2.0

    def __post_init__(self) -> None:
        if self.symbols not in ("number", "bits"):
            raise ValueError(f"symbols is {self.symbols!r}, expected 'number' or 'bits'")
        if self.image is not None and self.learned is not None:
            raise ValueError("pictures are read by one encoder: give image or learned, not both")
        if self.class_names is not None and len(self.class_names) != self.classes:
            raise ValueError(f"{len(self.class_names)} class names were given for {self.classes} classes")
        if self.transformer.conditioning == "none":
            raise ValueError("the blocks are not modulated (conditioning is 'none'); expected 'shared' or 'block'")
        if not 0 <= self.condition_drop < 1:
            raise ValueError(f"condition_drop is {self.condition_drop}; expected a share below 1")

    @property
    def prefix(self) -> int:
        """Tokens of a picture, which stand before those of the shape."""
        if self.learned is not None:
            return self.learned.cells
        return 0 if self.image is None else (self.image.crop // PATCH) ** 2

    @classmethod
    def of_size(cls, width: int, depth: int, heads: int, **changes: Any) -> G3PTConfig:
        """GPT-2's family of sizes, with unit-length queries and keys."""
        return cls(TransformerConfig(width, depth, heads, conditioning="shared"), **changes)


_SIZES = {"0.1b": (768, 12, 12), "0.5b": (1280, 24, 20), "1.5b": (1600, 48, 25)}
PRESETS: dict[str, G3PTConfig] = {
    f"g3pt-{kind}-{size}": G3PTConfig.of_size(*sizes, **given)
    for size, sizes in _SIZES.items()
    for kind, given in (("image", {"image": DINO_L}), ("text", {"text": CLIP_L}))
}
"""Published sizes, by name; no weights were published."""


class G3PT(Unpublished, ShapeGenerator):
    """The transformer over a pyramid of unordered tokens, together with the tokenizer that makes and reads them.

    The tokenizer is frozen: it takes no gradient and stays in evaluation form.

    Attributes:
        reader: turns classes, pictures and texts into :class:`ShapeConditions`.
    """

    config: G3PTConfig
    tokenizer: PointTokenizer
    no_decay = ("null_picture",)  # of the weights, beside those of every transformer

    def __init__(self, config: G3PTConfig, tokenizer: PointTokenizer) -> None:
        super().__init__()
        own = tokenizer.config
        if (own.quantizer.bits, own.width) != (config.bits, config.code_width) or own.schedule != config.schedule:
            raise ValueError(
                f"the transformer speaks {config.bits} bits of width {config.code_width} over '{config.schedule}', the "
                f"tokenizer {own.quantizer.bits} of {own.width} over '{own.schedule}': they do not belong together"
            )
        self.config = config
        width = config.transformer.width
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.class_embedding = nn.Embedding(config.classes + 1, width)
        self.text_embedding = None if config.text is None else nn.Linear(config.text_width, width)
        self.picture_embedding = nn.Linear(config.picture_width, width) if config.prefix else None
        self.null_picture = nn.Parameter(torch.zeros(config.prefix, width)) if config.prefix else None
        self.picture_encoder = None if config.learned is None else PictureNetwork(config.learned, config.picture_width)
        self.word_embedding = nn.Linear(config.code_width, width)
        self.level_embedding = nn.Embedding(len(config.schedule), width)
        self.start_position = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, config.schedule.length, width))
        self.transformer = NextScaleTransformer(config.transformer)
        outputs = 2**config.bits if config.symbols == "number" else 2 * config.bits
        self.head = CategoricalHead(width, outputs, config.transformer.norm_eps)
        self.reader = ConditionReader(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.word_embedding.weight.dtype

    @property
    def home(self) -> Path | None:
        """The folder it was loaded from, where encoders may lie too."""
        return self.reader.home

    @home.setter
    def home(self, folder: Path | None) -> None:
        self.reader.home = folder

    # --- conditions --------------------------------------------------------------------------------------

    @property
    def told_by(self) -> tuple[str, ...]:  # type: ignore[override]
        known = {"class": self.config.classes, "image": self.config.prefix, "prompt": self.config.text}
        return tuple(name for name, there in known.items() if there)

    def prepare(self, condition: Any) -> ShapeConditions:
        """What the network reads of conditions: a class (number or name; None: none), a picture, a text, or several.

        A text is taken as a class's name where it is one, else as a prompt by models that read, else as the path of a
        picture.
        """
        if isinstance(condition, ShapeConditions):
            return condition
        with torch.no_grad():
            return self.reader.read(condition, self.picture_encoder, self.device)

    def read(self, conditions: ShapeConditions) -> tuple[Float[Tensor, "n width"], Tensor | None]:
        """What the network has of conditions: the vector that modulates all blocks and begins the first scale, and the
        tokens before the first scale, (n, cells, width), of models that see."""
        conditions = conditions.to(self.device)
        pooled = self.class_embedding(conditions.labels)
        if self.text_embedding is not None and conditions.text is not None and conditions.said is not None:
            told = self.text_embedding(conditions.text.to(self.dtype))
            pooled = torch.where(conditions.said[:, None], told, pooled)
        if self.picture_embedding is None or self.null_picture is None:
            return pooled, None
        nothing = self.null_picture.expand(len(conditions), -1, -1)
        if conditions.states is None or conditions.shown is None:
            return pooled, nothing
        seen = self.picture_embedding(conditions.states.to(self.dtype))
        return pooled, torch.where(conditions.shown[:, None, None], seen, nothing)

    # --- teacher forcing ---------------------------------------------------------------------------------

    def embed(
        self, pooled: Float[Tensor, "rows width"], inputs: Tensor | None, start: int, stop: int
    ) -> Float[Tensor, "rows positions width"]:
        """Tokens of the flat positions [start, stop).

        Args:
            pooled: the condition of each row, which is the input of the first scale.
            inputs: of the scales after the first, (batch, positions, code width), alike for all rows of a shape.
        """
        schedule, parts = self.config.schedule, []
        if start == 0:
            parts.append((pooled[:, None] + self.start_position).expand(-1, schedule.lengths[0], -1))
        if inputs is not None:
            x = self.word_embedding(inputs.to(self.dtype))
            parts.append(x.repeat(len(pooled) // len(x), 1, 1))
        levels = schedule.levels(self.device)[start:stop]
        return torch.cat(parts, dim=1) + self.level_embedding(levels) + self.position_embedding[:, start:stop]

    def forward(
        self, inputs: Float[Tensor, "batch rest code_width"], conditions: ShapeConditions, scales: int | None = None
    ) -> Float[Tensor, "batch length symbols"]:
        """Logits of all scales at once.

        Args:
            inputs: the quantiser's ``teacher_inputs``: of scales 1, 2, ….
            scales: so many of the first; None: all.
        """
        schedule = self.config.schedule.prefix(scales or len(self.config.schedule))
        with torch.autocast(inputs.device.type, enabled=False):
            pooled, prefix = self.read(conditions)
            x = self.embed(pooled, inputs, 0, schedule.length)
            x = x if prefix is None else torch.cat((prefix, x), dim=1)
            modulations, head_modulation = self.transformer.modulate(pooled), self.head.modulate(pooled)
        x = self.transformer(x, modulations, behind(self.config.prefix, schedule.segments))
        return self.head(x[:, self.config.prefix :], head_modulation)

    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """The next-scale cross-entropy of a batch, and what to log; a batch as
        :class:`nextscale.tasks.shapes.g3pt_training.G3PTTraining` takes it."""
        from nextscale.tasks.shapes.g3pt_training import G3PTTraining

        return G3PTTraining(self).loss(SYSTEM, self, dict(batch), 0)

    # --- sampling ----------------------------------------------------------------------------------------

    def steps(
        self,
        conditions: ShapeConditions,
        *,
        draws: Draws,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 0.0,
        temperature: float | Sequence[float] = 1.0,
        guidance: float | Sequence[float] | None = None,
    ) -> Iterator[ScaleStep]:
        """Sample, scale by scale: the lower-level form of :meth:`generate`.

        Args:
            top_k, top_p, temperature: see :class:`nextscale.core.heads.CategoricalEmitter`, and where bits are drawn,
                :class:`nextscale.core.bitwise.BitwiseEmitter`.
            guidance: strength t at the last scale: logits = (1 + t) conditional - t of no condition; None: the
                configuration's.
        """
        schedule, count = self.config.schedule, len(conditions)
        strength = self.config.guidance if guidance is None else guidance
        wanted = torch.arange(count, device=self.device)
        branches = classifier_free(wanted, torch.full_like(wanted, count), strength, schedule)
        both = conditions.with_none(self.config.classes) if len(branches) > 1 else conditions
        network, quantizer = ConditionedNetwork(self, both), self.tokenizer.quantizer
        if self.config.symbols == "bits":
            return sample(network, quantizer, schedule, branches, BitwiseEmitter(top_k, top_p, temperature), draws)
        emitter = CategoricalEmitter(top_k, top_p, temperature)
        return sample(network, NumberedPyramid(quantizer), schedule, branches, emitter, draws)

    def draw_shapes(
        self,
        condition: ShapeConditions,
        draws: Draws,
        advance: Callable[[], None],
        *,
        guidance: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 0.9,
        temperature: float | Sequence[float] = 1.0,
        resolution: int = 128,
        stride: int = 4,
    ) -> list[Shape]:
        """One shape for each condition.

        Args:
            guidance, top_k, top_p, temperature: see :meth:`steps`.
            resolution, stride: see :meth:`nextscale.tasks.shapes.g3pt_tokenizer.PointTokenizer.shape`.
        """
        filters = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
        for step in self.steps(condition, draws=draws, guidance=guidance, **filters):  # type: ignore[arg-type]
            total = step.total
            advance()
        hidden = self.tokenizer.decode_features(total)
        return [self.tokenizer.shape(each[None], resolution=resolution, stride=stride) for each in hidden]

    # --- files -------------------------------------------------------------------------------------------

    @property
    def parts(self) -> dict[str, Any]:
        """The models a file may hold, by what they are."""
        return {"transformer": self, **self.tokenizer.parts}

    def save(self, folder: str | Path) -> Path:
        """Write ``model.safetensors``, tokenizer included, and ``config.json``; a small text encoder goes along."""
        own = replace(self.config, text=self.reader.save_encoder(folder))
        config = {"transformer": to_json(own), "tokenizer": to_json(self.tokenizer.config)}
        return save_folder(folder, self.state_dict(), {"system": SYSTEM, "config": config})

    @classmethod
    def from_saved(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """From the content of a folder written by :meth:`save`."""
        parts = config["config"]
        with weightless():
            tokenizer = PointTokenizer(from_json(PointTokenizerConfig, parts["tokenizer"]))
            model = cls(from_json(G3PTConfig, parts["transformer"]), tokenizer)
        assign(model, state, "the saved G3PT")
        return model.eval()


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is a G3PT in an official layout: none was published."""
    return False
