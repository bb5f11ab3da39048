"""Damage to clean images, described in data: steps one after another, and mixtures that draw one of several.

    Mixture({"noise": (GaussianNoise(sigma=(0.0, 55.0)),), "rain and haze": (RainStreaks(), Haze())})

Every sample has random numbers of its own (:func:`sample_generator`), and every step its own among them, so a sample
is damaged alike alone, in any batch and on any machine, whatever the other steps draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import yaml

from .degradations_base import Degradation, sample_generator
from .degradations_blur import DefocusBlur, MotionBlur
from .degradations_resize import Downsample, matlab_resize
from .degradations_sensor import JPEG, GaussianNoise, LowLight, Quantise
from .degradations_weather import Haze, RainStreaks, Snow

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "JPEG",
    "PRESETS",
    "DefocusBlur",
    "Degradation",
    "Degraded",
    "Downsample",
    "GaussianNoise",
    "Haze",
    "LowLight",
    "Mixture",
    "MotionBlur",
    "Quantise",
    "RainStreaks",
    "Snow",
    "Step",
    "degrade",
    "matlab_resize",
    "parse_steps",
    "sample_generator",
]

Step = GaussianNoise | JPEG | Quantise | LowLight | DefocusBlur | MotionBlur | Downsample | RainStreaks | Haze | Snow
"""A step as configurations name it, by its ``kind``."""
Steps = tuple[Step, ...]

KINDS: dict[str, type[Degradation]] = {str(step.kind): step for step in get_args(Step)}


@dataclass(frozen=True)
class Degraded:
    """Attributes:

    image, clean: (3, height, width), float32 in [0, 1]; ``clean`` is the original, cropped where a step asks for it.
    kind: name of the pipeline that was drawn.
    """

    image: Tensor
    clean: Tensor
    kind: str


def degrade(
    clean: Tensor, steps: Steps, seed: int, *key: int | str, depth: Tensor | None = None, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Damage one image by steps in their order.

    Args:
        clean: (3, height, width), float32 in [0, 1].
        seed, key: whose random numbers are taken; see :func:`sample_generator`.
        depth: (height, width), for haze.
        multiple: the clean image's sides are cropped, in the centre, to a multiple of this, and of what steps ask for.

    Returns:
        The damaged image and the clean one, cropped.

    Raises:
        ValueError: the image is of another shape, or has nothing left after cropping.
    """
    if clean.ndim != 3 or clean.shape[0] != 3:
        raise ValueError(f"the image is {tuple(clean.shape)}, expected (3, height, width)")
    multiple = int(np.lcm.reduce([multiple, *(step.multiple for step in steps)]))
    clean, depth = _cropped(clean, multiple), None if depth is None else _cropped(depth, multiple)
    image = clean
    for step, draws in zip(steps, sample_generator(seed, *key).spawn(len(steps)), strict=True):
        image = step.apply(image, draws, depth)
    return image, clean


def _cropped(image: Tensor, multiple: int) -> Tensor:
    height, width = (side // multiple * multiple for side in image.shape[-2:])
    if not height or not width:
        raise ValueError(
            f"an image of {image.shape[-1]} x {image.shape[-2]} pixels cannot be cropped to multiples of {multiple}"
        )
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top : top + height, left : left + width]


