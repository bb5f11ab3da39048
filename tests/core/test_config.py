"""Configurations as JSON and back."""

import json
from dataclasses import dataclass, field

import pytest

from nextscale.core.config import from_json, to_json
from nextscale.core.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule.squares(1, 2)


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)
    scale: float | None = None


@dataclass(frozen=True)
class Outer:
    width: int
    inner: Inner = field(default_factory=Inner)
    schedule: ScaleSchedule = SCHEDULE
    names: tuple[str, ...] | None = None
    other: Inner | None = None
    parts: tuple[Inner, ...] = ()


@pytest.mark.parametrize(
    "config",
    [
        Outer(3),
        Outer(3, Inner((4,), 0.5), ScaleSchedule.grids([(1, 2), (3, 4)], planes=3), ("a", "é"), Inner()),
        Outer(3, parts=(Inner(), Inner((2,), 0.5))),
    ],
)
def test_round_trip(config: Outer) -> None:
    assert from_json(Outer, json.loads(json.dumps(to_json(config)))) == config


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="Outer has no entry colour, size; it was saved by another version"):
        from_json(Outer, {"width": 1, "size": 2, "colour": 3})
    with pytest.raises(ValueError, match=r"Outer cannot be read: .*width"):
        from_json(Outer, {})
    with pytest.raises(ValueError, match="Inner has no entry x"):
        from_json(Outer, {"width": 1, "inner": {"x": 1}})
