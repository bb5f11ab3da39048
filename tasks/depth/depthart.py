"""DepthART: relative depth of a photo by next-scale prediction, and DepthVAR, its baseline.

Gabdullin et al. 2025, "DepthART: Monocular Depth Estimation as Autoregressive Refinement Task" (arXiv 2409.15010,
IJCAI); official code bulatko/DepthART. One network, over VAR's tokenizer: photo and depth are both pyramids of its
codes. The photo's pyramid comes first in the sequence, and every position sees it whole. What sets the two apart is
training (:mod:`nextscale.tasks.depth.depthart_training`) and how codes are picked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.cache import KeyValueCache
from nextscale.core.checkpoint import assign, save_folder, weightless
from nextscale.core.config import from_json, to_json
from nextscale.core.heads import CategoricalHead
from nextscale.core.random import Draws
from nextscale.core.sampling import Branch, Emitter, ScaleStep, sample
from nextscale.core.schedule import ScaleSchedule, Segment
from nextscale.core.transformer import NextScaleTransformer, TransformerConfig
from nextscale.tasks.depth import depthart_layout as layout
from nextscale.tasks.depth.depthart_normalizer import DepthNormalizer
from nextscale.tasks.depth.depthart_sampling import AveragedEmitter, Pick
from nextscale.tasks.depth.predictor import DepthModel, Unit
from nextscale.tasks.tokenizers.image_tokenizer import ImageTokenizer
from nextscale.tasks.tokenizers.residual_vq import SCHEDULE_256, ResidualVQ

SYSTEM = "depthart"
is_official = layout.is_official


@dataclass(frozen=True)
class DepthARTConfig:
    """Attributes:

    training: how the model is (to be) trained: ``"refined"`` on its own predictions, DepthART; ``"plain"`` by teacher
        forcing, DepthVAR.
    classes: rows of the class embedding, left from VAR, before the one in use.
    normalizer: how depth becomes what the tokenizer takes.
    samples, pick, top_k, top_p: how codes are picked where nothing else is asked for; see
        :class:`nextscale.tasks.depth.depthart_sampling.AveragedEmitter`.
    published_start: as DepthVAR's release, leave the start position out of teacher forcing, though inference adds it,
        and let the photo see the first start token only.
    unused_scales: the official file holds attention scales that nothing reads (its option ``cos_attn``).
    """

    transformer: TransformerConfig
    training: Literal["refined", "plain"] = "refined"
    classes: int = 0
    vocabulary: int = 4096
    code_channels: int = 32
    schedule: ScaleSchedule = SCHEDULE_256
    normalizer: DepthNormalizer = field(default_factory=DepthNormalizer)
    samples: int = 5
    pick: Pick = "drawn"
    top_k: int = 900
    top_p: float = 0.9
    published_start: bool = False
    unused_scales: bool = False

    @classmethod
    def of_depth(cls, depth: int, **changes: Any) -> Self:
        """VAR's family: width 64 d, d heads; drop path 1/15 whatever the depth, and no cosine attention."""
        return cls(TransformerConfig(64 * depth, depth, depth, attention="dot", drop_path=1 / 15), **changes)


PRESETS: dict[str, DepthARTConfig] = {
    "depthart": DepthARTConfig.of_depth(16, classes=1000),
    "depthvar": DepthARTConfig.of_depth(
        16, classes=1000, training="plain", samples=1, pick="likeliest", published_start=True
    ),
}
"""Published models, by name. Only the first one's weights were released."""


