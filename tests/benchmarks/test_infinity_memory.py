"""The memory that drawing needs is counted on the meta device, and agrees with the formula and with a real run."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return runpy.run_path(str(BENCHMARKS / "infinity_memory.py"))


def options(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"pixels": 1024, "batch": 1, "words": 64, "dtype": "bfloat16", **changes})


def planned(script: dict[str, Any], size: str, bits: int, chosen: SimpleNamespace) -> dict[str, Any]:
    with torch.device("meta"):
        model = script["build"](size, bits, chosen)
    counted: dict[str, Any] = script["count"](model, chosen)
    blocks, schedule = model.config.transformer, model.config.schedule
    assert counted["cache"] == 2 * 2 * blocks.depth * 2 * schedule.length * blocks.width
    return counted


def test_full_sizes_fit_where_they_are_said_to(script: dict[str, Any]) -> None:
    assert 9e9 < planned(script, "2b", 16, options())["peak"] < 12e9
    assert 20e9 < planned(script, "8b", 8, options())["peak"] < 24e9


def test_the_count_is_that_of_a_real_run(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nextscale.core.autoencoder import AutoencoderConfig
    from nextscale.tasks.generation.infinity_config import PRESETS, InfinityConfig
    from nextscale.tasks.generation.infinity_transformer import InfinityBlocksConfig

    tiny = InfinityConfig(InfinityBlocksConfig(32, 2, 2), text_width=16, pool_heads=2)
    monkeypatch.setitem(PRESETS, "infinity-125m", tiny)
    small = AutoencoderConfig(8, (1, 1, 1, 1, 1), 1, attention=False, norm_groups=8)
    monkeypatch.setitem(script["build"].__globals__, "AUTOENCODER", small)
    path, figures = BENCHMARKS / "infinity_memory.py", tmp_path / "figures.json"
    arguments = ["--sizes", "125m", "--pixels", "256", "--run", "--dtype", "float32", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(path), *arguments, "--json", str(figures)])
    script["main"]()
    (result,) = json.loads(figures.read_text())["models"]
    assert result["run"]["peak"] == pytest.approx(result["counted"]["peak"], rel=0.05)
    assert result["run"]["taken"] > result["run"]["peak"]
