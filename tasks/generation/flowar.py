"""FlowAR: class-conditional images over continuous latents; each scale is drawn by flow matching.

Ren et al. 2024, "FlowAR: Scale-wise Autoregressive Image Generation Meets Flow Matching" (arXiv 2412.15205, ICML 2025);
official code and weights OliverRensu/FlowAR. Two stacks of blocks, one after the other under the same visibility, give
a conditioning for every token of a scale; a small transformer then turns noise into that scale's latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.checkpoint import CheckpointError, assign, save_folder, weightless
from nextscale.core.config import from_json, to_json
from nextscale.core.random import Draws
from nextscale.core.rotary import Rotation
from nextscale.core.sampling import Accepted, Branch, Control, ScaleStep, classifier_free, sample
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingTask
from nextscale.core.transformer import NextScaleTransformer
from nextscale.tasks.generation.class_conditional import ClassConditional
from nextscale.tasks.generation.drawing import DRAWING
from nextscale.tasks.generation.flowar_config import FlowARConfig
from nextscale.tasks.generation.flowar_flow import FlowEmitter, FlowNetwork
from nextscale.tasks.generation.flowar_layout import (
    config_from_official,
    find_weights,
    from_layout,
    to_layout,
)
from nextscale.tasks.generation.flowar_transformer import FlowARBlock, RootMeanSquareNorm, rotation_of
from nextscale.tasks.tokenizers.kl_autoencoder import KLAutoencoder, KLConfig

SYSTEM = "flowar"


class FlowAR(ClassConditional):
    """The transformer over a pyramid of latents, together with the autoencoder that makes and draws them.

    The autoencoder is frozen: it takes no gradient and stays in evaluation form. ``generate`` takes ``ode_steps`` and
    ``guidance_bound`` beside the class (see :class:`FlowARConfig`); filters and temperatures are for drawn codes, and
    are refused.
    """

    system: ClassVar[str] = SYSTEM
    config: FlowARConfig
    tokenizer: KLAutoencoder

    def __init__(self, config: FlowARConfig, tokenizer: KLAutoencoder) -> None:
        super().__init__()
        if tokenizer.config.channels != config.channels:
            raise ValueError(
                f"the transformer speaks latents of {config.channels} channels, the autoencoder of "
                f"{tokenizer.config.channels}: they do not belong together"
            )
        self.config = config
        width, length = config.encoder.width, config.schedule.length
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.class_embedding = nn.Embedding(config.classes + 1, width)
        self.latent_embedding = nn.Linear(config.channels, width)
        # One per token of the list, before each stack and before the flow network.
        self.encoder_places = nn.Parameter(torch.zeros(1, length, width))
        self.decoder_places = nn.Parameter(torch.zeros(1, length, width))
        self.flow_places = nn.Parameter(torch.zeros(1, length, width))
        self.input_norm = RootMeanSquareNorm(width)
        self.encoder = NextScaleTransformer(config.encoder, block=FlowARBlock)
        self.encoder_norm = RootMeanSquareNorm(width)
        self.between = nn.Linear(width, width)
        self.decoder = NextScaleTransformer(config.decoder, block=FlowARBlock)
        self.decoder_norm = RootMeanSquareNorm(width)
        self.flow = FlowNetwork(config.flow, config.channels, width)

    @property
    def dtype(self) -> torch.dtype:
        return self.latent_embedding.weight.dtype

    def rotation(self, stack: NextScaleTransformer) -> Rotation:
        """Of all tokens of the list, for the heads of one stack."""
        return rotation_of(self.config.schedule, stack.config.head_size, self.device)

    # --- teacher forcing ---------------------------------------------------------------------------------

    def conditioning(
        self, inputs: Float[Tensor, "batch rest channels"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch length width"]:
        """What the flow network is told about every token of all scales at once.

        Args:
            inputs: the pyramid's ``teacher_inputs``: of scales 1, 2, ….
            labels: 0 to ``classes``; ``classes`` is "no class".
        """
        condition, segments = self.class_embedding(labels), self.config.schedule.segments
        x = torch.cat((condition[:, None], self.latent_embedding(inputs.to(self.dtype))), dim=1)
        x = self.input_norm(x + self.encoder_places)
        x = self.encoder(x, self.encoder.modulate(condition), segments, rotation=self.rotation(self.encoder))
        x = self.between(self.encoder_norm(x)) + self.decoder_places
        x = self.decoder(x, self.decoder.modulate(condition), segments, rotation=self.rotation(self.decoder))
        return self.decoder_norm(x) + self.flow_places

    def forward(
        self,
        inputs: Float[Tensor, "batch rest channels"],
        labels: Int[Tensor, " batch"],
        noisy: Float[Tensor, "batch length channels"],
        times: Float[Tensor, "batch scales"],
    ) -> Float[Tensor, "batch length channels"]:
        """Velocities of all scales at once.

        Args:
            inputs, labels: see :meth:`conditioning`.
            noisy: x_t of every token.
            times: t of each image at each scale, in [0, 1].
        """
        return self.velocities(self.conditioning(inputs, labels), noisy, times)

    def velocities(self, conditioning: Tensor, noisy: Tensor, times: Tensor) -> Float[Tensor, "batch length channels"]:
        """The flow network's output of each scale by itself, joined."""
        schedule = self.config.schedule
        turned = rotation_of(schedule, self.config.flow.blocks.head_size, self.device)
        parts = []
        for index, (start, stop) in enumerate(schedule.ranges):
            rotation = turned[start:stop]
            given = self.flow.condition(conditioning[:, start:stop], rotation)
            x = noisy[:, start:stop].to(self.dtype)
            parts.append(self.flow(x, self.flow.at(times[:, index]), given, rotation))
        return torch.cat(parts, dim=1)

    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """The flow-matching loss of a batch, and what to log.

        Args:
            batch: ``label`` (batch,), and ``image`` (batch, 3, height, width) in [-1, 1] or ``tokens``, as
                ``nextscale tokenize`` keeps them; ``uniform`` (batch,) in [0, 1) decides which labels are dropped,
                drawn where it is missing, as are times and noise.
        """
        batch = {"uniform": torch.rand(len(batch["label"]), device=self.device), **batch}
        return self.training_task().loss(self.system, self, batch, 0)

    def training_task(self) -> TrainingTask:
        """The loss that such a model is trained with."""
        from nextscale.tasks.generation.flowar_training import FlowARTraining

        return FlowARTraining(self)

    # --- sampling ----------------------------------------------------------------------------------------

    def start(self, conditions: Int[Tensor, " rows"], schedule: ScaleSchedule) -> FlowARSession:
        """Fold the class labels of all rows into a session (see :class:`nextscale.core.sampling.Session`)."""
        if schedule != self.config.schedule.prefix(len(schedule)):
            raise ValueError(
                f"this model has positions for the scales '{self.config.schedule}' only, not for '{schedule}'"
            )
        return FlowARSession(self, conditions, schedule)

    def flow_emitter(self, ode_steps: int | None = None, guidance_bound: float | None = None) -> FlowEmitter:
        """What draws each scale; None: the configuration's."""
        steps = self.config.ode_steps if ode_steps is None else ode_steps
        return FlowEmitter(self.flow, steps, self.config.guidance_bound if guidance_bound is None else guidance_bound)

    def make_emitter(self, **filters: Any) -> None:
        """Nothing: :meth:`flow_emitter` is made where it is used.

        Raises:
            ValueError: filters are named, which are for drawn codes.
        """
        if wrong := [name for name, value in filters.items() if value != DRAWING[name]]:
            raise ValueError(
                f"{', '.join(wrong)}: FlowAR draws continuous values, not codes; ode_steps, guidance and "
                "guidance_bound say how"
            )

    def steps(
        self,
        labels: Int[Tensor, " batch"],
        *,
        draws: Draws,
        emitter: Any = None,
        guidance: float | Sequence[float] | None = None,
        controls: Sequence[Control] = (),
        accepted: Accepted | None = None,
        stop: int | None = None,
        ode_steps: int | None = None,
        guidance_bound: float | None = None,
    ) -> Iterator[ScaleStep]:
        """Sample, scale by scale: the lower-level form of :meth:`generate`.

        Args:
            labels: one class per image; ``classes`` is "no class".
            emitter: None: :meth:`flow_emitter` of ``ode_steps`` and ``guidance_bound``.
            guidance: strength t at the last scale, growing to it from 0 at the first; one number, or one per scale.
                None: the configuration's. Where it is not above 0 it does nothing.
            accepted, stop: begin later or end earlier (:func:`nextscale.core.sampling.sample`).
        """
        strength = self.config.guidance if guidance is None else guidance
        branches = self.branches(labels, strength)
        emitter = emitter or self.flow_emitter(ode_steps, guidance_bound)
        pyramid: Any = self.tokenizer.quantizer
        return sample(self, pyramid, self.config.schedule, branches, emitter, draws, controls, accepted, stop)

    def branches(self, labels: Int[Tensor, " batch"], strength: float | Sequence[float]) -> list[Branch]:
        """The conditional pass and, where guidance does something, the unconditional one."""
        both = classifier_free(labels, torch.full_like(labels, self.config.classes), strength, self.config.schedule)
        return both if max(both[0].weights) > 1 else both[:1]

    def picture(self, total: Tensor) -> Float[Tensor, "batch 3 height width"]:
        """The images, in [0, 1], of any scale's latents, on the finest grid."""
        return super().picture(self.tokenizer.quantizer.enlarged(total, self.config.schedule))

    # --- files -------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write ``model.safetensors``, autoencoder included, and ``config.json``."""
        config = {"transformer": to_json(self.config), "tokenizer": to_json(self.tokenizer.config)}
        return save_folder(folder, self.state_dict(), {"system": self.system, "config": config})

    @classmethod
    def from_saved(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """From the content of a folder written by :meth:`save`."""
        parts = config["config"]
        with weightless():
            tokenizer = KLAutoencoder(from_json(KLConfig, parts["tokenizer"]))
            model = cls(from_json(FlowARConfig, parts["transformer"]), tokenizer)
        assign(model, state, "the saved FlowAR")
        return model.eval()

    def to_official(self) -> dict[str, Tensor]:
        """The official state dict, derived buffers included; loads strictly into the official code.

        Raises:
            ValueError: the official code has no place for a part of it.
        """
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("tokenizer.")}
        return to_layout(self.config, state)

    @property
    def official_name(self) -> str:
        """The file name of the official release of this size; of other sizes, one like it."""
        widths = {768: "S", 1024: "L", 1536: "H"}
        return f"FlowAR-{widths.get(self.config.encoder.width, self.config.encoder.width)}.pth"

    @classmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[FlowARConfig, dict[str, Tensor]]:
        """Configuration and flat state dict in an official file's content; overrides as for :meth:`from_official`."""
        state = find_weights(content)
        return config_from_official(state, **overrides), state

    @classmethod
    def from_official(cls, content: Mapping[str, Any], tokenizer: KLAutoencoder, **overrides: Any) -> Self:
        """Build from an official file's content; sizes are read from its keys and shapes.

        Of a training checkpoint the averaged weights are taken.

        Args:
            tokenizer: its latents must fit.
            overrides: what a file may not tell: ``schedule``; ``heads``, one number or one for each stack, of files
                without the rotary frequencies; ``guidance``, ``guidance_bound`` and ``ode_steps``, which are the
                released models' where sizes are theirs.

        Raises:
            CheckpointError: the content is not a FlowAR.
        """
        config, state = cls.read_official(content, **overrides)
        with weightless():
            model = cls(config, tokenizer)
        own = {f"tokenizer.{k}": v for k, v in tokenizer.state_dict().items()} | from_layout(state)
        assign(model, own, cls.__name__)
        return model.eval()


