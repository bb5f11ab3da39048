"""What a training run takes, on paper: a step is led through its operations on tensors that have shapes but no values.

Parameters, floating-point operations and bytes are therefore those of the code that trains, not of formulas beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import _lru_cache_wrapper
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nextscale.core.accounting import Alive, nbytes, operation_counter
from nextscale.core.cross_attention import Packed
from nextscale.core.training import TrainingConfig, TrainingTask
from nextscale.core.transformer import NextScaleTransformer

IMAGENET = 1_281_167
"""Images of an epoch where the data is not here and no number is given."""
TEXT_TOKENS = 64
"""Tokens of a text, where none are given."""


@dataclass(frozen=True)
class Gpu:
    """bytes of memory, and peak operations per second in bfloat16 (dense) and float32, of the maker's data sheet."""

    name: str
    memory: float
    bf16: float
    fp32: float


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", 141e9, 989e12, 67e12),
        Gpu("h100", 80e9, 989e12, 67e12),
        Gpu("a100", 80e9, 312e12, 19.5e12),
        Gpu("a100-40gb", 40e9, 312e12, 19.5e12),
        Gpu("l40s", 48e9, 362e12, 91.6e12),
        Gpu("rtx4090", 24e9, 165e12, 82.6e12),
    )
}


@dataclass(frozen=True)
class Subject:
    """What is planned: a task on weights without values, and how it is trained.

    batch: makes a micro-batch of so many samples. tokens: of one sample. samples: of an epoch. stored: bytes that
    ``nextscale tokenize`` keeps of a sample, None where this system trains on images only.
    """

    task: TrainingTask
    training: TrainingConfig
    batch: Callable[[int], dict[str, Any]]
    tokens: int
    samples: int
    stored: float | None


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. activations: what a step holds at its peak beside weights, gradients and states."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    buckets: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + self.buckets + self.activations


@dataclass(frozen=True)
class Plan:
    """parameters: trained. frozen: of the tokenizer. forward, flops: operations of one optimiser step over all ranks,
    of the forward passes and of all. steps: of the run.
    """

    parameters: int
    frozen: int
    forward: int
    flops: int
    memory: Memory
    micro_batch: int
    steps: int
    tokens_per_step: int

    def seconds(self, gpu: Gpu, gpus: int, precision: str, utilisation: float) -> float:
        """Of one step, at that share of the GPUs' peak."""
        peak = gpu.fp32 if precision == "no" else gpu.bf16
        return self.flops / (peak * gpus * utilisation)


@contextmanager
def valueless() -> Iterator[None]:
    """Tensors made inside have shapes, types and a device, and neither memory nor values."""
    _forget_tables()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _undrawn():
            yield
    finally:
        _forget_tables()


@contextmanager
def _undrawn() -> Iterator[None]:
    """Truncated normal distributions look at the values they draw; without values there is nothing to look at."""
    drawn = nn.init.trunc_normal_
    nn.init.trunc_normal_ = lambda tensor, *_, **__: tensor
    try:
        yield
    finally:
        nn.init.trunc_normal_ = drawn


def _forget_tables() -> None:
    """Empty the library's caches: a table made without values must not serve a computation with them."""
    modules = [module for name, module in sys.modules.items() if name.startswith("nextscale.") and module is not None]
    for value in {id(value): value for module in modules for value in vars(module).values()}.values():
        if isinstance(value, _lru_cache_wrapper):
            value.cache_clear()


