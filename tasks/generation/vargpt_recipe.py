"""The configuration of VARGPT's training runs."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from nextscale.core.training import Hooks, Metrics, Trainer, TrainingConfig
from nextscale.tasks.data import Examples, Load, tokenizer_of, trainer
from nextscale.tasks.generation.adapters import add_adapters, merge_adapters, train_adapters_alone
from nextscale.tasks.generation.var import VAR
from nextscale.tasks.generation.vargpt import VARGPT
from nextscale.tasks.generation.vargpt_data import DRAWN, ConversationSet, read_conversations
from nextscale.tasks.generation.vargpt_small import SmallSizes, small_model
from nextscale.tasks.generation.vargpt_training import PARTS, VARGPTLossConfig, VARGPTPreference, VARGPTTraining

SHOWN = 8
"""Prompts on a run's sample sheet, at most."""


@dataclass(frozen=True)
class VARGPTRecipe:
    """Train a VARGPT on conversations with images, or on pairs of images.

    Attributes:
        conversations: JSON file of messages and images, the images beside it.
        validation: held-out conversations, in the same form.
        init: a VARGPT to start from, folder or name; None: a small one with fresh weights.
        tokenizer: of a small one: an image tokenizer, residual (then it is a v1) or bitwise (v1.1), folder or file.
        vocabulary: of a small one: a file of conversations whose words it is to know, such as a later run's; None:
            those that it is trained on.
        seen: of a small one: side of the images that it reads, in pixels.
        decoder: of a small one: a VAR, folder or name, that its decoder begins with, in place of ``tokenizer``; it
            brings its own.
        vision: of a small one: a VARGPT, folder or name, whose vision model's weights it begins with.
        small: its sizes.
        loss: which stage, and how; see there.
        rates: factors of the learning rate, by part (text, vision, reader, projectors, labels, decoder): smaller than 1
            for what is trained already. A small one's projectors, beside a ``decoder``, pass on what it reads, and lose
            that at a full rate before the language model says anything.
        null_prompt: of a v1: see :class:`nextscale.tasks.generation.vargpt_config.VARGPTConfig`; one of the data's
            requests. None: the model's own.
        guidance: what the finished model draws with where nothing else is asked for; None: the model's own.
        pairs: learn which of two images is liked better (DPO), instead of the conversations; needs ``init``.
        beta: of that: how far the model may leave what it started from.
        lora_rank: train low-rank adapters on the language model, instead of all of it; 0: all. They are merged at the
            end.
        lora_alpha: what they add is scaled by this over the rank.
        pack: several conversations in a row, as many as fit into ``length``.
        length: most tokens of a conversation and of a row.
        resize_ratio: the shorter side of images to draw is resized to this times their size before the crop.
        read_ratio: images to read are cut at random to one part in so many of their sides, in training.
        mirror: mirror images at random, in training; not where they hold texts, or left and right are spoken of.
    """

    conversations: str
    validation: str | None = None
    init: str | None = None
    tokenizer: str | None = None
    decoder: str | None = None
    vision: str | None = None
    vocabulary: str | None = None
    seen: int = 32
    small: SmallSizes = field(default_factory=SmallSizes)
    loss: VARGPTLossConfig = field(default_factory=VARGPTLossConfig)
    rates: dict[str, float] = field(default_factory=dict)
    null_prompt: str | None = None
    guidance: float | None = None
    pairs: bool = False
    beta: float = 0.1
    lora_rank: int = 0
    lora_alpha: int = 32
    pack: bool = False
    length: int = 4096
    resize_ratio: float = 1.125
    read_ratio: float = 1.0
    mirror: bool = False
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            output="runs/vargpt", epochs=3, batch_size=256, learning_rate=5e-5, weight_decay=0.0, schedule="cos"
        )
    )

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.init, self.tokenizer, self.decoder)) != 1:
            raise ValueError(
                "give one of init, a VARGPT to start from, and tokenizer or decoder, to make a small one around it"
            )
        if self.vision is not None and self.init is not None:
            raise ValueError("vision is what a small one begins with; init has a vision model of its own")
        if self.pairs and self.init is None:
            raise ValueError("pairs are learned by a trained model: give init")
        if unknown := [part for part, rate in self.rates.items() if part not in PARTS or rate < 0]:
            raise ValueError(f"rates has {', '.join(unknown)}; expected of {', '.join(PARTS)} numbers of 0 or more")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank is {self.lora_rank}; expected 0 (no adapters) or more")

    def model(self, load: Load) -> VARGPT:
        """What is trained: a model that is read, or a new one.

        Raises:
            ValueError: ``init``, ``decoder`` or ``vision`` is another kind of model, or of other sizes.
        """
        model = self._small(load) if self.init is None else _vargpt(load, self.init)
        chosen: dict[str, Any] = {"null_prompt": self.null_prompt, "guidance": self.guidance}
        model.config = replace(model.config, **{name: value for name, value in chosen.items() if value is not None})
        model.rates = {begin: self.rates.get(part, 1.0) for part, begins in PARTS.items() for begin in begins}
        return model

    def _small(self, load: Load) -> VARGPT:
        """A new one."""
        talks = read_conversations(self.vocabulary or self.conversations)
        texts = [content for talk in talks for _, content in talk.messages]
        if self.decoder is None:
            tokenizer, trained = cast(Any, tokenizer_of(load(self.tokenizer))), None
        else:
            trained = load(self.decoder)
            if not isinstance(trained, VAR):
                raise ValueError(f"{self.decoder} is a {type(trained).__name__}; a decoder can begin with a VAR")
            tokenizer = trained.tokenizer
        eyes = None if self.vision is None else _vargpt(load, self.vision)
        return small_model(texts, tokenizer, self.seen, self.small, trained, eyes)

    def open(self, path: str, model: VARGPT, held_out: bool = False) -> ConversationSet:
        """Conversations as they train this model."""
        height, width = model.tokenizer.image_size(model.config.schedule)
        if height != width:
            raise ValueError(f"the model draws {width} x {height} pixels; it is trained on squares")
        return ConversationSet(
            read_conversations(path, self.pairs),
            model.processor,
            height,
            length=self.length,
            pack=self.pack,
            pairs=self.pairs,
            crop="center" if held_out else "random",
            resize_ratio=self.resize_ratio,
            read_ratio=1.0 if held_out else self.read_ratio,
            mirror=self.mirror and not held_out,
            seed=self.training.seed,
        )

    def task(self, model: VARGPT) -> VARGPTTraining:
        """How it is trained."""
        # What it started from is kept beside it, unless adapters can be turned off.
        reference = copy.deepcopy(model) if self.pairs and not self.lora_rank else None
        if self.lora_rank:
            add_adapters(model, self.lora_rank, self.lora_alpha)
        if self.pairs:
            task: VARGPTTraining = VARGPTPreference(model, reference, self.loss, beta=self.beta)
        else:
            task = VARGPTTraining(model, self.loss)
        if self.lora_rank:
            train_adapters_alone(model)
        return task

    def trainer(self, load: Load, hooks: Hooks | None = None) -> Trainer:
        """The run, ready to start; validation is added to ``hooks`` where there are held-out conversations."""
        torch.manual_seed(self.training.seed)
        hooks, model = hooks or Hooks(), self.model(load)
        dataset = self.open(self.conversations, model)
        task = self.task(model)
        if self.validation is not None and hooks.validate is None:
            held_out = self.open(self.validation, model, held_out=True)
            hooks.validate = lambda step: validate(task, held_out)
        return trainer(self.training, task, dataset, hooks)

    def examples(self, run: Trainer) -> Examples:
        """Pictures for a few prompts of the data that ask for one, from the same seeds each time."""
        model = cast(VARGPTTraining, run.task).model
        prompts = []
        for talk in read_conversations(self.validation or self.conversations, self.pairs):
            (_, said), (_, answer) = talk.messages[0], talk.messages[-1]
            if DRAWN in answer and len(talk.messages) == 2 and len(talk.images) == 1 + self.pairs:
                prompts.append(said)
        prompts = prompts[:: max(len(prompts) // SHOWN, 1)][:SHOWN]
        if not prompts:
            return Examples([])
        rows = [(f"seed {seed}", list(model.generate(prompts, seed=[seed] * len(prompts)))) for seed in (0, 1)]
        return Examples(rows, prompts)

    def finish(self, run: Trainer) -> Path:
        """Write the trained (averaged) model; returns its folder."""
        model = cast(VARGPTTraining, run.task).model
        with run.averaged():
            if self.lora_rank:
                merge_adapters(model)
            return model.save(Path(self.training.output) / "model")


def _vargpt(load: Load, source: str) -> VARGPT:
    model = load(source)
    if not isinstance(model, VARGPT):
        raise ValueError(f"{source} is a {type(model).__name__}, expected a VARGPT")
    return model


@torch.no_grad()
def validate(task: VARGPTTraining, dataset: ConversationSet, samples: int = 1000, batch_size: int = 8) -> Metrics:
    """Means of :meth:`VARGPTTraining.evaluate` over held-out conversations, those with images to draw and others."""
    limit, totals, counts = min(samples, len(dataset)), dict[str, float](), dict[str, int]()
    for start in range(0, limit, batch_size):
        numbers = range(start, min(start + batch_size, limit))
        batch = dataset.fetch(numbers)
        batch = {k: v.to(task.model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        for name, value in task.evaluate(batch).items():
            totals[name] = totals.get(name, 0.0) + float(value) * len(numbers)
            counts[name] = counts.get(name, 0) + len(numbers)
    return {name: total / counts[name] for name, total in totals.items()}
