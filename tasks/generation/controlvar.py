"""ControlVAR: a control picture and an image modelled together, scale by scale.

Li et al. 2024, "ControlVAR: Exploring Controllable Visual Autoregressive Modeling" (arXiv 2406.09750); official code
lxa9867/ControlVAR, weights qiuk6/ControlVAR. At every scale a VAR predicts the control's tokens and the image's in
one step. With one of the two given it draws the other: control to image, or image to control.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.checkpoint import find_state_dict
from nextscale.core.heads import CategoricalEmitter
from nextscale.core.random import BatchDraws, Draws
from nextscale.core.sampling import Accepted, Control, ScaleStep
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.class_conditional import Condition
from nextscale.tasks.generation.controlvar_guidance import Cells, PairSession, Strengths, given_cells, sample_pairs
from nextscale.tasks.generation.controlvar_layout import (
    BUFFERS,
    KEYS,
    NESTED,
    PRESETS,
    ControlVARConfig,
    config_from_official,
    is_official,
)
from nextscale.tasks.generation.controlvar_pairs import (
    second_half,
    single,
    visibility,
    visibility_mask,
    weave,
)
from nextscale.tasks.generation.var import VAR, VARConfig
from nextscale.tasks.tokenizers.image_tokenizer import ImageTokenizer

__all__ = ["PRESETS", "SYSTEM", "ControlVAR", "ControlVARConfig", "is_official"]

SYSTEM = "controlvar"

SHOWN = ("image", "control", "pair")


class ControlVAR(VAR):
    """VAR's network over pairs of token maps."""

    system: ClassVar[str] = SYSTEM
    config_class: ClassVar[type[VARConfig]] = ControlVARConfig
    config: ControlVARConfig

    def __init__(self, config: ControlVARConfig, tokenizer: ImageTokenizer) -> None:
        super().__init__(config, tokenizer)
        width = config.transformer.width
        if config.type_start:
            self.type_embedding = nn.Embedding(len(config.control_types) + 1, width)
        if config.half_embedding:
            self.half_embedding = nn.Embedding(2, width)

    # --- teacher forcing ---------------------------------------------------------------------------------

    def place(
        self, schedule: ScaleSchedule, start: int, stop: int, control_first: bool = True
    ) -> Float[Tensor, "1 positions width"]:
        place = super().place(schedule, start, stop)
        if self.config.half_embedding:
            second = second_half(schedule, self.device)[start:stop]
            place = place + self.half_embedding(1 - second if control_first else second)
        return place

    def embed(
        self, inputs: Tensor | None, schedule: ScaleSchedule, start: int, stop: int, control_first: bool = True
    ) -> Tensor:
        """Tokens of the flat positions [start, stop) after the first scale; see :meth:`start_tokens` for those."""
        assert inputs is not None
        return self.word_embedding(inputs.to(self.dtype)) + self.place(schedule, start, stop, control_first)

    def start_tokens(
        self,
        classes: Float[Tensor, "batch width"],
        types: Int[Tensor, " batch"],
        schedule: ScaleSchedule,
        control_first: bool = True,
    ) -> Float[Tensor, "batch positions width"]:
        """The first scale's tokens.

        Args:
            classes: the class vectors.
        """
        control = self.type_embedding(types) if self.config.type_start else classes
        first, second = (control, classes) if control_first else (classes, control)
        count = schedule.lengths[0]
        start = torch.stack((first, second), dim=1).repeat_interleave(count // 2, 1) + self.start_position
        if self.config.either_order and not self.config.type_start:
            second_place = second_half(schedule, self.device)[:count, None]
            start = start * (1 - 2 * (second_place == (0 if control_first else 1)))
        return start + self.place(schedule, 0, count, control_first)

    def drop_types(self, types: Int[Tensor, " batch"], uniform: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Types replaced by "no type" where ``uniform`` in [0, 1) is below the configured share."""
        if not self.config.type_start:
            return types
        return torch.where(uniform < self.config.type_drop, len(self.config.control_types), types)

    def join(
        self, control: Int[Tensor, "batch half"], image: Int[Tensor, "batch half"], control_first: bool = True
    ) -> tuple[Int[Tensor, "batch length"], Float[Tensor, "batch rest channels"]]:
        """Tokens of both halves in sequence order, and what enters the network with teacher forcing."""
        schedule, quantizer = single(self.config.schedule), self.tokenizer.quantizer
        pair = (control, image) if control_first else (image, control)
        first, second = quantizer.teacher_inputs(torch.cat(pair), schedule).chunk(2)
        return weave(*pair, schedule.lengths), weave(first, second, schedule.lengths[1:])

    def forward(
        self,
        inputs: Float[Tensor, "batch rest channels"],
        labels: Int[Tensor, " batch"],
        schedule: ScaleSchedule | None = None,
        types: Int[Tensor, " batch"] | None = None,
        control_first: bool = True,
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Logits of both halves at all scales, in sequence order.

        Args:
            inputs: from :meth:`join`.
            labels: 0 to ``classes``; ``classes`` is "no class".
            types: places in ``control_types``; their number is "no type", also where None is given.
        """
        schedule = schedule or self.config.schedule
        first = schedule.lengths[0]
        if types is None:
            types = torch.full_like(labels, len(self.config.control_types))
        with torch.autocast(inputs.device.type, enabled=False):
            condition = self.class_embedding(labels)
            x = self.start_tokens(condition, types, schedule, control_first)
            if len(schedule) > 1:
                rest = self.embed(inputs, schedule, first, schedule.length, control_first)
                x = torch.cat((x, rest), dim=1)
        seen = visibility(schedule, self.config.halves, device=x.device)
        x = self.transformer(x, self.transformer.modulate(condition), seen)
        return self.head(x, self.head.modulate(condition))

    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """The cross-entropy of both halves, and what to log.

        Args:
            batch: see :class:`nextscale.tasks.generation.controlvar_training.ControlVARTraining`; what decides the
                dropout is drawn where it is missing.
        """
        from nextscale.tasks.generation.controlvar_training import ControlVARTraining

        count = len(batch["label"])
        drawn = {name: torch.rand(count, device=self.device) for name in ("uniform", "type_uniform")}
        return ControlVARTraining(self).loss(SYSTEM, self, {**drawn, **batch}, step=0)

    # --- sampling ----------------------------------------------------------------------------------------

    def start(
        self,
        conditions: Int[Tensor, "rows 2"],
        schedule: ScaleSchedule,
        reads: Sequence[tuple[int, int]] | None = None,
        control_first: bool = True,
    ) -> PairSession:
        """Fold class and type of all rows into a session (see :class:`PairSession`)."""
        return PairSession(self, conditions, schedule, reads, control_first)

    def steps(
        self,
        labels: Int[Tensor, " batch"],
        *,
        draws: Draws,
        emitter: CategoricalEmitter | None = None,
        guidance: float | Sequence[float] | None = None,
        controls: Sequence[Control] = (),
        accepted: Accepted | None = None,
        stop: int | None = None,
        control: Tensor | None = None,
        image: Tensor | None = None,
        keep_control: Cells | None = None,
        keep_image: Cells | None = None,
        control_type: str | Sequence[str] | Int[Tensor, " batch"] | None = None,
        control_first: bool = True,
        show: str = "image",
    ) -> Iterator[ScaleStep]:
        """Sample, scale by scale: the lower-level form of :meth:`generate`.

        Args:
            guidance: one strength, or three: of the class, the type and the given pixels
                (:mod:`nextscale.tasks.generation.controlvar_guidance`); None: the configuration's.
            control, image: what is given: pictures (batch, 3, height, width) in [0, 1], or tokens of all scales
                (batch, length of one half).
            keep_control, keep_image: which cells of them are held fixed; None: all.
            control_type: one for all images, or one for each; None: the only one, or drawn where no control is given.
            control_first: whether the control comes before the image in the sequence; models trained in either order
                take both.
            show: "image", "control" or "pair": which halves ``total`` holds, as its second axis.

        Raises:
            ValueError: a picture has another size, a type is unknown or missing, or guidance is neither one number nor
                three.
        """
        if show not in SHOWN:
            raise ValueError(f"show is {show!r}, expected one of {', '.join(SHOWN)}")
        if not control_first and not self.config.either_order:
            raise ValueError("this model was trained with the control before the image only: leave control_first on")
        types = self.type_numbers(control_type, len(labels), given=control is not None)
        if types is None:
            types = draws.integers(len(self.config.control_types), len(labels))
        pictures = ((control, keep_control), (image, keep_image))
        given = given_cells(self, len(labels), pictures, control_first)
        if given is not None and accepted is not None:
            raise ValueError("sampling that goes on from accepted scales takes no given pictures")
        # The official code lets the branches draw apart, where a whole half is given.
        wholly = given is not None and given.kept.sum() * 2 == len(given.kept)
        pairs = sample_pairs(
            self,
            labels,
            types.to(labels.device),
            strengths=self._strengths(guidance),
            draws=draws,
            emitter=emitter or CategoricalEmitter(),
            given=given,
            separate=bool(wholly) and isinstance(draws, BatchDraws),
            controls=controls,
            control_first=control_first,
            accepted=accepted,
            stop=stop,
        )
        order = [0, 1] if control_first else [1, 0]
        shown = {"control": order[:1], "image": order[1:], "pair": order}[show]
        for step in pairs:
            cells = self.config.schedule.lengths[step.index]
            yield replace(
                step, tokens=step.tokens[: len(labels)], codes=step.codes[:, :cells], total=step.total[:, shown]
            )

    def _strengths(self, guidance: float | Sequence[float] | None) -> Strengths:
        given = self.config.guidance if guidance is None else guidance
        values = tuple(given) if isinstance(given, Sequence) else (given,) * 3
        if len(values) != 3:
            raise ValueError(
                f"guidance is {list(values)}, expected one number or three: of class, control type and given pixels"
            )
        return values

    def type_numbers(self, names: Any, n: int, given: bool = False) -> Int[Tensor, " n"] | None:
        """Places of control types in the configuration's list; None where they are to be drawn.

        Args:
            names: one name for all images, one for each, or None.
            given: whether there is a control picture, whose type must be known.

        Raises:
            ValueError: a name is unknown, their number is another, or a type is missing.
        """
        known = self.config.control_types
        if isinstance(names, Tensor):
            return names
        if names is None:
            if len(known) > 1 and given and self.config.type_start:
                raise ValueError(f"of what type is the control? This model knows {', '.join(known)}: give control_type")
            return torch.zeros(n, dtype=torch.int64) if len(known) == 1 or given else None
        listed = [names] * n if isinstance(names, str) else list(names)
        if len(listed) != n:
            raise ValueError(f"{len(listed)} control types were given for {n} images")
        if unknown := [name for name in listed if name not in known]:
            raise ValueError(f"there is no control type {unknown[0]!r}; this model knows {', '.join(known)}")
        return torch.tensor([known.index(name) for name in listed])

    def encode(self, pictures: Tensor) -> Int[Tensor, "batch half"]:
        """Tokens of pictures (batch, 3, height, width) in [0, 1]; tokens are returned as they are.

        Raises:
            ValueError: the pictures have another size than the model's.
        """
        if not pictures.is_floating_point():
            return pictures
        schedule = single(self.config.schedule)
        size = (3, *self.tokenizer.image_size(schedule))
        if tuple(pictures.shape[1:]) != size:
            raise ValueError(f"a picture is {tuple(pictures.shape[1:])}, this model takes {size}: resize it")
        return self.tokenizer.encode(pictures.to(self.device) * 2 - 1, schedule)

    def picture(self, total: Tensor) -> Float[Tensor, "batch 3 height width"]:
        """The halves in [0, 1], one above the other."""
        return super().picture(total.flatten(0, 1)).unflatten(0, total.shape[:2]).transpose(1, 2).flatten(2, 3)

    @torch.inference_mode()
    def generate(
        self,
        condition: Condition = None,
        n: int | None = None,
        seed: int | Sequence[int] = 0,
        *,
        control: Tensor | None = None,
        image: Tensor | None = None,
        **options: Any,
    ) -> Float[Tensor, "n 3 height width"]:
        """Images in [0, 1], on the CPU.

        Args:
            condition, n, seed: as :meth:`ClassConditional.generate` has them; n None: as many as there are conditions
                or pictures given.
            control, image: pictures (n or 1, 3, height, width) in [0, 1] that the result is to belong to.
            options: those of :meth:`ClassConditional.generate` and :meth:`steps`. With ``official_draws`` and one whole
                picture given, each guidance branch draws its own tokens, as in the official code.

        Raises:
            ValueError: as :meth:`steps`, or the number of pictures is neither 1 nor ``n``.
        """
        pictures = {name: value for name, value in (("control", control), ("image", image)) if value is not None}
        if n is None:
            listed = 1 if condition is None or isinstance(condition, int | str) else len(condition)
            n = max([listed, *(len(value) for value in pictures.values())])
        for name, value in pictures.items():
            if len(value) not in (1, n):
                raise ValueError(f"{len(value)} pictures were given as {name} for {n} images: give 1 or {n}")
            # Encoded here once, even where one picture stands for all.
            options[name] = self.encode(value).expand(n, -1)
        options["control_type"] = self.type_numbers(options.get("control_type"), n, given=control is not None)
        return super().generate(condition, n, seed, **options)

    def pairs(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Controls and images, (n, 3, height, width) in [0, 1] each; arguments as :meth:`generate` has them."""
        both = self.generate(*arguments, **options, show="pair")
        control, image = both.unflatten(2, (2, -1)).unbind(2)
        return control, image

    def perceive(
        self, image: Float[Tensor, "images 3 height width"], control_type: str | Sequence[str] | None = None,
        condition: Condition = None, seed: int | Sequence[int] = 0, **options: Any,
    ) -> Float[Tensor, "images 3 height width"]:  # fmt: skip
        """The control pictures of images: their edges, depth or normals.

        Args:
            image: in [0, 1].
            condition: the images' classes, if known.

        Returns:
            In [0, 1], on the CPU.
        """
        if control_type is None and len(self.config.control_types) > 1:
            known = ", ".join(self.config.control_types)
            raise ValueError(f"what is to be perceived? This model knows {known}: give control_type")
        known_class = self.config.classes if condition is None else condition
        return self.generate(
            known_class, len(image), seed, image=image, control_type=control_type, show="control", **options
        )

    # --- files -------------------------------------------------------------------------------------------

    def to_official(self) -> dict[str, Tensor]:
        """The transformer's official state dict; loads strictly into the official code."""
        config, schedule = self.config, self.config.schedule
        state = {KEYS.to_official(name): value for name, value in super().to_official().items()}
        bias = torch.zeros(schedule.length, schedule.length)
        bias.masked_fill_(~visibility_mask(schedule, config.halves), -torch.inf)
        state["attn_bias_for_masking"] = bias[None, None]
        if config.half_embedding:
            second = second_half(schedule, torch.device("cpu"))[None]
            state |= {"type_1L": 1 - second, "type_1L_": second.clone()}
        return state

    @classmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[ControlVARConfig, dict[str, Tensor]]:
        """The configuration and the state dict of an official file's content.

        Args:
            overrides: what a file may not tell: ``schedule`` (of one half), ``heads`` of models without cosine
                attention, ``control_types``, ``either_order``, ``halves``, ``norm_eps``.

        Raises:
            CheckpointError: the content is not a ControlVAR.
        """
        state = find_state_dict(content, NESTED, "pos_1LC")
        config = config_from_official(state, **overrides)
        return config, {KEYS.from_official(name): v for name, v in state.items() if name not in BUFFERS}
