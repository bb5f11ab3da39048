"""Loading any model: by name, from a file or folder, or from a state dict."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextscale.models import MODELS, NamedModel, locate, no_such_source
from nextscale.systems import SYSTEMS, System, find_system

if TYPE_CHECKING:
    import torch
    from torch import nn

Source = str | os.PathLike[str] | Mapping[str, Any]

FLOAT32_PARAMETERS = ("log_scale", "packed_step", "packed_low")
"""Kept as they are whatever the weights' precision: an exponent, and what restores packed weights, where rounding would
be multiplied."""

LITE = "lite"
"""Where a saved compressed model keeps its plan."""


@dataclass(frozen=True)
class Opened:
    """A model's weights before the model is built; tensors of files are memory-mapped.

    Attributes:
        content: a state dict, or what a training file holds around it.
        config: of a folder saved by this library; None: the official layout.
        path: of the file or folder; None: a state dict was given.
        named: the entry of the list of models, where it was opened by name.
    """

    system: System
    content: Mapping[str, Any]
    config: Mapping[str, Any] | None = None
    path: Path | None = None
    named: NamedModel | None = None


def load(
    source: Source,
    system: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    lite: str | os.PathLike[str] | None = None,
    weight_bits: int | None = None,
    **overrides: Any,
) -> Any:
    """Load a model for use.

    Args:
        source: a name from :func:`nextscale.list_models`, a folder saved by this library or a training run's
            output folder, an official file (also a training checkpoint), or a state dict in an official layout.
        system: a name from :data:`nextscale.systems.SYSTEMS`; None: recognised from the content.
        device: None: CUDA, else MPS, else the CPU.
        dtype: of the weights, such as ``torch.bfloat16`` or ``"bfloat16"``; None: float32 on the CPU, elsewhere as
            stored. Quantisers stay in float32.
        lite: folder of a plan that ``nextscale calibrate`` wrote for this model: it is compressed as it is loaded,
            before its weights are converted (:func:`nextscale.tasks.generation.litevar.compress`).
        weight_bits: 8 or 4: pack the linear layers of all blocks into so many bits a weight, nothing else changed.
        overrides: what an official file cannot tell. VAR: ``tokenizer`` (a path, a name or a loaded one), ``schedule``
            (the scale list), ``heads``. Residual VQ: ``schedule``, ``unit_norm``, ``smoothing``, ``beta``,
            ``norm_groups``. Infinity: ``tokenizer``, ``text_encoder``, and more in its ``from_official``.

    Returns:
        The model in evaluation form: generation has ``generate(condition, n, seed, …)``; all have ``config``, ``save``
        and ``to_official``.

    Raises:
        FileNotFoundError: no such file or name, or a hub file cannot be fetched.
        ValueError: the content is damaged, unsafe (:class:`nextscale.core.checkpoint.CheckpointError`), of no known
            system, or does not fit an override.
    """
    place, precision = choose_device(device), choose_dtype(dtype)
    model = build(open_source(source, system or combining(overrides)), **overrides)
    if lite is not None and weight_bits is not None:
        raise ValueError("a plan says itself how weights are packed: give lite or weight_bits, not both")
    if lite is not None or weight_bits is not None:
        from nextscale.mapped import MappedFiles
        from nextscale.tasks.generation.litevar import LitePlan, compress, weights_only

        plan = LitePlan.load(lite) if lite is not None else weights_only(model, weight_bits or 8)
        compress(model, plan, freed=MappedFiles().release)
    if precision is None and place.type == "cpu":
        precision = choose_dtype("float32")
    if precision is not None:
        cast(model, precision)
    return model.to(place).eval()


def combining(overrides: Mapping[str, Any]) -> str | None:
    """The system that a model becomes part of when another one is given beside it."""
    given = {name for name, value in overrides.items() if value is not None}
    return next((each.name for each in SYSTEMS.values() if each.combines and given & set(each.needs)), None)


def open_source(source: Source, system: str | None = None) -> Opened:
    """Find and read a model's weights, and recognise their system; see :func:`load`."""
    if isinstance(source, Mapping):
        return Opened(_recognise(source, system, "the state dict"), source)
    named = MODELS.get(str(source))
    path = Path(source).expanduser() if named is None else locate(named)
    if named is None and not path.exists():
        raise no_such_source(str(source))
    from nextscale.core.checkpoint import (
        CONFIG_FILE,
        WEIGHTS_FILE,
        CheckpointError,
        read_folder,
        read_sharded,
        read_tensors,
        shards_of,
    )

    if path.name == WEIGHTS_FILE and (path.parent / CONFIG_FILE).is_file():
        path = path.parent
    described = _described(path)
    if described is not None:
        found, config = described
        weights = read_sharded(path) if shards_of(path) else read_tensors(path / WEIGHTS_FILE)
        return Opened(find_system(system or found), {"model": weights, "config": config}, None, path, named)
    sharded = path.is_dir() and bool(shards_of(path))
    if path.is_dir() and not sharded:
        folder = path if (path / CONFIG_FILE).is_file() else path / "model"
        if not (folder / CONFIG_FILE).is_file():
            raise CheckpointError(
                f"{path} holds no {CONFIG_FILE}: it is no folder saved by this library and no finished run's output; "
                f"it holds {_listing(path)}. Of official files give the file"
            )
        state, config = read_folder(folder)
        saved = str(config.get("system"))
        if saved not in SYSTEMS or (system not in (None, saved) and find_system(str(system)).combines != saved):
            wanted = system or f"one of {', '.join(SYSTEMS)}"
            raise CheckpointError(f"{folder} holds a saved {saved!r}, expected {wanted}")
        return Opened(SYSTEMS[system or saved], state, config, folder, named)
    content = read_sharded(path) if sharded else read_tensors(path)
    if system is None and named is not None:
        system = named.system
    return Opened(_recognise(content, system, str(path)), content, None, path, named)