def plan(subject: Subject, gpus: int = 1, sharded: bool = False) -> Plan:
    """Lead one micro-batch through loss and backward. To be called inside :func:`valueless`, where the task was built.

    Args:
        sharded: weights, gradients and states are divided over the GPUs (FSDP), instead of copied (DDP).

    Raises:
        ValueError: the batch does not divide over the GPUs, or the task has several phases.
    """
    config, task = subject.training, subject.task
    per_step = gpus * config.accumulation
    if config.batch_size % per_step:
        raise ValueError(
            f"batch_size {config.batch_size} does not divide over {gpus} GPUs x {config.accumulation} accumulated "
            "micro-batches"
        )
    if len(task.phases) != 1:
        raise ValueError(f"a {task.name} trains {', '.join(task.phases)} in turn; only one network can be planned")
    (name, module), micro = next(iter(task.phases.items())), config.batch_size // per_step
    for part in module.modules():
        if config.gradient_checkpointing and isinstance(part, NextScaleTransformer):
            part.gradient_checkpointing = True
    module.train()
    forward, total, peak = _step(task, name, module, subject.batch(micro), config.precision)
    trained = [p for p in module.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    fixed = nbytes(module) - gradients
    ranks = gpus if sharded else 1
    largest = max((nbytes(block) for block in _blocks(module)), default=0)
    memory = Memory(
        # Sharded, a rank holds its part, and whole only the block at work and the one fetched ahead.
        weights=fixed + gradients // ranks + (2 * largest if sharded and gpus > 1 else 0),
        gradients=gradients // ranks,
        optimizer=2 * gradients // ranks,
        average=gradients // ranks if config.average else 0,
        buckets=gradients if gpus > 1 and not sharded else 0,
        activations=peak - gradients,
    )
    return Plan(
        parameters=sum(p.numel() for p in trained),
        frozen=sum(p.numel() for p in module.parameters() if not p.requires_grad),
        forward=forward * per_step,
        flops=total * per_step,
        memory=memory,
        micro_batch=micro,
        steps=config.plan(subject.samples / config.batch_size).total,
        tokens_per_step=config.batch_size * subject.tokens,
    )


def _blocks(module: nn.Module) -> list[nn.Module]:
    return [b for part in module.modules() if isinstance(part, NextScaleTransformer) for b in part.blocks]


def _step(
    task: TrainingTask, name: str, module: nn.Module, batch: dict[str, Any], precision: str
) -> tuple[int, int, int]:
    """Operations of the forward pass and of all, and the most bytes alive beside the weights, gradients included."""
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    autocast = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
    with operation_counter() as counter, Alive() as alive:
        with autocast:
            loss, metrics = task.loss(name, module, batch, 0)
        forward = int(counter.get_total_flops())
        loss.backward()
        del loss, metrics
        peak = alive.peak
    for parameter in module.parameters():
        parameter.grad = None
    return forward, int(counter.get_total_flops()), peak


# --- what is planned ----------------------------------------------------------------------------------


def subject_of(kind: str, recipe: Any, samples: int | None = None, from_tokens: bool | None = None) -> Subject:
    """The subject of a recipe. To be called inside :func:`valueless`.

    Args:
        kind: name of the recipe, as ``nextscale train`` has it.
        samples: of an epoch; None: as many as ImageNet has.
        from_tokens: train on kept tokens instead of images; None: as the recipe says.

    Raises:
        ValueError: there is no next-scale transformer in what the recipe trains, or its tokenizer is not known.
    """
    from nextscale.tasks.generation.class_recipe import ClassRecipe
    from nextscale.tasks.generation.text_recipe import TextRecipe

    if kind not in PLANNED:
        raise ValueError(
            f"`nextscale train {kind}` cannot be planned: plans are for next-scale transformers, {', '.join(PLANNED)}"
        )
    if getattr(recipe, "init", None) is not None:
        raise ValueError("a plan is of a model made anew: leave init out, and give its sizes")
    samples = samples or IMAGENET
    schedule_of = recipe.training.plan(samples / recipe.training.batch_size)
    if isinstance(recipe, TextRecipe):
        model = recipe.build(_Encoder(recipe), tokenizer_without_values)  # type: ignore[arg-type]
        model.text_encoder = None
        return text_subject(recipe.task(model, schedule_of), recipe.training, samples, recipe.text_length)
    assert isinstance(recipe, ClassRecipe)
    classes = recipe.classes or len(recipe.class_names or ()) or 1000
    model = recipe.build(_Classes(classes), tokenizer_without_values)
    task = recipe.task(model, schedule_of, tokenizer_without_values)
    kept = getattr(recipe, "tokens", None) is not None if from_tokens is None else from_tokens
    return class_subject(task, recipe.training, samples, kept, recipe.token_schedule(model))


PLANNED = ("var", "flexvar", "infinity", "flowar", "star")
"""Recipes whose steps can be planned."""


class _Classes:
    """As much of a data set as the building of a model asks for."""

    def __init__(self, classes: int) -> None:
        self.num_classes, self.classes = classes, None
        self.labels = _Largest(classes - 1)


class _Largest(int):
    def max(self) -> int:
        return int(self)


class _Encoder:
    """As much of a text encoder as the building of a model asks for."""

    def __init__(self, recipe: Any) -> None:
        from nextscale.tasks.generation.text import TextEncoder, TextEncoderConfig

        self.config = TextEncoderConfig(recipe.text_encoder or "made in the run", max_length=recipe.text_length)
        self.width = TextEncoder(self.config).width if recipe.text_encoder else recipe.text_width


def class_subject(task: Any, training: TrainingConfig, samples: int, kept: bool, held: Any) -> Subject:
    """Of a class-conditional model.

    Args:
        kept: train on tokens of the scales ``held``.
    """
    model = task.model
    tokenizer, schedule = model.tokenizer, model.config.schedule
    height, width = tokenizer.image_size(schedule)
    values = "values" in tokenizer.stored_as()
    numbers = 2 * tokenizer.config.channels * schedule.final.tokens if values else held.length

    def batch(count: int) -> dict[str, Tensor]:
        made = {"label": torch.zeros(count, dtype=torch.long), "uniform": torch.ones(count)}
        if not kept:
            return {**made, "image": torch.zeros(count, 3, height, width)}
        kind = torch.float16 if values else torch.long
        return {**made, "tokens": torch.zeros(count, numbers, dtype=kind)}

    each = 2.0 if values or tokenizer.config.quantizer.vocabulary <= 1 << 16 else 4.0
    return Subject(task, training, batch, schedule.length, samples, numbers * each)


def text_subject(task: Any, training: TrainingConfig, samples: int, length: int = TEXT_TOKENS) -> Subject:
    """Of a model that reads texts, of ``length`` tokens each; the text encoder's own work is not counted."""
    from nextscale.tasks.generation.text import TextFeatures

    model = task.model
    schedule = model.config.schedule
    height, width = model.tokenizer.image_size(schedule)
    channels = model.config.text_width

    def batch(count: int) -> dict[str, Any]:
        states = Packed(torch.zeros(count * length, channels), (length,) * count)
        pooled = TextFeatures(states, torch.zeros(count, channels))
        text: Any = pooled if task.name == "star" else states
        return {"image": torch.zeros(count, 3, height, width), "uniform": torch.ones(count), "text": text}

    return Subject(task, training, batch, schedule.length, samples, None)


def preset_subject(name: str, training: TrainingConfig | None = None, samples: int | None = None) -> Subject:
    """The subject of a published model, trained from images with its recipe's defaults. Inside :func:`valueless`.

    Raises:
        ValueError: no model is called so.
    """
    from nextscale.systems import RECIPES

    kind = next((kind for kind in PLANNED if name in presets(kind)), None)
    if kind is None:
        known = ", ".join(name for kind in PLANNED for name in presets(kind))
        raise ValueError(f"{name!r} is no configuration file and none of {known}")
    if training is None:
        fields = RECIPES[kind].recipe_class.__dataclass_fields__
        training = fields["training"].default_factory()
    model = build_preset(kind, name)
    task = _task(kind, model)
    assert training is not None
    if hasattr(model, "painter"):
        return text_subject(task, training, samples or IMAGENET)
    return class_subject(task, training, samples or IMAGENET, False, model.config.schedule)


def presets(kind: str) -> dict[str, Any]:
    """Configurations of published models, by name."""
    from importlib import import_module

    module = {"infinity": "infinity_config", "flowar": "flowar_config", "star": "star_config"}.get(kind, kind)
    found: dict[str, Any] = import_module(f"nextscale.tasks.generation.{module}").PRESETS
    return found


def build_preset(kind: str, name: str) -> Any:
    """The model of a preset, with the tokenizer it was published with."""
    from nextscale.systems import SYSTEMS

    config = presets(kind)[name]
    tokenizer: Any
    if kind == "infinity":
        tokenizer = _bitwise(config.token_bits, config.schedule)
    else:
        from nextscale.models import MODELS

        tokenizer = _published(MODELS[SYSTEMS[kind].needs["tokenizer"].model].system)
        tokenizer.config = replace(tokenizer.config, schedule=config.schedule)
    return SYSTEMS[kind].model_class(config, tokenizer)


def _task(kind: str, model: Any) -> Any:
    from importlib import import_module

    module = import_module(f"nextscale.tasks.generation.{kind}_training")
    stable = getattr(model, "stable", None) is not None
    name = {"var": "VARTraining", "flexvar": "FlexVARTraining", "infinity": "InfinityTraining"}.get(kind)
    name = name or ("FlowARTraining" if kind == "flowar" else "STARHeadTraining" if stable else "STARTraining")
    return getattr(module, name)(model)


def tokenizer_without_values(source: str, tokenizer: Any = None) -> Any:
    """The tokenizer that a recipe names: a published one by name, or a folder of any; only its sizes are read.

    Raises:
        ValueError: it is neither.
    """
    import json

    from nextscale.core.config import from_json
    from nextscale.models import MODELS
    from nextscale.systems import SYSTEMS

    named = MODELS.get(str(source))
    folder = Path(source).expanduser() if named is None or named.repository else named.folder
    folder = folder if (folder / "config.json").is_file() else folder / "model"
    if (folder / "config.json").is_file():
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_class, config = SYSTEMS[content["system"]].model_class, content["config"]
        if "tokenizer" in config:
            model_class, config = model_class.tokenizer_class, config["tokenizer"]
        return model_class(from_json(model_class.config_class, config))
    if named is None:
        raise ValueError(
            f"the tokenizer {source} is not here: give a folder with a config.json, or a published one's name, with "
            "--tokenizer"
        )
    if named.system == "bitwise-vq":
        return _bitwise(int("".join(c for c in named.name if c.isdigit())), None)
    return _published(named.system)


def _published(system: str) -> Any:
    """A tokenizer of a system's default sizes, which are the published one's."""
    from nextscale.systems import SYSTEMS

    model_class = SYSTEMS[system].model_class
    return model_class(model_class.config_class())


def _bitwise(bits: int, schedule: Any) -> Any:
    """Infinity's tokenizer of so many bits a token; more than 32 are four cells' bits."""
    from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizerConfig
    from nextscale.tasks.tokenizers.bitwise_vq import AUTOENCODER, BitwiseVQ, BitwiseVQConfig

    patched = bits == 56
    quantizer = BitwiseQuantizerConfig(bits // 4, patch=2) if patched else BitwiseQuantizerConfig(bits)
    multipliers = AUTOENCODER.multipliers[:-1] if patched else AUTOENCODER.multipliers
    autoencoder = replace(AUTOENCODER, latent_channels=quantizer.bits, multipliers=multipliers)
    config = BitwiseVQConfig(autoencoder, quantizer)
    return BitwiseVQ(config if schedule is None else replace(config, schedule=schedule))
