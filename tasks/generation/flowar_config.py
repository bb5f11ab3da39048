"""FlowAR's configuration, and the released sizes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

from nextscale.core.schedule import ScaleSchedule
from nextscale.datasets.imagenet import IMAGENET
from nextscale.tasks.generation.flowar_flow import FlowConfig
from nextscale.tasks.generation.flowar_transformer import FlowARBlocksConfig, gated_ratio
from nextscale.tasks.tokenizers.kl_autoencoder import DOUBLING


@dataclass(frozen=True)
class FlowARConfig:
    """Attributes:

    encoder, decoder: the two stacks of blocks, of one width; the names are MAR's, both see the same.
    flow: the network that draws latents.
    classes: number of classes; one more embedding row stands for "no class".
    channels: numbers per token.
    schedule: scales in training and sampling; the first has one token.
    label_drop: probability that a label is replaced by "no class" in training, for guidance.
    class_names: by which classes may be asked for.
    guidance: strength t to sample with where none is asked for: the last scale's velocities are
        (1 + t) conditional - t unconditional. The official ``cfg`` is 1 + t.
    guidance_bound: latest time with guidance (the official ``guidance``).
    ode_steps: steps from noise to latents of every scale, see
        :func:`nextscale.tasks.generation.flowar_flow.euler_times`.
    """

    encoder: FlowARBlocksConfig
    decoder: FlowARBlocksConfig
    flow: FlowConfig = field(default_factory=FlowConfig)
    classes: int = 1000
    channels: int = 16
    schedule: ScaleSchedule = DOUBLING
    label_drop: float = 0.1
    class_names: tuple[str, ...] | None = None
    guidance: float = 1.5
    guidance_bound: float = 0.9
    ode_steps: int = 25

    def __post_init__(self) -> None:
        if self.encoder.width != self.decoder.width:
            raise ValueError(
                f"the stacks are {self.encoder.width} and {self.decoder.width} wide; both take the class's embedding, "
                "so they need one width"
            )
        if self.schedule.lengths[0] != 1:
            raise ValueError(f"the scales '{self.schedule}' begin with {self.schedule.lengths[0]} tokens; expected 1")

    @classmethod
    def of_depth(cls, width: int, depth: int, heads: int, flow: FlowConfig, **changes: Any) -> Self:
        """Two stacks of ``depth`` blocks each, with the published proportions and dropout."""
        blocks = FlowARBlocksConfig(width, depth, heads, gated_ratio(width), dropout=0.1, attention_dropout=0.1)
        return cls(blocks, blocks, flow, **changes)


def _released(width: int, depth: int, heads: int, flow: FlowConfig, **sampling: Any) -> FlowARConfig:
    flow = replace(flow, truncate_time=True)
    return FlowARConfig.of_depth(width, depth, heads, flow, class_names=IMAGENET, **sampling)


PRESETS: dict[str, FlowARConfig] = {
    "flowar-small": _released(768, 6, 12, FlowConfig(1024, 2), guidance=3.3),
    "flowar-large": _released(1024, 8, 16, FlowConfig(1024, 12, cross=True), guidance=1.4),
    "flowar-huge": _released(
        1536, 15, 16, FlowConfig(1536, 12, cross=True), guidance=1.4, guidance_bound=0.7, ode_steps=50
    ),
}
"""Released models, by name, with the settings that their repository's commands evaluate them with."""
