"""Infinity: text-to-image by next-scale prediction of bits.

Han et al. 2024, "Infinity" (arXiv 2412.04431, CVPR 2025); official code and weights FoundationVision/Infinity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nextscale.core.bitwise import BitwiseEmitter
from nextscale.core.checkpoint import CheckpointError, assign, find_state_dict, weightless
from nextscale.core.cross_attention import Packed
from nextscale.core.heads import CategoricalHead
from nextscale.core.random import Draws
from nextscale.core.rotary import Rotation
from nextscale.core.sampling import ScaleStep, sample
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.infinity_config import FLAN_T5_XL, InfinityConfig
from nextscale.tasks.generation.infinity_layout import NESTED, RECOGNISED_BY, from_layout, sizes, to_layout
from nextscale.tasks.generation.infinity_sampling import Guidance, TextNetwork
from nextscale.tasks.generation.infinity_transformer import (
    InfinityBlocksConfig,
    InfinityTransformer,
    TextPool,
    choose_text,
    rotation_of,
)
from nextscale.tasks.generation.text import TextFeatures
from nextscale.tasks.generation.text_to_image import Painter, TextToImage
from nextscale.tasks.tokenizers.bitwise_schedules import parse_ratio, reference_grid, schedule_of, size_of
from nextscale.tasks.tokenizers.bitwise_vq import BitwiseVQ

SYSTEM = "infinity"


class Infinity(TextToImage):
    """The transformer over a pyramid of bits, together with the tokenizer that makes and draws it.

    The tokenizer is frozen: it takes no gradient and stays in evaluation form.
    """

    system, config_class, tokenizer_class = SYSTEM, InfinityConfig, BitwiseVQ
    config: InfinityConfig
    tokenizer: BitwiseVQ
    no_decay = ("null_text", "pool.query")  # of the weights, beside those of every transformer
    uncompiled = ("read", "rotation")  # texts have a length of their own in every batch; rotations are made once

    def __init__(self, config: InfinityConfig, tokenizer: BitwiseVQ) -> None:
        super().__init__(config.text)
        own = tokenizer.config.quantizer
        if own.token_bits != config.token_bits:
            raise ValueError(
                f"the transformer speaks {config.token_bits} bits per token, the tokenizer {own.token_bits} "
                f"({own.bits} of each of {own.patch**2} cells): they do not belong together; "
                f"{_TOKENIZERS.get(config.token_bits, 'another tokenizer')} does"
            )
        self.config = config
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        width = config.transformer.width
        self.null_text = nn.Parameter(torch.zeros(config.text_length, config.text_width))
        self.text_norm = nn.RMSNorm(config.text_width, eps=1e-6)
        self.pool = TextPool(config.text_width, config.transformer, config.pool_heads)
        self.memory = nn.Sequential(
            nn.Linear(config.text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.start_position = nn.Parameter(torch.zeros(1, 1, width))
        self.word_embedding = nn.Linear(config.token_bits, width)
        self.level_embedding = nn.Embedding(config.levels, width)
        self.transformer = InfinityTransformer(config.transformer)
        self.head = CategoricalHead(width, 2 * config.token_bits, config.transformer.norm_eps)

    @property
    def dtype(self) -> torch.dtype:
        return self.word_embedding.weight.dtype

    # --- text --------------------------------------------------------------------------------------------

    def read(self, text: Packed) -> tuple[Float[Tensor, "texts width"], Packed]:
        """What the network has of texts: each one pooled (start and condition), and the memory blocks attend to."""
        normed = text.map(self.text_norm(text.values.to(self.null_text.dtype)))
        return self.pool(normed), normed.map(self.memory(normed.values))

    def no_text(self, lengths: Sequence[int]) -> Packed:
        """What stands for no text, at the lengths of the texts it is weighed against."""
        lengths = tuple(min(length, len(self.null_text)) for length in lengths)
        return Packed(torch.cat([self.null_text[:length] for length in lengths]), lengths)

    def drop_text(self, text: Packed, dropped: Bool[Tensor, " texts"]) -> Packed:
        """Texts of which some are replaced by no text."""
        return choose_text(text, self.null_text, dropped)

    # --- teacher forcing ---------------------------------------------------------------------------------

    def embed(
        self, pooled: Float[Tensor, "rows width"], inputs: Tensor | None, starts: int
    ) -> Float[Tensor, "rows positions width"]:
        """Tokens without their levels.

        Args:
            pooled: the text of each row.
            inputs: of the scales after the first, (batch, positions, token bits), alike for all rows of an image.
            starts: tokens of the first scale, if they are asked for; they have no input but the text.
        """
        parts = [(pooled[:, None] + self.start_position).expand(-1, starts, -1)]
        if inputs is not None:
            x = self.word_embedding(inputs.to(self.dtype))
            parts.append(x.repeat(len(pooled) // len(x), 1, 1))
        return torch.cat(parts, dim=1)

    def levels(self, schedule: ScaleSchedule) -> Float[Tensor, "positions width"]:
        """The level embedding of every position."""
        return self.level_embedding(schedule.levels(self.device))

    def rotation(self, schedule: ScaleSchedule, grid: tuple[int, int] | None = None) -> Rotation:
        """By how much every position turns; ``grid`` None: the published grid of the schedule's aspect ratio."""
        size = self.config.transformer.head_size
        return rotation_of(schedule, grid or reference_grid(schedule), size, self.config.positions, self.device)

    def forward(
        self,
        inputs: Float[Tensor, "batch rest token_bits"],
        text: Packed,
        schedule: ScaleSchedule | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Float[Tensor, "batch length twice_bits"]:
        """Scores of all scales at once; channel 2 k + v is the score that bit k is v.

        Args:
            inputs: of the scales 1, 2, …, in one sequence.
            text: of each image, as the text encoder gives it.
            schedule: None: the configured one.
            grid: see :meth:`rotation`; needed where the schedule is the beginning of a longer one.
        """
        schedule = schedule or self.config.schedule
        with torch.autocast(inputs.device.type, enabled=False):
            pooled, memory = self.read(text)
            x = self.embed(pooled, inputs, schedule.lengths[0])
            head_modulation = self.head.modulate(pooled)
            modulations = self.transformer.modulate(pooled)
        x = self.transformer(
            x,
            modulations,
            schedule.segments,
            levels=self.levels(schedule),
            rotation=self.rotation(schedule, grid),
            memory=memory,
        )
        return self.head(x, head_modulation)

    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """The bitwise cross-entropy of a batch, and what to log.

        Args:
            batch: ``image`` (batch, 3, height, width) in [-1, 1] and ``text``, of each image; see
                :class:`nextscale.tasks.generation.infinity_training.InfinityTraining`.
        """
        from nextscale.tasks.generation.infinity_training import InfinityTraining

        batch = {"uniform": torch.rand(len(batch["image"]), device=self.device), **batch}
        return InfinityTraining(self).loss(SYSTEM, self, batch, step=0)

    # --- sampling ----------------------------------------------------------------------------------------

    def steps(
        self,
        text: Packed,
        *,
        draws: Draws,
        negative: Packed | None = None,
        schedule: ScaleSchedule | None = None,
        grid: tuple[int, int] | None = None,
        guidance: float | Sequence[float] | None = None,
        guidance_layers: Sequence[int] = (0,),
        emitter: BitwiseEmitter | None = None,
        rows: Sequence[int] | None = None,
        network: TextNetwork | None = None,
    ) -> Iterator[ScaleStep]:
        """Sample, scale by scale: the lower-level form of :meth:`generate`.

        Args:
            text: the different texts.
            negative: what to stay away from, for each text; None: no text.
            guidance, guidance_layers: see :class:`nextscale.tasks.generation.infinity_sampling.Guidance`; None: the
                configuration's.
            rows: the text of each image; None: each text once.
            network: that :meth:`network` made of the same texts, where they are drawn again.
        """
        schedule = schedule or self.config.schedule
        if len(schedule) > self.config.levels:
            raise ValueError(f"the model has {self.config.levels} levels, the schedule {len(schedule)} scales")
        network = network or self.network(text, negative, schedule, grid, guidance, guidance_layers)
        wanted = torch.tensor(range(len(text)) if rows is None else rows, device=self.device)
        branches = network.guidance.branches(wanted, wanted + len(text))
        emitter = emitter or BitwiseEmitter(temperature=self.config.temperature)
        return sample(network, self.tokenizer.quantizer, schedule, branches, emitter, draws)

    def network(
        self,
        text: Packed,
        negative: Packed | None = None,
        schedule: ScaleSchedule | None = None,
        grid: tuple[int, int] | None = None,
        guidance: float | Sequence[float] | None = None,
        guidance_layers: Sequence[int] = (0,),
    ) -> TextNetwork:
        """The model with texts it is to draw: what depends on them alone is computed once."""
        schedule = schedule or self.config.schedule
        guide = Guidance.of(self.config.guidance if guidance is None else guidance, schedule, guidance_layers)
        text = text.to(self.device)
        texts = [text]
        if guide.needs_other:
            texts.append(self.no_text(text.lengths) if negative is None else negative.to(self.device))
            texts = [part.to(self.device, self.dtype) for part in texts]
        return TextNetwork(self, Packed.join(texts), grid or reference_grid(schedule), guide)

    def schedule_of(
        self,
        *,
        ratio: str | float | None = None,
        size: str | int | None = None,
        schedule: ScaleSchedule | str | None = None,
        **_: Any,
    ) -> ScaleSchedule:
        """The scales of an aspect ratio (width:height) and a size, or those given; see :meth:`painter`.

        Raises:
            ValueError: ratio or size are none, or are asked of a model that was made for other scales.
        """
        if schedule is not None:
            return ScaleSchedule.parse(schedule)
        if ratio is None and size is None:
            return self.config.schedule
        own = size_of(self.config.schedule)
        if size is None and own is None:
            raise ValueError(f"this model draws the scales '{self.config.schedule}', which are of no published size: "
                             "give size or schedule instead of ratio alone")  # fmt: skip
        return schedule_of(parse_ratio(ratio or 1.0), size or str(own))

    def painter(
        self,
        text: TextFeatures,
        negative: TextFeatures | None = None,
        *,
        ratio: str | float | None = None,
        size: str | int | None = None,
        schedule: ScaleSchedule | str | None = None,
        guidance: float | Sequence[float] | None = None,
        guidance_layers: Sequence[int] = (0,),
        top_k: int | Sequence[int] = 900,
        top_p: float | Sequence[float] = 0.97,
        temperature: float | Sequence[float] | None = None,
    ) -> Painter:
        """The model with the texts it is to draw.

        Args:
            ratio: aspect ratio as width:height, such as ``"16:9"``; the nearest of fifteen is taken.
            size: 256, 512, 768 or 1024, the side of a square of as many pixels (or 0.06M, 0.25M, 0.60M, 1M); None: the
                model's own.
            schedule: a list of scales of its own, instead of both.
            guidance, guidance_layers: see :class:`nextscale.tasks.generation.infinity_sampling.Guidance`; None: the
                configuration's.
            top_k, top_p, temperature: see :class:`nextscale.core.bitwise.BitwiseEmitter`; temperature None: the
                configuration's.
        """
        scales = self.schedule_of(ratio=ratio, size=size, schedule=schedule)
        emitter = BitwiseEmitter(top_k, top_p, self.config.temperature if temperature is None else temperature)
        other = None if negative is None else negative.states
        network = self.network(text.states, other, scales, None, guidance, guidance_layers)

        def paint(rows: Sequence[int], draws: Draws) -> Iterator[ScaleStep]:
            return self.steps(text.states, draws=draws, schedule=scales, emitter=emitter, rows=rows, network=network)

        return paint

    # --- files -------------------------------------------------------------------------------------------

    def to_official(self) -> dict[str, Tensor]:
        """The transformer's official state dict."""
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("tokenizer.")}
        return to_layout(state, self.config.transformer.depth, self.config.transformer.chunks)

    @classmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[InfinityConfig, dict[str, Tensor]]:
        """Configuration and flat state dict in an official file's content."""
        state = find_state_dict(content, NESTED, RECOGNISED_BY)
        return config_from_official(state, **overrides), state

    @classmethod
    def from_official(cls, content: Mapping[str, Any], tokenizer: BitwiseVQ, **overrides: Any) -> Infinity:
        """Build from an official file's content; sizes are read from its keys and shapes.

        Args:
            tokenizer: with as many bits per token.
            overrides: what a file cannot tell: ``schedule``, ``text_encoder`` (name or folder), ``text_precision``
                (None: ``"bfloat16"``, as published), ``positions``, ``restart_positions``, ``level_each_chunk``,
                ``guidance``, ``temperature``.

        Raises:
            CheckpointError: the content is not an Infinity.
        """
        config, state = cls.read_official(content, **overrides)
        with weightless():
            model = cls(config, tokenizer)
        own = {f"tokenizer.{k}": v for k, v in tokenizer.state_dict().items()} | from_layout(state)
        assign(model, own, "Infinity")
        return model.eval()

    @property
    def official_name(self) -> str:
        """The file name that the official repository gives a model of this size."""
        billions = sum(p.numel() for n, p in self.named_parameters() if not n.startswith("tokenizer.")) / 1e9
        return f"infinity_{billions:.0f}b_reg.pth" if billions >= 1 else f"infinity_{billions * 1000:.0f}m.pth"

    @property
    def parts(self) -> dict[str, Any]:
        """The models a file may hold, by what they are."""
        return {"transformer": self, "tokenizer": self.tokenizer}


