"""``nextscale info``"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nextscale.models import MODELS
from nextscale.systems import SYSTEMS


def add_arguments(parser: Any) -> None:
    parser.add_argument("source", type=str, help="file, folder or name")
    parser.add_argument(
        "--scales",
        type=str | None,
        default=None,
        help="the scale list, where an official file does not tell it",
    )
    parser.add_argument("--entries", action="store_true", help="every entry with its shape and type")


def run(arguments: Any) -> None:
    from nextscale.cli.console import pairs, say
    from nextscale.models import local_path

    named = MODELS.get(arguments.source)
    if named is not None and local_path(named) is None:
        rows = [
            ("name", named.name),
            ("system", named.system),
            ("what", named.summary),
            ("terms", named.terms),
        ]
        place = f"hub repository {named.repository}, file {named.file}" if named.repository else str(named.folder)
        say(pairs([*rows, ("place", f"{place}; not on this machine")]))
        return
    from nextscale.loading import open_source

    opened = open_source(arguments.source)
    say(pairs(describe(opened, arguments.scales)))
    if arguments.entries:
        say("")
        for name, value in _tensors(opened.content):
            say(f"{name}  {' x '.join(map(str, value.shape)) or 'scalar'}  {str(value.dtype).removeprefix('torch.')}")


def describe(opened: Any, scales: str | None = None) -> list[tuple[str, object]]:
    """(what, value) pairs about opened weights, which stay on disk.

    Raises:
        ValueError: the content does not fit its system.
    """
    from nextscale.cli.console import size_text

    rows: list[tuple[str, object]] = []
    if opened.named is not None:
        rows += [("name", opened.named.name), ("what", opened.named.summary)]
    layout = "official" if opened.config is None else "this library's"
    rows += [("system", opened.system.name), ("layout", layout)]
    if opened.path is not None:
        rows += [("place", opened.path), ("size on disk", size_text(_bytes(opened.path)))]
    for part, config, state in _parts(opened, scales):
        count = sum(value.numel() for name, value in state.items() if not _is_derived(name))
        kinds = sorted(
            {str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point()}
        )
        rows += [("", ""), (part, f"{size_text(count, '')} parameters ({count:,}) in {', '.join(kinds)}")]
        rows += [(f"  {name}", value) for name, value in _options(config)]
    nested = _training_facts(opened.content)
    if nested:
        rows += [("", ""), *nested]
    rows += [("", ""), ("terms", _terms(opened))]
    return rows


def _terms(opened: Any) -> str:
    if opened.named is not None:
        return str(opened.named.terms)
    if opened.config is not None:
        return "those of whoever trained it"
    return f"the published weights of {opened.system.name}: {opened.system.terms}; others: those of whoever trained it"


def _bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.iterdir() if p.is_file()) if path.is_dir() else os.path.getsize(path)


def _is_derived(name: str) -> bool:
    """Entries of official files that are no parameters: they follow from the sizes, or are statistics."""
    ends = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV", "normalizer.alpha", "normalizer.beta")
    return name == "mask" or name.endswith((*ends, "rope.freqs"))


def _parts(opened: Any, scales: str | None) -> list[tuple[str, Any, Mapping[str, Any]]]:
    """(what it is, configuration, tensors) of each model in a file or folder."""
    if opened.config is not None:
        return _parts_of(opened)
    model_class = opened.system.model_class
    role = "tokenizer" if not opened.system.needs else "transformer"
    given = {} if scales is None else {"schedule": scales}
    if hasattr(model_class, "official_parts"):  # several models in one file
        parts: list[tuple[str, Any, Mapping[str, Any]]] = model_class.official_parts(opened.content, **given)
        return parts
    config, state = model_class.read_official(opened.content, **given)
    found = [(role, config, state)]
    for name, need in opened.system.needs.items():
        content = _entry(opened.content, need.entry) if need.entry else None
        if isinstance(content, Mapping):
            found.append((name, *SYSTEMS[MODELS[need.model].system].model_class.read_official(content)))
    return found


def _parts_of(opened: Any) -> list[tuple[str, Any, Mapping[str, Any]]]:
    """The parts of a saved folder; each tensor is counted with the innermost part that has it."""
    from nextscale.loading import build

    parts, taken = build(opened).parts, set[int]()
    found: list[tuple[str, Any, Mapping[str, Any]]] = []
    for role, part in reversed(parts.items()):
        own = {name: value for name, value in part.state_dict().items() if value.data_ptr() not in taken}
        taken |= {value.data_ptr() for value in own.values()}
        found.insert(0, (role, part.config, own))
    return found


def _entry(content: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content


def _options(config: Any) -> list[tuple[str, str]]:
    """A configuration, part by part, one line each."""
    from dataclasses import fields, is_dataclass

    from nextscale.core.schedule import ScaleSchedule

    rows = []
    for entry in fields(config):
        value = getattr(config, entry.name)
        if isinstance(value, ScaleSchedule):
            rows.append((entry.name, f"{value} ({value.length} tokens)"))
        elif is_dataclass(value):
            inner = ((f.name, getattr(value, f.name)) for f in fields(value))
            rows.append((entry.name, ", ".join(f"{name} {_short(v)}" for name, v in inner)))
        else:
            rows.append((entry.name, _short(value)))
    return rows


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        shown = ", ".join(str(item).split(",")[0] for item in value[:5])
        return f"{shown}, … ({len(value)})" if len(value) > 5 else shown
    return f"{value:g}" if isinstance(value, float) else str(value)


def _training_facts(content: Mapping[str, Any]) -> list[tuple[str, object]]:
    """What a training file holds around the weights: epoch, step, settings, optimiser state."""
    from argparse import Namespace

    if all(hasattr(value, "shape") for value in content.values()):
        return []
    rows: list[tuple[str, object]] = [("training file", ", ".join(str(key) for key in content))]
    for key in ("epoch", "iter", "step"):
        if isinstance(content.get(key), int | float):
            rows.append((f"  {key}", content[key]))
    trainer = content.get("trainer")
    if isinstance(trainer, Mapping):
        rows.append(("  trainer", ", ".join(str(key) for key in trainer)))
    for key, value in content.items():
        settings = vars(value) if isinstance(value, Namespace) else value if key == "args" else None
        if isinstance(settings, Mapping):
            shown = [
                f"{n}={v}" for n, v in settings.items() if isinstance(v, int | float | str | bool) and len(str(v)) < 40
            ]
            rows.append((f"  {key}", " ".join(shown)))
    return rows


def _tensors(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            found += _tensors(value, f"{prefix}{key}.")
        elif hasattr(value, "shape"):
            found.append((f"{prefix}{key}", value))
    return found
