"""Training FlowAR: velocities of all scales at once, each at a time of its own.

Ren et al. 2024 (arXiv 2412.15205, section 3.3); official code OliverRensu/FlowAR, ``models/flowar.py`` and
``models/flowloss.py``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.random import BatchDraws, Draws, sample_draws
from nextscale.core.training import Batch, Metrics
from nextscale.tasks.generation.class_recipe import ClassTraining
from nextscale.tasks.generation.flowar import SYSTEM, FlowAR


def initialize(model: FlowAR, std: float = 0.02) -> FlowAR:
    """The initial weights: linear layers after Xavier, embeddings and places normal, first velocities zero.

    The official code means to, but then overwrites the time embedding and the last layer with the rest.
    """
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith("tokenizer."):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        times = [part.weight for part in model.flow.time_embedding if isinstance(part, nn.Linear)]
        places = (model.encoder_places, model.decoder_places, model.flow_places)
        for parameter in (model.class_embedding.weight, *places, *times):
            nn.init.normal_(parameter, std=std)
        nn.init.zeros_(model.flow.output_projection.weight)
    return model


class FlowARTraining(ClassTraining):
    """Trains a :class:`FlowAR`.

    A batch holds ``label``, ``uniform`` in [0, 1) for label dropout, and ``image`` (batch, 3, height, width) in [-1, 1]
    or ``tokens``, the distributions that ``nextscale tokenize`` keeps. Either way the latent is drawn anew every time,
    as are times and noise.
    """

    name = SYSTEM

    def __init__(self, model: FlowAR) -> None:
        self.model = model
        self.phases: dict[str, nn.Module] = {SYSTEM: model}

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        return self._loss(module, batch, sample_draws(batch, "flow"))

    def evaluate(self, batch: Batch) -> Metrics:
        # The same draws every time, so that figures of two steps compare.
        loss, metrics = self._loss(self.model, batch, BatchDraws(torch.Generator().manual_seed(0)))
        return {"loss": loss, **metrics}

    def _loss(self, module: nn.Module, batch: Batch, draws: Draws) -> tuple[Tensor, Metrics]:
        model, schedule = self.model, self.model.config.schedule
        count, cpu = len(batch["label"]), torch.device("cpu")

        def normal(*shape: int) -> Tensor:
            return draws.normal(shape, cpu).to(model.device)

        # The frozen autoencoder works in its own precision, outside autocast.
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            tokenizer = model.tokenizer
            if "tokens" in batch:
                posterior = tokenizer.restored(batch["tokens"], schedule)
            else:
                posterior = tokenizer.posterior(batch["image"])
            latents = posterior.sample(normal(*posterior.mean.shape)) * tokenizer.config.latent_scale
        times = draws.uniform((count, len(schedule)), cpu).to(model.device)
        noise = normal(count, schedule.length, model.config.channels)
        labels = model.drop_labels(batch["label"], batch["uniform"])
        loss, parts = self.loss_of(module, latents, labels, times, noise)
        names = [f"squared/scale{index}" for index in range(len(schedule))]
        return loss, dict(zip(names, parts.detach(), strict=True))

    def loss_of(
        self,
        module: nn.Module,
        latents: Float[Tensor, "batch channels height width"],
        labels: Int[Tensor, " batch"],
        times: Float[Tensor, "batch scales"],
        noise: Float[Tensor, "batch length channels"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " scales"]]:
        """The loss: each scale's mean squared error of velocities, weighted by its share of the finest map's tokens.

        Args:
            latents: scaled.
            labels: with "no class" in place of those that are dropped.

        Returns:
            The loss, and the unweighted error of each scale.
        """
        schedule, pyramid = self.model.config.schedule, self.model.tokenizer.quantizer
        clean = torch.cat(pyramid.encode(latents, schedule)[0], dim=1)
        inputs = pyramid.teacher_inputs(clean, schedule)
        each = times[:, schedule.levels(times.device)][..., None]
        velocity = module(inputs, labels, (1 - each) * clean + each * noise, times)
        squared = (velocity.float() - (noise - clean)).square()
        parts = torch.stack([part.mean() for part in schedule.split(squared)])
        shares = torch.tensor([length / schedule.final.tokens for length in schedule.lengths], device=parts.device)
        return (parts * shares).sum(), parts
