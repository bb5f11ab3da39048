"""STAR: text to image by next-scale prediction.

Ma et al. 2024, "STAR: Scale-wise Text-conditioned AutoRegressive image generation" (arXiv 2406.10797); official code
and weights Davinci-XLab/STAR-T2I.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.checkpoint import assign, find_state_dict, weightless
from nextscale.core.cross_attention import Packed
from nextscale.core.random import Draws, ImageDraws
from nextscale.core.rotary import Rotation
from nextscale.core.sampling import ScaleStep, classifier_free, sample
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.star_config import SampleVersion, STARConfig, fitting
from nextscale.tasks.generation.star_head import StableHead
from nextscale.tasks.generation.star_layout import (
    NESTED,
    RECOGNISED_BY,
    config_from_official,
    official_state,
    own_state,
)
from nextscale.tasks.generation.star_layout import is_official as is_official
from nextscale.tasks.generation.star_sampling import ReleasedDraws, STAREmitter, TextNetwork
from nextscale.tasks.generation.star_transformer import STARTransformer, kept_segments, rotation_of
from nextscale.tasks.generation.text import TextFeatures
from nextscale.tasks.generation.text_to_image import DrawnText, Painter, Prompt, TextToImage
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ

SYSTEM = "star"


class STAR(TextToImage):
    """The transformer over a token pyramid, together with the tokenizer that makes and draws it.

    The tokenizer is frozen: it takes no gradient and stays in evaluation form.
    """

    system, config_class, tokenizer_class = SYSTEM, STARConfig, ResidualVQ
    config: STARConfig
    tokenizer: ResidualVQ
    no_decay = ("level_projection", "shared_modulation")  # of the weights, beside those of every transformer

    def __init__(self, config: STARConfig, tokenizer: ResidualVQ) -> None:
        super().__init__(config.text)
        codes = tokenizer.config.quantizer
        if (codes.vocabulary, codes.channels) != (config.vocabulary, config.code_channels):
            raise ValueError(
                f"the transformer speaks {config.vocabulary} codes of {config.code_channels} numbers, the tokenizer "
                f"{codes.vocabulary} of {codes.channels}: they do not belong together"
            )
        self.config = config
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        blocks, levels = config.transformer, len(config.schedule)
        width = blocks.width
        self.text_embedding = nn.Linear(blocks.text_width, width)
        self.start_position = nn.Parameter(torch.empty(1, config.schedule.lengths[0], width))
        self.word_embedding = nn.Linear(config.code_channels, width)
        self.level_embedding = nn.Embedding(levels, width)
        self.level_projection = nn.Linear(2 * width, width) if blocks.conditioning == "shared" else None
        self.position_embedding: nn.Parameter | None = None
        if not config.rotary:
            self.position_embedding = nn.Parameter(torch.empty(1, config.schedule.length, width))
        self.transformer = STARTransformer(blocks)
        self.norm = nn.LayerNorm(width, eps=blocks.norm_eps, elementwise_affine=False)
        self.head = nn.Linear(width, config.vocabulary)
        self.stable: StableHead | None = None
        if config.stable_from is not None:
            self.stable = StableHead(blocks, levels, config.code_channels, config.vocabulary)

    @property
    def dtype(self) -> torch.dtype:
        return self.word_embedding.weight.dtype

    # --- the network -------------------------------------------------------------------------------------

    def embed(
        self,
        start: Float[Tensor, "rows width"],
        inputs: Tensor | None,
        schedule: ScaleSchedule,
        begin: int,
        stop: int,
    ) -> Float[Tensor, "rows positions width"]:
        """Tokens of the flat positions [begin, stop), float32 in a float32 model whatever autocast says.

        Args:
            start: of each row's text.
            inputs: of the positions behind the first scale, (batch, positions, code channels), alike for all rows of an
                image.
        """
        parts: list[Tensor] = []
        if begin == 0:
            parts.append((start[:, None] + self.start_position).expand(-1, schedule.lengths[0], -1))
        if inputs is not None:
            x = self.word_embedding(inputs.to(self.dtype))
            parts.append(x.repeat(len(start) // len(x), 1, 1))
        x = torch.cat(parts, dim=1)
        if self.position_embedding is not None:
            x = x + self.position_embedding[:, begin:stop]
        if self.config.add_levels:
            x = x + self.level_embedding(schedule.levels(self.device)[begin:stop])
        return x

    def rotation(self, schedule: ScaleSchedule) -> Rotation | None:
        """By how much every position turns; None where positions are a learned table."""
        config = self.config
        if not config.rotary:
            return None
        size = config.transformer.head_size
        return rotation_of(schedule, size, config.rotary_base, config.rotary_span, self.device)

    def modulations(self, schedule: ScaleSchedule | None = None) -> list[Float[Tensor, "1 levels 6 width"]] | None:
        """Every block's modulation at each level, from the level and the last one; None without modulation."""
        if self.level_projection is None:
            return None
        levels = self.level_embedding.weight[: len(schedule or self.config.schedule)]
        condition = self.level_projection(torch.cat((levels, levels[-1:].expand_as(levels)), dim=-1))
        return [each.transpose(0, 1) for each in self.transformer.modulate(condition)]

    def scores(self, features: Float[Tensor, "rows tokens width"]) -> Float[Tensor, "rows tokens vocabulary"]:
        """The head: scores of the codes, float32."""
        x = features.float()
        return self.head((self.norm(x) if self.config.head_norm else x).to(self.head.weight.dtype)).float()

    # --- teacher forcing ---------------------------------------------------------------------------------

    def hidden(
        self,
        inputs: Float[Tensor, "batch rest channels"],
        text: TextFeatures,
        schedule: ScaleSchedule | None = None,
        keep: Int[Tensor, " kept"] | None = None,
    ) -> Float[Tensor, "batch length width"]:
        """The last features of all scales at once; arguments as of :meth:`forward`."""
        schedule = fitting(self.config, schedule)
        text = text.to(self.device, self.dtype)
        with torch.autocast(inputs.device.type, enabled=False):
            start = self.text_embedding(text.vectors())
            x = self.embed(start, inputs, schedule, 0, schedule.length)
            modulations, levels = self.modulations(schedule), schedule.levels(self.device)
        rotation, segments = self.rotation(schedule), schedule.segments
        if keep is not None:
            x, levels = x[:, keep], levels[keep]
            rotation = None if rotation is None else Rotation(rotation.cos[keep], rotation.sin[keep])
            segments = kept_segments(schedule, keep)
        if modulations is not None:
            modulations = [each[:, levels] for each in modulations]
        reading = self.config.transformer.cross_attention
        memory: Packed = text.states.select([0]) if reading == "first" else text.states
        return self.transformer(x, modulations, segments, rotation=rotation, memory=memory)

    def forward(
        self,
        inputs: Float[Tensor, "batch rest channels"],
        text: TextFeatures,
        schedule: ScaleSchedule | None = None,
        keep: Int[Tensor, " kept"] | None = None,
        known: Float[Tensor, "batch fine channels"] | None = None,
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Scores of all scales at once.

        Args:
            inputs: the quantiser's ``teacher_inputs``: of the scales 1, 2, ….
            text: of each image, as the text encoder gives it.
            schedule: None: the configured one.
            keep: places of the tokens that take part, rising; None: all.
            known: give the sampling head's scores of the fine scales instead, without gradient for the rest: codes of
                the tokens that are known, zeros elsewhere.
        """
        if known is None:
            return self.scores(self.hidden(inputs, text, schedule, keep))
        first, schedule = self.config.stable_from, fitting(self.config, schedule)
        if self.stable is None or first is None:
            raise ValueError("this STAR has no sampling head; make one with stable_from")
        with torch.no_grad():
            features = self.hidden(inputs, text, schedule)[:, schedule.ranges[first][0] :]
        with torch.autocast(inputs.device.type, enabled=False):
            start = self.stable.read(text.to(self.device, self.dtype).vectors())
        return self.stable(start, features, known, schedule, first, len(schedule) - 1, self.rotation(schedule))

    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """The next-scale cross-entropy of a batch, and what to log.

        Args:
            batch: ``image`` (batch, 3, height, width) in [-1, 1] and ``text``, of each image; see
                :class:`nextscale.tasks.generation.star_training.STARTraining`.
        """
        from nextscale.tasks.generation.star_training import STARTraining

        batch = {"uniform": torch.rand(len(batch["image"]), device=self.device), **batch}
        return STARTraining(self).loss(SYSTEM, self, batch, step=0)

    # --- sampling ----------------------------------------------------------------------------------------

    def steps(
        self,
        text: TextFeatures,
        *,
        draws: Draws,
        other: TextFeatures | None = None,
        schedule: ScaleSchedule | None = None,
        guidance: float | Sequence[float] | None = None,
        emitter: STAREmitter | None = None,
        rows: Sequence[int] | None = None,
        share_first: bool = False,
        network: TextNetwork | None = None,
    ) -> Iterator[ScaleStep]:
        """Sample, scale by scale: the lower-level form of :meth:`generate`.

        Args:
            text: the different texts.
            other: what to stay away from, for each text; None: the empty text.
            guidance: strength t at the last scale: (1 + t) wanted - t other; None: the configuration's.
            rows: the text of each image; None: each text once.
            share_first: see :class:`nextscale.tasks.generation.star_sampling.TextNetwork`.
            network: that :meth:`network` made of the same texts, where they are drawn again.
        """
        schedule = fitting(self.config, schedule)
        guidance = self.config.guidance if guidance is None else guidance
        emitter = emitter or self.emitter(schedule, guidance)
        network = network or self.network(text, other, schedule, any(emitter.strengths), share_first)
        wanted = torch.tensor(range(len(text)) if rows is None else rows, device=self.device)
        strengths = guidance if network.branches == 2 else 0.0
        branches = classifier_free(wanted, wanted + len(text), strengths, schedule)
        return sample(network, self.tokenizer.quantizer, schedule, branches, emitter, draws)

    def network(
        self,
        text: TextFeatures,
        other: TextFeatures | None = None,
        schedule: ScaleSchedule | None = None,
        guided: bool = True,
        share_first: bool = False,
    ) -> TextNetwork:
        """The model with texts it is to draw: what depends on them alone is computed once."""
        if guided and other is None:
            other = self.features("").select([0] * len(text))
        return TextNetwork(self, text, other if guided else None, fitting(self.config, schedule), share_first)

    def emitter(
        self,
        schedule: ScaleSchedule,
        guidance: float | Sequence[float],
        sample_version: SampleVersion | None = None,
        stable: bool = True,
        **filters: Any,
    ) -> STAREmitter:
        """How scales are drawn; see :class:`nextscale.tasks.generation.star_sampling.STAREmitter`."""
        strengths = guidance if isinstance(guidance, Sequence) else (guidance,) * len(schedule)
        first = self.config.stable_from if stable else None
        filters = {"temperature": self.config.temperature} | filters
        return STAREmitter(strengths, first, sample_version or self.config.sample_version, **filters)

    def schedule_of(
        self,
        *,
        ratio: str | float | None = None,
        size: str | int | None = None,
        schedule: ScaleSchedule | str | None = None,
        **_: Any,
    ) -> ScaleSchedule:
        """The scales given, or the model's own, which are of one size; see :meth:`painter`.

        Raises:
            ValueError: another size or ratio is asked for.
        """
        if schedule is not None:
            return fitting(self.config, ScaleSchedule.parse(schedule))
        height, width = self.tokenizer.image_size(self.config.schedule)
        if str(ratio or "1:1") not in ("1:1", "1", "1.0") or str(size or height) != str(height):
            raise ValueError(
                f"this STAR draws {height} x {width} pixels, not ratio {ratio or '1:1'} and size {size or height}; "
                "another list of scales can be tried with scales"
            )
        return self.config.schedule

    def painter(
        self,
        text: TextFeatures,
        negative: TextFeatures | None = None,
        *,
        ratio: str | float | None = None,
        size: str | int | None = None,
        schedule: ScaleSchedule | str | None = None,
        guidance: float | Sequence[float] | None = None,
        sample_version: SampleVersion | None = None,
        stable: bool = True,
        share_first: bool = False,
        **filters: Any,
    ) -> Painter:
        """The model with the texts it is to draw.

        Args:
            ratio, size: those of the model's images; there are no others.
            schedule: a list of scales of its own.
            guidance: see :meth:`steps`.
            sample_version, stable: None: the configuration's; False: all scales are drawn at once, also where there is
                a sampling head.
            filters: ``top_k``, ``top_p``, ``temperature``, ``smooth``: see
                :class:`nextscale.tasks.generation.star_sampling.STAREmitter`.
            share_first: see :class:`nextscale.tasks.generation.star_sampling.TextNetwork`.
        """
        scales = self.schedule_of(ratio=ratio, size=size, schedule=schedule)
        strength = self.config.guidance if guidance is None else guidance
        emitter = self.emitter(scales, strength, sample_version, stable, **filters)
        network = self.network(text, negative, scales, any(emitter.strengths), share_first)

        def paint(rows: Sequence[int], draws: Draws) -> Iterator[ScaleStep]:
            return self.steps(
                text, draws=draws, schedule=scales, guidance=strength, emitter=emitter, rows=rows, network=network
            )

        return paint

    def draw(
        self, prompt: Prompt, n: int | None = None, seed: int | Sequence[int] = 0, **given: Any
    ) -> Iterator[DrawnText]:
        """As of every text-to-image generator; with ``official_draws`` the first image also reads for its batch."""
        official = {"share_first": True} if given.get("official_draws") else {}
        return super().draw(prompt, n, seed, **official | given)

    def no_prompt(self, *, guidance: float | Sequence[float] | None = None, **_: Any) -> str | None:
        strength = self.config.guidance if guidance is None else guidance
        return "" if (any(strength) if isinstance(strength, Sequence) else strength) else None

    def draws(self, seeds: Sequence[int], official: bool = False) -> Draws:
        return ReleasedDraws(seeds[0], self.device) if official else ImageDraws(seeds)

    # --- files -------------------------------------------------------------------------------------------

    def to_official(self) -> dict[str, Tensor]:
        """The transformer's official state dict; loads strictly into the official code."""
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("tokenizer.")}
        return official_state(state, self.config)

    @classmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[STARConfig, dict[str, Tensor]]:
        """Configuration and flat state dict in an official file's content."""
        state = find_state_dict(content, NESTED, RECOGNISED_BY)
        return config_from_official(state, content, **overrides), state

    @classmethod
    def from_official(cls, content: Mapping[str, Any], tokenizer: ResidualVQ, **overrides: Any) -> STAR:
        """Build from an official file's content; sizes are read from its keys and shapes.

        Args:
            tokenizer: its codes must fit.
            overrides: what a file cannot tell: ``schedule``, ``text_encoder`` (name or folder), ``cross_attention``
                (None: ``"first"``, as released), ``rotary_base``, ``rotary_span`` (0: tokens are counted),
                ``add_levels``, ``head_norm``, ``stable_from`` (None: 9), ``sample_version``, ``guidance``, ``heads`` of
                models without cosine attention, ``norm_eps``.

        Raises:
            CheckpointError: the content is not a STAR, or its scales cannot be told.
        """
        config, state = cls.read_official(content, **overrides)
        with weightless():
            model = cls(config, tokenizer)
        own = {f"tokenizer.{k}": v for k, v in tokenizer.state_dict().items()} | own_state(state)
        assign(model, own, "STAR")
        return model.eval()

    @property
    def official_name(self) -> str:
        """A file name as the official training gives them: depth, pixels, and whether there is a sampling head."""
        pixels = self.tokenizer.image_size(self.config.schedule)[0]
        sampler = "" if self.stable is None else "_sampler"
        return f"var_rope_d{self.config.transformer.depth}_{pixels}{sampler}.pth"

    @property
    def parts(self) -> dict[str, Any]:
        """The models a file may hold, by what they are."""
        return {"transformer": self, **self.tokenizer.parts}