@dataclass(frozen=True)
class Mixture:
    """One of several pipelines for every sample: what a model of all degradations is trained on.

    Attributes:
        pipelines: steps by the pipeline's name.
        weights: how often each is drawn, of their sum; all alike unless given.
    """

    pipelines: dict[str, Steps]
    weights: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if not self.pipelines:
            raise ValueError("a mixture needs at least one pipeline")
        if self.weights is not None and set(self.weights) != set(self.pipelines):
            raise ValueError(
                f"weights are of {', '.join(self.weights)}; expected one each of {', '.join(self.pipelines)}"
            )
        if self.weights is not None and not (min(self.weights.values()) >= 0 < sum(self.weights.values())):
            raise ValueError(f"weights are {self.weights}; expected 0 or more, not all 0")

    def choose(self, seed: int, *key: int | str) -> str:
        """The name of the pipeline that a sample gets."""
        names = list(self.pipelines)
        weights = np.array([1.0 if self.weights is None else self.weights[name] for name in names])
        share = sample_generator(seed, *key, "choice").random()
        return names[int(np.searchsorted(np.cumsum(weights / weights.sum())[:-1], share, side="right"))]

    def __call__(self, clean: Tensor, seed: int, *key: int | str, depth: Tensor | None = None) -> Degraded:
        """Damage one image; see :func:`degrade`."""
        name = self.choose(seed, *key)
        image, clean = degrade(clean, self.pipelines[name], seed, *key, depth=depth)
        return Degraded(image, clean, name)


PRESETS: dict[str, Steps] = {
    **{f"noise{sigma}": (GaussianNoise(sigma=float(sigma)),) for sigma in (15, 25, 50)},
    "noise-blind": (GaussianNoise(sigma=(0.0, 55.0)),),
    **{f"jpeg{quality}": (JPEG(quality=quality),) for quality in (10, 20, 30, 40)},
    "jpeg-blind": (JPEG(quality=(10, 95)),),
    **{f"sr{scale}": (Downsample(scale=scale),) for scale in (2, 3, 4)},
    "defocus-blur": (DefocusBlur(),),
    "motion-blur": (MotionBlur(),),
    "rain-light": (RainStreaks(density=0.003, strength=(0.3, 0.6)),),
    "rain-heavy": (RainStreaks(density=0.004, length=(21, 51), layers=5, angle=(-15.0, 30.0), strength=(0.2, 0.45)),),
    "hazy": (Haze(),),
    "low-light": (LowLight(),),
    "snow-small": (Snow(size="small"),),
    "snow-medium": (Snow(size="medium"),),
    "snow-large": (Snow(size="large"),),
    "rain-and-haze": (Haze(beta=(0.3, 1.0)), RainStreaks(density=(0.002, 0.004), strength=(0.3, 0.6), layers=2)),
    "dark-and-noisy": (LowLight(gamma=(1.5, 3.0), read_noise=(3.0, 10.0)), JPEG(quality=(40, 90))),
}
"""Steps by name. The noise and JPEG strengths and the scales are the benchmarks'."""


def parse_steps(text: str) -> Steps:
    """Steps from text: presets and kinds joined by ``+``, with values such as ``noise:sigma=0..50,clip=false+jpeg``.

    Raises:
        ValueError: a name or a value is not understood.
    """
    steps: list[Step] = []
    for part in text.split("+"):
        name, _, options = part.strip().partition(":")
        if name in PRESETS and not options:
            steps += PRESETS[name]
        elif name in KINDS:
            steps.append(_step(name, options))
        else:
            raise ValueError(
                f"{part.strip()!r} is no degradation; there are {', '.join(PRESETS)}, and with options, such as "
                f"noise:sigma=10..30, {', '.join(KINDS)}"
            )
    return tuple(steps)


def _step(kind: str, options: str) -> Any:
    cls = KINDS[kind]
    known, hints = {f.name for f in fields(cls)} - {"kind"}, get_type_hints(cls)
    given: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        name, equals, value = option.partition("=")
        if name not in known or not equals:
            raise ValueError(f"{kind} has no option {option!r}; expected {', '.join(sorted(known))}, as NAME=VALUE")
        first, dots, last = value.partition("..")
        given[name] = (_value(first), _value(last)) if dots else _value(value)
        choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
        if choices and value not in choices:
            raise ValueError(f"{name} of {kind} is {value!r}; expected {' or '.join(choices)}")
    try:
        return cls(**given)
    except TypeError:
        raise ValueError(f"{kind}:{options} has a value that is no number where one is expected") from None


def _value(text: str) -> Any:
    value = yaml.safe_load(text)
    if value is None or isinstance(value, Mapping | list):
        raise ValueError(f"{text!r} is no value")
    return value