class FlowARSession:
    """FlowAR in the middle of sampling."""

    def __init__(self, model: FlowAR, labels: Tensor, schedule: ScaleSchedule) -> None:
        self._model, self._schedule = model, schedule
        self._condition = model.class_embedding(labels)
        stacks = (model.encoder, model.decoder)
        self._modulations = [stack.modulate(self._condition) for stack in stacks]
        self._rotations = [model.rotation(stack) for stack in stacks]
        self.caches = [stack.allocate_cache(len(labels), schedule.length, self._condition.dtype) for stack in stacks]

    def step(self, index: int, inputs: Tensor | None, first: int | None = None) -> Tensor:
        """The conditioning of every token that is run, (rows, tokens, width)."""
        model, schedule, rows = self._model, self._schedule, len(self._condition)
        begin = index if first is None else first
        start, stop = schedule.ranges[begin][0], schedule.ranges[index][1]
        parts = [self._condition[:, None]] if begin == 0 else []
        if inputs is not None:
            x = model.latent_embedding(inputs.to(model.dtype))
            parts.append(x.repeat(rows // len(x), 1, 1))
        x = model.input_norm(torch.cat(parts, dim=1) + model.encoder_places[:, start:stop])
        x = self._stack(0, model.encoder, x, begin, index)
        x = model.between(model.encoder_norm(x)) + model.decoder_places[:, start:stop]
        x = self._stack(1, model.decoder, x, begin, index)
        return model.decoder_norm(x) + model.flow_places[:, start:stop]

    def _stack(self, number: int, stack: NextScaleTransformer, x: Tensor, begin: int, index: int) -> Tensor:
        schedule = self._schedule
        rotation = self._rotations[number][schedule.ranges[begin][0] : schedule.ranges[index][1]]
        segments = schedule.causal(begin, index)
        return stack(x, self._modulations[number], segments, self.caches[number], rotation=rotation)

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        """The conditioning itself: the emitter's network takes the place of a head."""
        return hidden[rows]


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is a FlowAR, in the official layout."""
    try:
        find_weights(content)
    except CheckpointError:
        return False
    return True
