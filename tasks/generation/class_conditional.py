"""What all class-conditional generators offer: pictures of classes, from seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.heads import CategoricalEmitter
from nextscale.core.random import BatchDraws, Draws, ImageDraws
from nextscale.core.sampling import ScaleStep
from nextscale.core.schedule import ScaleSchedule
from nextscale.datasets.imagenet import find_class
from nextscale.tasks.generation.drawing import DRAWING, draw

Condition = int | str | Sequence[int | str | None] | None


class ClassConfig(Protocol):
    """What the configuration of a class-conditional generator tells.

    Attributes:
        classes: number of classes; the number itself stands for "no class".
        label_drop: probability that a label is replaced by "no class" in training, for guidance.
        class_names: by which classes may be asked for.
        guidance: strength to sample with where none is asked for.
        schedule: scales in training and, where none are given, in sampling.
    """

    @property
    def classes(self) -> int: ...
    @property
    def label_drop(self) -> float: ...
    @property
    def class_names(self) -> tuple[str, ...] | None: ...
    @property
    def guidance(self) -> float: ...
    @property
    def schedule(self) -> ScaleSchedule: ...


class ClassConditional(nn.Module):
    """A network and its frozen tokenizer; what a system adds is ``steps``.

    Attributes:
        config: a :class:`ClassConfig`.
        tokenizer: takes no gradient and stays in evaluation form.
        steps: sample, scale by scale, the lower-level form of :meth:`generate`: of ``labels`` (one class per image;
            ``classes`` is "no class"), ``draws``, ``emitter``, ``guidance`` (None: the configuration's), ``controls``,
            and what the system takes beside the class.
    """

    config: Any
    tokenizer: Any
    steps: Callable[..., Iterator[ScaleStep]]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.tokenizer.eval()
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def picture(self, total: Tensor) -> Float[Tensor, "batch 3 height width"]:
        """The images, in [0, 1], of what the scales amount to (:attr:`ScaleStep.total`)."""
        return (self.tokenizer.decode_features(total) + 1) / 2

    @property
    def parts(self) -> dict[str, Any]:
        """The models a file may hold, by what they are; each has ``config``, ``official_name``, ``to_official``."""
        return {"transformer": self, **self.tokenizer.parts}

    # --- labels ------------------------------------------------------------------------------------------

    def drop_labels(self, labels: Int[Tensor, " batch"], uniform: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Labels replaced by "no class" where ``uniform`` in [0, 1) is below the configured share."""
        return torch.where(uniform < self.config.label_drop, self.config.classes, labels)

    def labels(self, condition: Condition, n: int) -> Int[Tensor, " n"]:
        """Class numbers of ``n`` images; -1 where the class is to be drawn.

        Raises:
            ValueError: a number is outside [0, classes], a name is unknown or ambiguous.
        """
        given = [condition] if condition is None or isinstance(condition, int | str) else list(condition)
        if not given:
            raise ValueError("the list of classes is empty; give at least one, or None for random ones")
        numbers = [-1 if item is None else self._label(item) for item in given]
        return torch.tensor([numbers[i % len(numbers)] for i in range(n)])

    def _label(self, item: int | str) -> int:
        text = str(item)
        if text.lstrip("-").isdigit():
            if not 0 <= int(text) <= self.config.classes:
                raise ValueError(
                    f"class {item} does not exist: classes are 0 to {self.config.classes - 1}, and "
                    f"{self.config.classes} is no class"
                )
            return int(text)
        return find_class(text, self.config.class_names)

    # --- drawing -----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self,
        condition: Condition = None,
        n: int | None = None,
        seed: int | Sequence[int] = 0,
        *,
        guidance: float | None = None,
        top_k: int | Sequence[int] = DRAWING["top_k"],
        top_p: float | Sequence[float] = DRAWING["top_p"],
        temperature: float | Sequence[float] = DRAWING["temperature"],
        smooth: bool = DRAWING["smooth"],
        batch_size: int = 16,
        official_draws: bool = False,
        progress: Callable[[int, int], None] | None = None,
        **given: Any,
    ) -> Float[Tensor, "n 3 height width"]:
        """Images in [0, 1], on the CPU.

        Args:
            condition: a class number or name, a sequence of them (repeated to ``n`` images), or None: drawn at
                random from each image's seed. "no class" is ``config.classes``.
            n: number of images; None: as many as there are conditions.
            seed: image i is drawn from ``seed + i``, so it comes out the same alone and in any batch; or one
                seed per image.
            guidance: see :func:`nextscale.core.sampling.classifier_free`; None: the configuration's.
            top_k, top_p, temperature, smooth: see :class:`nextscale.core.heads.CategoricalEmitter`. The defaults
                are those of VAR's official figures.
            batch_size: images computed at once; only memory and speed depend on it, without ``official_draws``.
            official_draws: consume one generator per batch in the official code's order, seeded with the batch's
                first seed: the same pictures as the official code draws from that seed with the same batch.
            progress: called with (scales done, scales in all) over all batches.
            given: what the system's ``steps`` takes beside the class; of tensors, one row per image.

        Raises:
            ValueError: a class is unknown, ``n`` is below 1, or the number of seeds is another.
        """
        if n is None:
            n = 1 if condition is None or isinstance(condition, int | str) else len(condition)
        batches = draw(
            self,
            condition,
            n,
            seed,
            guidance=guidance,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            smooth=smooth,
            batch_size=batch_size,
            official_draws=official_draws,
            progress=progress,
            given=given,
        )
        return torch.cat([batch.images for batch in batches])

    def make_emitter(self, **filters: Any) -> Any:
        """What draws each scale, of the options ``top_k``, ``top_p``, ``temperature`` and ``smooth``."""
        return CategoricalEmitter(**filters)

    def draws(self, seeds: Sequence[int], official: bool = False) -> Draws:
        """Randomness for a batch: a generator per image, or one on the model's device in the official order."""
        if official:
            return BatchDraws(torch.Generator(self.device).manual_seed(seeds[0]))
        return ImageDraws(seeds)