_TOKENIZERS = {
    16: "infinity_vae_d16.pth", 24: "infinity_vae_d24.pth", 32: "infinity_vae_d32reg.pth", 64: "infinity_vae_d64.pth",
    56: "infinity_vae_d56_f8_14_patchify.pth",
}  # fmt: skip


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is an Infinity transformer, in the official layout."""
    try:
        state = find_state_dict(content, NESTED, RECOGNISED_BY)
    except CheckpointError:
        return False
    return {"cfg_uncond", "shared_ada_lin.1.weight", "word_embed.weight", "lvl_embed.weight"} <= set(state)


def config_from_official(state: Mapping[str, Tensor], **overrides: Any) -> InfinityConfig:
    """The configuration that an official state dict's keys and shapes imply; overrides as for ``from_official``.

    Raises:
        CheckpointError: an entry that sizes are read from is missing.
    """
    found = sizes(state)
    transformer = InfinityBlocksConfig(
        **found.blocks,
        drop_path=0.1,
        level_each_chunk=bool(overrides.get("level_each_chunk")),
        text_precision=overrides.get("text_precision") or "bfloat16",
    )
    config = InfinityConfig(transformer, **found.model)
    large = transformer.width >= 3584
    changes: dict[str, Any] = {"guidance": 3.0, "temperature": 1.0} if large else {}
    for name in ("positions", "restart_positions", "guidance", "temperature"):
        if overrides.get(name) is not None:
            changes[name] = overrides[name]
    if overrides.get("schedule") is not None:
        changes["schedule"] = ScaleSchedule.parse(overrides["schedule"])
    if overrides.get("text_encoder") is not None:
        changes["text"] = replace(FLAN_T5_XL, name=str(overrides["text_encoder"]))
    return replace(config, **changes)
