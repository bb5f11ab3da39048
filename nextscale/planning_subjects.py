"""What can be planned: recipes and published models, on weights without values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.core.cross_attention import Packed
from nextscale.core.training import TrainingConfig
from nextscale.planning import Subject

IMAGENET = 1_281_167
"""Images of an epoch where the data is not here and no number is given."""
TEXT_TOKENS = 64
"""Tokens of a text, where none are given."""


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
        reader = recipe.build(_Encoder(recipe), tokenizer_without_values)  # type: ignore[arg-type]
        return text_subject(recipe.task(reader, schedule_of), recipe.training, samples, recipe.text_length)
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
