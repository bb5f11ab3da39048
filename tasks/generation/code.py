"""CoDe: collaborative decoding of VAR. A large model draws the coarse scales, a small one the fine ones.

Chen et al. 2024, "Collaborative Decoding Makes Visual Auto-Regressive Modeling Efficient" (arXiv 2411.17787, CVPR
2025); official code czg1225/CoDe, weights Zigeng/VAR_CoDe. The coarse scales decide what a picture shows and are few
tokens; the fine scales are most of the tokens, hence most of the work and of the cache, and a small model does them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.checkpoint import assign, save_folder, weightless
from nextscale.core.config import from_json, to_json
from nextscale.core.heads import CategoricalEmitter
from nextscale.core.random import BatchDraws, Draws
from nextscale.core.sampling import Accepted, Control, ScalePyramid, ScaleStep, Session, classifier_free, sample
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.class_conditional import ClassConditional
from nextscale.tasks.generation.var import VAR, VARConfig
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig
from nextscale.tasks.tokenizers.tokenize import fingerprint

SYSTEM = "code"


@dataclass(frozen=True)
class CoDeConfig:
    """Attributes:

    models: in the order they draw, the drafter first; all of one scale list and of the same classes.
    handovers: the scale at which each next model takes over, counted from 0: one number fewer than models. The paper's
        N, the number of drafted scales, where there are two models.
    """

    models: tuple[VARConfig, ...]
    handovers: tuple[int, ...]

    def __post_init__(self) -> None:
        first, scales = self.models[0], len(self.models[0].schedule)
        for name in ("schedule", "classes", "vocabulary", "code_channels"):
            if len(values := {str(getattr(model, name)) for model in self.models}) > 1:
                raise ValueError(
                    f"the models differ in {name.replace('_', ' ')} ({' and '.join(sorted(values))}): they can only "
                    "share a pyramid in which everything is the same"
                )
        ends = (0, *self.handovers, scales)
        if len(self.handovers) != len(self.models) - 1 or any(a >= b for a, b in pairwise(ends)):
            raise ValueError(
                f"{len(self.models)} models hand over at the scales {list(self.handovers)}; expected "
                f"{len(self.models) - 1} rising numbers from 1 to {scales - 1} for the list '{first.schedule}'"
            )

    @property
    def turns(self) -> tuple[tuple[int, int], ...]:
        """The scales [start, stop) that each model draws."""
        ends = (0, *self.handovers, len(self.schedule))
        return tuple(pairwise(ends))

    @property
    def schedule(self) -> ScaleSchedule:
        return self.models[0].schedule

    @property
    def classes(self) -> int:
        return self.models[0].classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return next((model.class_names for model in self.models if model.class_names), None)

    @property
    def label_drop(self) -> float:
        return self.models[0].label_drop

    @property
    def guidance(self) -> float:
        return self.models[0].guidance

    @property
    def vocabulary(self) -> int:
        return self.models[0].vocabulary

    @property
    def code_channels(self) -> int:
        return self.models[0].code_channels


class CoDe(ClassConditional):
    """Several VARs that draw one pyramid, each a range of its scales.

    Args:
        models: the drafter first. They must have been trained on the tokens of one tokenizer, which is then held once.
        handovers: see :class:`CoDeConfig`.

    Raises:
        ValueError: the models' tokens differ, or the handovers do not divide the scales.
    """

    def __init__(self, models: Sequence[VAR], handovers: Sequence[int]) -> None:
        super().__init__()
        self.config = CoDeConfig(tuple(model.config for model in models), tuple(handovers))
        self.tokenizer = models[0].tokenizer
        for model in models[1:]:
            if model.tokenizer is not self.tokenizer and fingerprint(model.tokenizer) != fingerprint(self.tokenizer):
                raise ValueError(
                    "the models' tokenizers differ: what one model draws would mean something else to the other; take "
                    "models that were trained on the tokens of the same tokenizer"
                )
            model.tokenizer = self.tokenizer
        self.models = cast("Sequence[VAR]", nn.ModuleList(models))

    @property
    def dtype(self) -> torch.dtype:
        return self.models[0].dtype

    # --- teacher forcing ---------------------------------------------------------------------------------

    def forward(
        self,
        inputs: Float[Tensor, "batch rest channels"],
        labels: Int[Tensor, " batch"],
        schedule: ScaleSchedule | None = None,
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Logits of all scales at once, each from the model that draws it; arguments as of :meth:`VAR.forward`."""
        schedule = schedule or self.config.schedule
        logits = []
        for model, (begin, end) in zip(self.models, self.config.turns, strict=True):
            if begin < len(schedule):
                seen = schedule.prefix(end)
                own = model(inputs[:, : seen.length - seen.lengths[0]], labels, seen)
                logits.append(own[:, schedule.ranges[begin][0] :])
        return torch.cat(logits, dim=1)

    loss = VAR.loss

    # --- sampling ----------------------------------------------------------------------------------------

    def steps(
        self,
        labels: Int[Tensor, " batch"],
        *,
        draws: Draws,
        emitter: CategoricalEmitter | None = None,
        guidance: float | Sequence[float] | None = None,
        controls: Sequence[Control] = (),
    ) -> Iterator[ScaleStep]:
        """Sample, scale by scale: the lower-level form of :meth:`generate`.

        A model's cache holds the scales up to the end of its turn only, and is given back before the next model's is
        allocated.

        Args:
            labels: one class per image; ``classes`` is "no class".
            draws: with :class:`OfficialDraws`, each model also draws symbols for the scales before its own and throws
                them away, as the official code does.
            guidance: see :func:`nextscale.core.sampling.classifier_free`; None: the drafter's.
        """
        schedule, emitter = self.config.schedule, emitter or CategoricalEmitter()
        guidance = self.config.guidance if guidance is None else guidance
        branches = classifier_free(labels, torch.full_like(labels, self.config.classes), guidance, schedule)
        quantizer, totals = self.tokenizer.quantizer, list[Tensor]()
        for model, (begin, end) in zip(self.models, self.config.turns, strict=True):
            network: VAR | _Redrawing = model
            if isinstance(draws, OfficialDraws) and begin:
                draws.next_turn()
                network = _Redrawing(model, len(labels), emitter, draws)
            accepted = hand_over(totals, quantizer, schedule) if begin else None
            for step in sample(network, quantizer, schedule, branches, emitter, draws, controls, accepted, end):
                totals.append(step.total)
                yield step

    def draws(self, seeds: Sequence[int], official: bool = False) -> Draws:
        """Randomness for a batch: a generator per image that all models go on with, or the official order."""
        if official:
            return OfficialDraws(lambda: BatchDraws(torch.Generator(self.device).manual_seed(seeds[0])))
        return super().draws(seeds)

    # --- files -------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write ``model.safetensors`` (all models, the tokenizer once) and ``config.json``."""
        state = {k: v for k, v in self.state_dict().items() if ".tokenizer." not in k}
        config = to_json(self.config) | {"tokenizer": to_json(self.tokenizer.config)}
        return save_folder(folder, state, {"system": SYSTEM, "config": config})

    @classmethod
    def from_saved(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> CoDe:
        """From the content of a folder written by :meth:`save`."""
        parts, shared = config["config"], {k: v for k, v in state.items() if k.startswith("tokenizer.")}
        with weightless():
            tokenizer = ResidualVQ(from_json(ResidualVQConfig, parts["tokenizer"]))
            models = [VAR(from_json(VARConfig, each), tokenizer) for each in parts["models"]]
        for number, model in enumerate(models):
            place = f"models.{number}."
            own = {k.removeprefix(place): v for k, v in state.items() if k.startswith(place)}
            assign(model, own | shared, f"model {number} of the saved CoDe")
        return cls(models, parts["handovers"]).eval()

    def to_official(self) -> dict[str, dict[str, Tensor]]:
        """Each model's official state dict: ``drafter``, ``refiner``, and ``middle_1``, … between them."""
        return {name: part.to_official() for name, part in self.parts.items() if isinstance(part, VAR)}

    @property
    def parts(self) -> dict[str, Any]:
        names = ["drafter", *(f"middle_{number}" for number in range(1, len(self.models) - 1)), "refiner"]
        return {**dict(zip(names, self.models, strict=True)), **self.tokenizer.parts}

    @property
    def official_names(self) -> dict[str, str]:
        """The file names that the official repository gives such a pair, by part."""
        return {name: f"{name}_{self.config.handovers[0]}.pth" for name in self.to_official()}

    @classmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[VARConfig, dict[str, Tensor]]:
        """The official files are VAR's, one for each model."""
        return VAR.read_official(content, **overrides)

    @classmethod
    def of(cls, model: VAR, refiner: VAR, draft_scales: int | None = None) -> CoDe:
        """A drafter and a refiner.

        Args:
            draft_scales: how many scales the drafter draws.

        Raises:
            ValueError: that is not said, or the models cannot share a pyramid.
        """
        if draft_scales is None:
            raise ValueError(
                "how many scales does the first model draw before the refiner goes on? Say it: draft_scales=6 in "
                "Python, --draft-scales 6 on the command line"
            )
        return cls([model, refiner], [draft_scales]).eval()


def hand_over(totals: Sequence[Tensor], pyramid: ScalePyramid, schedule: ScaleSchedule) -> Accepted:
    """What the next model needs of the scales that are drawn: their sum, and what entered at each and enters next.

    No keys and values: they are of another width. It is the same for every model over the same pyramid.

    Args:
        totals: the sum after each scale.
    """
    inputs = [pyramid.next_input(total, schedule, index) for index, total in enumerate(totals, start=1)]
    return Accepted(len(totals), totals[-1], torch.cat(inputs, dim=1))


# --- the official order of random numbers -------------------------------------------------------------


class OfficialDraws:
    """Every model's turn begins with a generator seeded anew, all with the same number.

    Args:
        fresh: gives that generator's draws from its beginning.
    """

    def __init__(self, fresh: Callable[[], BatchDraws]) -> None:
        self._fresh, self._turn = fresh, fresh()
        self._classes: tuple[int, int] | None = None

    def next_turn(self) -> None:
        self._turn = self._fresh()
        if self._classes is not None:
            self._turn.integers(*self._classes)  # where classes are random, each model draws them again

    def integers(self, high: int, count: int) -> Tensor:
        self._classes = high, count
        return self._turn.integers(high, count)

    def categorical(self, probabilities: Tensor) -> Tensor:
        return self._turn.categorical(probabilities)

    def several(self, probabilities: Tensor, samples: int) -> Tensor:
        return self._turn.several(probabilities, samples)

    def bits(self, ones: Tensor) -> Tensor:
        return self._turn.bits(ones)

    def exponential(self, shape: Sequence[int], device: torch.device) -> Tensor:
        return self._turn.exponential(shape, device)

    def normal(self, shape: Sequence[int], device: torch.device, spare: int = 0) -> Tensor:
        return self._turn.normal(shape, device, spare)

    def uniform(self, shape: Sequence[int], device: torch.device) -> Tensor:
        return self._turn.uniform(shape, device)


@dataclass(frozen=True)
class _Redrawing:
    """A model whose first pass also draws symbols for the scales before its own, from conditional logits alone.

    They are thrown away: what counts is how far the generator has moved when its own scales are drawn.
    """

    model: VAR
    images: int
    emitter: CategoricalEmitter
    draws: Draws

    def start(self, conditions: Tensor, schedule: ScaleSchedule) -> _RedrawingSession:
        return _RedrawingSession(self.model.start(conditions, schedule), schedule, self)


@dataclass(frozen=True)
class _RedrawingSession:
    session: Session
    schedule: ScaleSchedule
    network: _Redrawing

    def step(self, index: int, inputs: Tensor | None, first: int | None = None) -> Tensor:
        hidden, network = self.session.step(index, inputs, first), self.network
        for scale in range(index if first is None else first, index):
            start, stop = self.schedule.ranges[scale]
            logits = self.logits(hidden[:, start:stop], slice(network.images))
            network.draws.categorical(network.emitter.probabilities(logits, scale))
        return hidden

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        return self.session.logits(hidden, rows)
