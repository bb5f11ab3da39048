"""Configurations, which are frozen dataclasses, as JSON and back."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from nextscale.core.schedule import ScaleSchedule

Config = TypeVar("Config")


def to_json(value: Any) -> Any:
    """Plain JSON data; a scale schedule becomes a text such as ``"1 2 3 4x6"``."""
    if isinstance(value, ScaleSchedule):
        return str(value)
    if is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(cls: type[Config], data: Mapping[str, Any]) -> Config:
    """The configuration that :func:`to_json` wrote.

    Raises:
        ValueError: an entry is unknown to this version, or missing.
    """
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise ValueError(f"{cls.__name__} has no entry {', '.join(unknown)}; it was saved by another version")
    try:
        return cls(**{name: _read(hints[name], value) for name, value in data.items()})
    except TypeError as error:
        raise ValueError(f"{cls.__name__} cannot be read: {error}") from None


def _read(hint: Any, value: Any) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        return None if value is None else _read(inner[0], value)
    if hint is ScaleSchedule:
        return ScaleSchedule.parse(value)
    if is_dataclass(hint):
        return from_json(typing.cast(type, hint), value)
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return tuple(_read(inner, item) for item in value)
    return value
