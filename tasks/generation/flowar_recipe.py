"""The configuration of FlowAR's training runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from nextscale.core.optim import Schedule
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingConfig
from nextscale.tasks.data import Load, tokenizer_of
from nextscale.tasks.generation.class_recipe import TokenRecipe
from nextscale.tasks.generation.flowar import FlowAR
from nextscale.tasks.generation.flowar_config import FlowARConfig
from nextscale.tasks.generation.flowar_flow import FlowConfig
from nextscale.tasks.generation.flowar_training import FlowARTraining, initialize
from nextscale.tasks.tokenizers.kl_autoencoder import KLAutoencoder


def _official_run() -> TrainingConfig:
    return TrainingConfig(
        output="runs/flowar",
        epochs=400.0,
        batch_size=2048,
        learning_rate=5e-5,
        weight_decay=0.02,
        schedule="cos",
        warmup_epochs=100.0,
        start_rate=0.0,
        end_rate=0.025,
        grad_clip=3.0,
        average=0.9999,
    )


@dataclass(frozen=True)
class FlowARRecipe(TokenRecipe):
    """Train a FlowAR on images with classes, or on what ``nextscale tokenize`` keeps of them.

    Attributes:
        tokenizer: a KL autoencoder, folder, official file or name; may be left out with ``init``, whose own is then
            kept.
        width, heads: of both stacks; None: a head for 64 channels.
        depth: blocks of each of the two stacks.
        dropout: of attention's weights and of the branches' outcomes.
        flow: the network that draws latents.
        scales: None: the autoencoder's list.
        guidance, guidance_bound, ode_steps: how the finished model samples where nothing else is asked for.
        init: a FlowAR to start from, a folder or an official file: fine-tuning.
    """

    tokenizer: str | None = None
    width: int = 768
    depth: int = 6
    heads: int | None = None
    dropout: float = 0.1
    conditioning: Literal["block", "shared"] = "block"
    flow: FlowConfig = field(default_factory=FlowConfig)
    scales: str | None = None
    guidance_bound: float = 0.9
    ode_steps: int = 25
    init: str | None = None
    training: TrainingConfig = field(default_factory=_official_run)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer is None and self.init is None:
            raise ValueError("a FlowAR needs a tokenizer: give tokenizer, a KL autoencoder's folder or official file")

    def build(self, dataset: Any, load: Load) -> FlowAR:
        """The model to train: new, or from ``init``."""
        classes, names = self.known_classes(dataset)
        tokenizer = None if self.tokenizer is None else _autoencoder(load, self.tokenizer)
        if self.init is not None:
            model = _started(load, self.init, classes, tokenizer)
        else:
            assert tokenizer is not None
            heads = self.heads or max(self.width // 64, 1)
            config = FlowARConfig.of_depth(
                self.width,
                self.depth,
                heads,
                self.flow,
                classes=classes,
                channels=tokenizer.config.channels,
                schedule=ScaleSchedule.parse(self.scales) if self.scales else tokenizer.config.schedule,
            )
            blocks = replace(
                config.encoder, dropout=self.dropout, attention_dropout=self.dropout, conditioning=self.conditioning
            )
            model = initialize(FlowAR(replace(config, encoder=blocks, decoder=blocks), tokenizer))
        model.config = replace(
            model.config,
            class_names=names or model.config.class_names,
            label_drop=self.label_drop,
            guidance=self.guidance,
            guidance_bound=self.guidance_bound,
            ode_steps=self.ode_steps,
        )
        return model

    def task(self, model: FlowAR, plan: Schedule, load: Load) -> FlowARTraining:
        return FlowARTraining(model)


def _autoencoder(load: Load, source: str) -> KLAutoencoder:
    tokenizer = tokenizer_of(load(source))
    if not isinstance(tokenizer, KLAutoencoder):
        raise ValueError(
            f"{source} has a {type(tokenizer).__name__}; FlowAR needs continuous latents: train a tokenizer with "
            "`nextscale train kl-tokenizer`, or give kl16"
        )
    return tokenizer


def _started(load: Load, source: str, classes: int, tokenizer: KLAutoencoder | None) -> FlowAR:
    """The model to fine-tune, on another autoencoder where one is given."""
    model = load(source)
    if not isinstance(model, FlowAR) or model.config.classes != classes:
        raise ValueError(
            f"{source} is a {type(model).__name__} of {getattr(model.config, 'classes', 'no')} classes; expected a "
            f"FlowAR of {classes}"
        )
    if tokenizer is None:
        return model
    made = FlowAR(model.config, tokenizer)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("tokenizer.")}
    made.load_state_dict(state, strict=False)
    return made