class DepthART(DepthModel):
    """The transformer over the pyramids of photo and depth, together with the tokenizer of both.

    The tokenizer is frozen: it takes no gradient and stays in evaluation form.
    """

    system: ClassVar[str] = SYSTEM
    options: ClassVar[tuple[str, ...]] = ("pick", "top_k", "top_p")
    unit: Unit = "relative"

    def __init__(self, config: DepthARTConfig, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        quantizer = tokenizer.config.quantizer
        if (quantizer.vocabulary, quantizer.channels) != (config.vocabulary, config.code_channels):
            raise ValueError(
                f"the transformer speaks {config.vocabulary} codes of {config.code_channels} numbers, the tokenizer "
                f"{quantizer.vocabulary} of {quantizer.channels}: they do not belong together"
            )
        self.config, width = config, config.transformer.width
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.class_embedding = nn.Embedding(config.classes + 1, width)
        self.word_embedding = nn.Linear(config.code_channels, width)
        self.level_embedding = nn.Embedding(len(config.schedule), width)
        self.start_position = nn.Parameter(torch.empty(1, config.schedule.lengths[0], width))
        self.position_embedding = nn.Parameter(torch.empty(1, config.schedule.length, width))
        self.transformer = NextScaleTransformer(config.transformer)
        self.head = CategoricalHead(width, config.vocabulary, config.transformer.norm_eps)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.tokenizer.eval()
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.word_embedding.weight.dtype

    @property
    def published_samples(self) -> int:
        return self.config.samples

    # --- pyramids ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def pyramid(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n length channels"]:
        """What the network sees of a photo in [-1, 1]: the sum after each scale, bicubically at that scale's size.

        A depth token of a scale holds the sum before that scale instead.
        """
        schedule = self.config.schedule
        _, totals = self.tokenizer.quantizer.encode(self.tokenizer.features(images), schedule)
        maps = [F.interpolate(t, size=s.grid, mode="bicubic") for t, s in zip(totals, schedule.scales, strict=True)]
        return torch.cat([each.flatten(2).mT for each in maps], dim=1)

    @torch.no_grad()
    def depth_features(self, target: Float[Tensor, "n 1 height width"]) -> Float[Tensor, "n channels tall wide"]:
        """The continuous latent of normalised depth in [-1, 1], as a grey picture."""
        return self.tokenizer.features(target.expand(-1, 3, -1, -1))

    def encode_depth(
        self, depth: Float[Tensor, "n 1 height width"], valid: Tensor | None = None
    ) -> Int[Tensor, "n length"]:
        """Tokens of metric depth; unknown pixels count as their nearest neighbours do."""
        features = self.depth_features(self.config.normalizer.target(depth, valid))
        return torch.cat(self.tokenizer.quantizer.encode(features, self.config.schedule)[0], dim=1)

    def decode_depth(self, total: Float[Tensor, "n channels tall wide"]) -> Float[Tensor, "n 1 height width"]:
        """Relative depth in [0, 1] of a latent, or of what the scales amount to: the mean of the three channels."""
        return ((self.tokenizer.decode_features(total) + 1) / 2).mean(1, keepdim=True)

    # --- teacher forcing ---------------------------------------------------------------------------------

    def place(self, start: int, stop: int) -> Float[Tensor, "1 positions width"]:
        """What tells the flat positions [start, stop) and their levels: the same of photo and depth."""
        levels = self.config.schedule.levels(self.device)[start:stop]
        return self.position_embedding[:, start:stop] + self.level_embedding(levels)

    def embed(self, codes: Float[Tensor, "n positions channels"], start: int) -> Float[Tensor, "n positions width"]:
        """Tokens of the positions from ``start`` on."""
        return self.word_embedding(codes.to(self.dtype)) + self.place(start, start + codes.shape[1])

    def first(self, batch: int, position: bool = True) -> Float[Tensor, "n first width"]:
        """The start of the depth; ``position``: with the start position."""
        first = self.place(0, self.config.schedule.lengths[0]) + self.class_embedding.weight[-1]
        return (first + self.start_position if position else first).expand(batch, -1, -1)

    def condition(self) -> Float[Tensor, "1 width"]:
        """What modulates the blocks: the same for every photo."""
        return self.class_embedding.weight[-1:]

    def segments(self) -> tuple[Segment, ...]:
        """The photo sees itself and the start of the depth; a depth token the photo and all scales up to its own."""
        schedule = self.config.schedule
        length = schedule.length
        seen = 1 if self.config.published_start else schedule.lengths[0]
        depth = (Segment(length + s.start, length + s.stop, length + s.visible) for s in schedule.segments)
        return Segment(0, length, length + seen), *depth

    def forward(
        self,
        photo: Float[Tensor, "n length channels"],
        inputs: Float[Tensor, "n rest channels"],
        detached: bool = False,
    ) -> Float[Tensor, "n length vocabulary"]:
        """Logits of all scales of the depth at once.

        Args:
            photo: from :meth:`pyramid`.
            inputs: of the scales 1, 2, … of the depth: true ones, or those that predictions amount to.
            detached: let no gradient pass from them to the embeddings, which the photo has in common with them.
        """
        schedule, condition = self.config.schedule, self.condition()
        with torch.autocast(photo.device.type, enabled=False):
            start = self.first(len(photo), position=not self._omits_start)
            rest = self.embed(inputs, schedule.lengths[0])
            x = torch.cat((self.embed(photo, 0), start, rest.detach() if detached else rest), dim=1)
        x = self.transformer(x, self.transformer.modulate(condition), self.segments())
        return self.head(x[:, schedule.length :], self.head.modulate(condition))

    @property
    def _omits_start(self) -> bool:
        return self.config.published_start and self.config.training == "plain"

    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        from nextscale.tasks.depth.depthart_training import DepthARTTraining

        return DepthARTTraining(self).loss(self.system, self, batch, 0)

    # --- inference ---------------------------------------------------------------------------------------

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        return self.tokenizer.image_size(self.config.schedule)

    def start(self, conditions: Float[Tensor, "rows length channels"], schedule: ScaleSchedule) -> DepthARTSession:
        """Photos' pyramids into a session (see :class:`nextscale.core.sampling.Session`)."""
        return DepthARTSession(self, conditions, schedule)

    def steps(
        self,
        photo: Float[Tensor, "n length channels"],
        *,
        draws: Draws,
        emitter: Emitter | None = None,
        stop: int | None = None,
    ) -> Iterator[ScaleStep]:
        """Predict scale by scale: the lower-level form of :meth:`predict`.

        Args:
            photo: from :meth:`pyramid`.
            emitter: None: the configuration's.
            stop: end before the scale of this index.
        """
        schedule = self.config.schedule
        branches = [Branch(photo, (1.0,) * len(schedule))]
        emitter = emitter or self.emitter()
        return sample(self, self.tokenizer.quantizer, schedule, branches, emitter, draws, stop=stop)

    def emitter(
        self,
        samples: int | None = None,
        pick: Pick | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> AveragedEmitter:
        """How codes are picked; None: as configured."""
        given = {"samples": samples, "pick": pick, "top_k": top_k, "top_p": top_p}
        own = {name: getattr(self.config, name) for name in given}
        return AveragedEmitter(**own | {name: value for name, value in given.items() if value is not None})

    def infer(
        self,
        images: Float[Tensor, "n 3 tall wide"],
        samples: int,
        draws: Draws,
        report: Callable[[int, int], None],
        **given: Any,
    ) -> Float[Tensor, "n 1 tall wide"]:
        """Relative depth in [0, 1].

        Args:
            samples: codes averaged at every position.
            given: of :attr:`options`, for :meth:`emitter`.
        """
        emitter, scales = self.emitter(samples, **given), len(self.config.schedule)
        for step in self.steps(self.pyramid(images * 2 - 1), draws=draws, emitter=emitter):
            report(step.index + 1, scales)
        return self.decode_depth(step.total)

    # --- files -------------------------------------------------------------------------------------------

    @property
    def parts(self) -> dict[str, Any]:
        return {"transformer": self, **self.tokenizer.parts}

    @property
    def official_name(self) -> str:
        return "depthart.pth" if self.config.training == "refined" else "depthvar.pth"

    def save(self, folder: str | Path) -> Path:
        config = {"transformer": to_json(self.config), "tokenizer": to_json(self.tokenizer.config)}
        return save_folder(folder, self.state_dict(), {"system": self.system, "config": config})

    @classmethod
    def from_saved(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        parts = config["config"]
        with weightless():
            tokenizer = ResidualVQ(from_json(ResidualVQ.config_class, parts["tokenizer"]))
            model = cls(from_json(DepthARTConfig, parts["transformer"]), tokenizer)
        assign(model, state, f"the saved {cls.__name__}")
        return model.eval()

    def to_official(self) -> dict[str, Tensor]:
        """The official state dict, tokenizer included, under both of its names."""
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("tokenizer.")}
        return layout.to_official(self.config, own, self.tokenizer.to_official())

    @classmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[DepthARTConfig, dict[str, Tensor]]:
        """Configuration and flat state dict in an official file's content; overrides as for :meth:`from_official`."""
        state = layout.find(content)
        return cls._config(state, **overrides), state

    @classmethod
    def official_parts(cls, content: Mapping[str, Any], **overrides: Any) -> list[tuple[str, Any, dict[str, Tensor]]]:
        """(what it is, configuration, tensors) of the models in an official file."""
        config, state = cls.read_official(content, **overrides)
        own, inner = layout.split(state)
        found: list[tuple[str, Any, dict[str, Tensor]]] = [("transformer", config, own)]
        if "quant_conv.weight" in inner:
            found.append(("tokenizer", *ResidualVQ.read_official(inner, schedule=config.schedule)))
        return found

    @classmethod
    def _config(cls, state: Mapping[str, Tensor], **overrides: Any) -> DepthARTConfig:
        found = layout.sizes(state, overrides)
        preset = PRESETS["depthvar" if found["training"] == "plain" else "depthart"]
        given = {name: value for name, value in overrides.items() if name in ("normalizer", "samples", "pick")}
        return replace(preset, **found | {name: value for name, value in given.items() if value is not None})

    @classmethod
    def from_official(
        cls, content: Mapping[str, Any], tokenizer: ImageTokenizer | str | Path | None = None, **overrides: Any
    ) -> Self:
        """Build from an official file's content; sizes and options are read from its keys and shapes.

        Args:
            tokenizer: a loaded one, or its official file or folder, where the file holds none.
            overrides: what a file may not tell: ``schedule``, ``heads``, ``training``, ``attention_scale``,
                ``norm_eps``, ``drop_path``, ``normalizer``; of the tokenizer inside, ``unit_norm``, ``smoothing`` and
                ``beta``.

        Raises:
            CheckpointError: the content is not a DepthART, or there is no tokenizer.
        """
        config, state = cls.read_official(content, **overrides)
        own, inner = layout.split(state)
        made = layout.find_tokenizer(inner, tokenizer, config.schedule, overrides)
        with weightless():
            model = cls(config, made)
        prefixed = {f"tokenizer.{name}": value for name, value in made.state_dict().items()}
        assign(model, prefixed | layout.from_official(own), cls.__name__)
        return model.eval()


class DepthARTSession:
    """DepthART in the middle of inference: the photo's tokens enter together with the first scale."""

    def __init__(self, model: DepthART, photo: Tensor, schedule: ScaleSchedule) -> None:
        self._model, self._schedule, self._photo = model, schedule, photo
        condition = model.condition()
        self._modulations = model.transformer.modulate(condition)
        self._head_modulation = model.head.modulate(condition)
        length = photo.shape[1] + schedule.length
        self._cache: KeyValueCache = model.transformer.allocate_cache(len(photo), length, self._modulations[0].dtype)

    def step(self, index: int, inputs: Tensor | None, first: int | None = None) -> Tensor:
        model, schedule, photo = self._model, self._schedule, self._photo
        begin = index if first is None else first
        tokens = sum(schedule.lengths[begin : index + 1])
        parts: list[Tensor] = []
        if begin == 0:
            parts += [model.embed(photo, 0), model.first(len(photo))]
        if inputs is not None:
            stop = schedule.ranges[index][1]
            parts.append(model.embed(inputs, stop - inputs.shape[1]))
        x = torch.cat(parts, dim=1)
        seen = photo.shape[1]
        segments = [Segment(s.start, s.stop, seen + s.visible) for s in schedule.causal(begin, index)]
        if begin == 0:
            moved = [Segment(seen + s.start, seen + s.stop, s.visible) for s in segments]
            segments = [Segment(0, seen, seen + schedule.lengths[0]), *moved]
        return model.transformer(x, self._modulations, segments, self._cache)[:, -tokens:]

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        return self._model.head(hidden[rows], self._head_modulation)