def _described(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """System and configuration of a published folder in the layout of transformers, if it is one that is known here."""
    import json

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kind = config.get("model_type") if isinstance(config, dict) else None
    found = next((each.name for each in SYSTEMS.values() if kind is not None and kind in each.model_types), None)
    return None if found is None else (found, config)


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if names else "nothing"


def _recognise(content: Mapping[str, Any], system: str | None, what: str) -> System:
    if system is not None:
        return find_system(system)
    for candidate in SYSTEMS.values():
        if candidate.recognises(content):
            return candidate
    from nextscale.core.checkpoint import CheckpointError

    if {"task", "step", "phases"} <= set(content):
        raise CheckpointError(
            f"{what} is a checkpoint from the middle of training a {content['task']!r} (step {content['step']}): run "
            "the same `nextscale train` command to go on from it. The finished model is in the run's folder `model`"
        )
    keys = ", ".join(repr(key) for key in list(content)[:6])
    more = f" and {len(content) - 6} more" if len(content) > 6 else ""
    raise CheckpointError(
        f"{what} is of no system that is known here ({', '.join(SYSTEMS)}); its first keys are {keys}{more}. "
        "If it is one of them under other names, say which with system="
    )


# --- building -----------------------------------------------------------------------------------------


def build(opened: Opened, **overrides: Any) -> Any:
    """The model of opened weights, on the CPU, its tensors taken over as they are.

    Raises:
        ValueError: an override is unknown, or a saved folder leaves nothing open.
        FileNotFoundError: the tokenizer that the file needs is not here.
    """
    system = opened.system
    overrides = {key: value for key, value in overrides.items() if value is not None}
    if opened.named is not None and opened.named.system == system.name:
        overrides = {**opened.named.options, **overrides}
    if system.combines is not None and (opened.config is None or opened.config.get("system") == system.combines):
        own = {key: overrides.pop(key) for key in (*system.needs, *system.overrides) if key in overrides}
        model = build(replace(opened, system=SYSTEMS[system.combines]), **overrides)
        needed = {name: find_needed(opened, name, own.pop(name, None), beside=model) for name in system.needs}
        return system.model_class.of(model, **needed, **own)
    if opened.config is not None:
        hints = dict(opened.config.get("needs", {}))
        if unknown := [key for key in overrides if key not in hints]:
            raise ValueError(
                f"{', '.join(unknown)}: a folder saved by this library says all of this itself; leave it out"
            )
        needed = {name: find_needed(opened, name, overrides.get(name), str(hint)) for name, hint in hints.items()}
        if opened.path is not None and (opened.path / LITE).is_dir():
            from nextscale.tasks.generation.litevar import LitePlan, rebuild

            plan = LitePlan.load(opened.path / LITE)
            return _at_home(rebuild(system.model_class, opened.content, opened.config, plan, **needed), opened)
        return _at_home(system.model_class.from_saved(opened.content, opened.config, **needed), opened)
    known = [*system.overrides, *system.needs]
    if unknown := [key for key in overrides if key not in known]:
        raise ValueError(f"{system.name} takes no {', '.join(unknown)}; it takes {', '.join(known)}")
    given = {name: overrides.pop(name, None) for name in system.needs}
    needed = {name: find_needed(opened, name, source) for name, source in given.items()}
    model = system.model_class.from_official(opened.content, **needed, **overrides)
    if "tokenizer" in needed and needed["tokenizer"] is not given["tokenizer"]:
        # A tokenizer file does not tell the scales it is used with; its transformer's does.
        model.tokenizer.config = replace(model.tokenizer.config, schedule=model.config.schedule)
    return _at_home(model, opened)


def _at_home(model: Any, opened: Opened) -> Any:
    """The model, told the folder it lies in where it may find more there, such as a text encoder."""
    if opened.path is not None and hasattr(model, "home"):
        model.home = opened.path if opened.path.is_dir() else opened.path.parent
    return model


def find_needed(opened: Opened, name: str, given: Any = None, hint: str | None = None, beside: Any = None) -> Any:
    """A model that another one builds on: the tokenizer of a transformer, the base of an adapter.

    In this order: the one that is given (a path, a model's name or a loaded model); the saved folder's hint (a name, or
    a path from the folder); the training file's own entry; the published file beside it; the only file beside it that
    fits the pattern; the hub's.

    Args:
        name: as in :attr:`nextscale.systems.System.needs`.
        beside: a model that is built already, whose tokenizer serves this one too where its file has none.

    Raises:
        FileNotFoundError: none is here and the hub's cannot be fetched.
        ValueError: it is of another kind.
    """
    need = opened.system.needs[name]
    wanted = {} if opened.named is None else opened.named.needs
    published = MODELS[wanted.get(name, need.model)]
    kind = SYSTEMS[published.system].model_class
    if given is not None:
        if not isinstance(given, str | os.PathLike | Mapping):
            return given
        return _of_kind(_build_beside(open_source(given), beside), kind, given)
    if hint is not None:
        beside_folder = opened.path / hint if opened.path is not None else Path(hint)
        source = hint if hint in MODELS or not beside_folder.exists() else beside_folder
        return _of_kind(build(open_source(source)), kind, source)
    part: Any = opened.content
    for key in need.entry:
        part = part.get(key) if isinstance(part, Mapping) else None
    if need.entry and isinstance(part, Mapping):
        return build(Opened(SYSTEMS[published.system], part))
    if opened.path is not None and published.file is not None:
        neighbour = opened.path.parent / published.file
        others = sorted(opened.path.parent.glob(need.beside)) if need.beside else []
        if neighbour.is_file() or len(others) == 1:
            found = neighbour if neighbour.is_file() else others[0]
            return _build_beside(open_source(found, published.system), beside)
    try:
        return _build_beside(open_source(published.name), beside)
    except FileNotFoundError as error:
        what = opened.path or "the state dict"
        raise FileNotFoundError(
            f"{what} is a {opened.system.name} without its {name}. Put {published.file} (hub: {published.repository}) "
            f"beside it, or pass its path: {name}=PATH in Python, --{name} PATH on the command line ({error})"
        ) from None


def _build_beside(opened: Opened, other: Any) -> Any:
    """A model; with another one's tokenizer where its file has none."""
    shares = other is not None and opened.config is None and "tokenizer" in opened.system.needs
    return build(opened, tokenizer=other.tokenizer) if shares else build(opened)


def _of_kind(model: Any, kind: type, source: Any) -> Any:
    """The model itself or the tokenizer inside it."""
    found = model if isinstance(model, kind) else getattr(model, "tokenizer", None)
    if not isinstance(found, kind):
        raise ValueError(f"{source} is a {type(model).__name__}, expected a {kind.__name__}")
    return found


# --- device and precision -----------------------------------------------------------------------------


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device that is named, else CUDA, else MPS, else the CPU.

    Raises:
        ValueError: the device is unknown or not on this machine.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device is None:
        return torch.device(next(name for name, present in there.items() if present))
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"there is no device {device!r}; name cuda, cuda:1, mps or cpu") from None
    if not there.get(chosen.type, True):
        present = ", ".join(name for name, here in there.items() if here)
        raise ValueError(f"device {str(device)!r} is not on this machine, which has {present}")
    return chosen


def choose_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating-point type from its name.

    Raises:
        ValueError: the name is none of float32, bfloat16, float16 (or fp32, bf16, fp16).
    """
    import torch

    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    names = {
        **dict.fromkeys(("float32", "fp32"), torch.float32),
        **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
        **dict.fromkeys(("float16", "fp16", "half"), torch.float16),
    }
    if dtype not in names:
        raise ValueError(f"dtype {dtype!r} is none of float32, bfloat16, float16")
    return names[dtype]


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert a model's weights in place, one tensor at a time, but for what stays in float32.

    The memory of each memory-mapped tensor is given back as soon as it is converted, so that both forms of the
    weights never lie in memory together.
    """
    from nextscale.core.quantizer import Float32Module
    from nextscale.mapped import MappedFiles

    files = MappedFiles()
    island = {id(t) for m in model.modules() if isinstance(m, Float32Module) for t in m.parameters()}
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        stays = id(parameter) in island or name.rsplit(".", 1)[-1] in FLOAT32_PARAMETERS
        old = parameter.data
        if stays or not old.is_floating_point() or old.dtype == dtype:
            continue
        parameter.data = old.to(dtype)
        files.release(old)
    return model
