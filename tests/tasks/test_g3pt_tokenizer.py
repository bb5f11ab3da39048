"""G3PT's tokenizer: its pyramid of unordered tokens, its occupancy field, and its training on a few shapes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import nextscale
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.shapes.g3pt_tokenizer import PRESETS, PointTokenizer, PointTokenizerConfig
from nextscale.tasks.shapes.g3pt_tokenizer_training import (
    PointTokenizerLossConfig,
    PointTokenizerTraining,
    initialize,
    spread,
)
from nextscale.tasks.shapes.surfaces import grid_values
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizerConfig

SCHEDULE = ScaleSchedule.counts(1, 3, 6)


def build(tiny: SimpleNamespace | None = None, **changes: Any) -> PointTokenizer:
    torch.manual_seed(0)
    sizes = {"width": 16, "heads": 2, "latents": 8, "points": 32, "encoder_depth": 1, "decoder_depth": 1, "octaves": 3}
    config = {"readout_ratio": 1.0, "quantizer": BitwiseQuantizerConfig(5), "schedule": SCHEDULE}
    model = initialize(PointTokenizer(PointTokenizerConfig(**{**sizes, **config, **changes})))
    if tiny is not None:
        tiny.scattered(model, 0)
    return model.eval()


def balls(count: int, points: int = 48, queries: int = 96) -> dict[str, Tensor]:
    """Balls of several radii."""
    generator = torch.Generator().manual_seed(1)
    normals = torch.nn.functional.normalize(torch.randn(count, points, 3, generator=generator), dim=-1)
    radius = torch.linspace(0.4, 0.9, count)[:, None, None]
    places = torch.rand(count, queries, 3, generator=generator) * 2 - 1
    near = torch.arange(queries).expand(count, -1) >= queries // 2
    return {
        "surface": torch.cat((radius * normals, normals), dim=-1),
        "queries": places,
        "occupied": places.norm(dim=-1) < radius[..., 0],
        "near": near,
        "uniform": torch.linspace(0, 0.99, count),
    }


def test_stepping_and_whole_pyramids_agree(tiny: SimpleNamespace) -> None:
    model = build(tiny)
    quantizer, surface = model.quantizer, balls(3)["surface"]
    tokens = model.encode(surface)
    assert tokens.shape == (3, 10, 5) and tokens.dtype == torch.bool
    _, totals = quantizer.encode(model.features(surface), SCHEDULE)
    total, inputs = quantizer.begin(3, SCHEDULE), []
    for index, part in enumerate(SCHEDULE.split(tokens)):
        total = quantizer.advance(total, quantizer.codes(part), SCHEDULE, index)
        if index + 1 < len(SCHEDULE):
            inputs.append(quantizer.next_input(total, SCHEDULE, index + 1))
    torch.testing.assert_close(total, totals[-1])
    torch.testing.assert_close(quantizer.decode(tokens, SCHEDULE)[-1], total)
    torch.testing.assert_close(quantizer.teacher_inputs(tokens, SCHEDULE), torch.cat(inputs, dim=1))
    torch.testing.assert_close(quantizer(model.features(surface), SCHEDULE).totals[-1], total)


def test_tokens_have_no_order_but_that_of_their_queries(tiny: SimpleNamespace) -> None:
    model, surface = build(tiny), balls(2)["surface"]
    tokens, decoded = model.encode(surface), model.decode(model.encode(surface))
    order = torch.cat((torch.arange(4), 4 + torch.randperm(6)))
    with torch.no_grad():
        model.quantizer.queries.copy_(model.quantizer.queries[order])
    assert torch.equal(model.encode(surface), tokens[:, order])
    torch.testing.assert_close(model.decode(tokens[:, order]), decoded)
    # Points have none either.
    torch.testing.assert_close(model.features(surface[:, :32]), model.features(surface[:, :32].flip(1)))


def test_numbers_bits_and_codes(tiny: SimpleNamespace) -> None:
    quantizer = build(tiny).quantizer
    numbers = torch.arange(32)
    bits = quantizer.bits_of(numbers)
    assert torch.equal(quantizer.numbers(bits), numbers) and bits[1].tolist() == [True, False, False, False, False]
    torch.testing.assert_close(quantizer.codes(bits), quantizer.codebook)
    flips = [torch.ones(2, 1, 5, dtype=torch.bool)]
    latents = torch.randn(2, 8, 16)
    plain, _ = quantizer.encode(latents, SCHEDULE)
    first, totals = quantizer.encode(latents, SCHEDULE, flips=flips)
    assert torch.equal(plain[0], first[0])
    torch.testing.assert_close(totals[0], quantizer.contribution(quantizer.codes(~plain[0]), SCHEDULE, 0))


def test_meshes_close_inside_the_grid(tiny: SimpleNamespace) -> None:
    model, surface = build(tiny), balls(1)["surface"]
    with torch.no_grad():
        hidden = model.decode(model.encode(surface))
        values, _ = grid_values(model.field(hidden), 9, 1.05, 0.0, stride=1)
        model.head.bias.sub_(values.median())  # half of the cube is inside, its border too
        torch.testing.assert_close(model.field(hidden)(surface[0, :, :3]), model.occupancy(hidden, surface[..., :3])[0])
    shape = model.shape(hidden, resolution=8, stride=2)
    assert shape.watertight and shape.volume > 0 and abs(shape.vertices).max() < 1.05 and shape.up == "z"
    [again] = model.reconstruct(surface, resolution=8, stride=2)
    assert again.volume == pytest.approx(shape.volume, rel=1e-4)
    assert len(model.reconstruct(surface, scales=1, resolution=4)) == 1
    with pytest.raises(ValueError, match="resolution is 1"):
        model.shape(hidden, resolution=1)


def test_learns_without_and_through_tokens() -> None:
    model, batch = build(), balls(4)
    task = PointTokenizerTraining(model, PointTokenizerLossConfig(continuous=0.5, partial=0.5), total=40)
    optimizer, losses = torch.optim.Adam(model.parameters(), 5e-3), []
    assert [task.quantizes(step) for step in (0, 19, 20)] == [False, False, True]
    for step in range(40):
        optimizer.zero_grad()
        loss, metrics = task.loss(task.name, model.train(), batch, step)
        loss.backward()
        optimizer.step()
        losses.append(float(metrics["cross_entropy"]))
    assert losses[19] < 0.7 * losses[0] and losses[39] < losses[0]
    assert {"iou", "iou_near", "fit", "rarest_bit"} <= set(metrics)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.quantizer.parameters())
    assert task._scales(batch, 0).tolist() == [1, 2, 3, 3]
    plain, _ = model.loss({k: v for k, v in batch.items() if k not in ("near", "uniform")})
    assert plain.isfinite()


def test_saved_and_loaded_in_half_precision(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model, surface = build(tiny), balls(2)["surface"]
    folder = model.save(tmp_path / "saved")
    loaded = nextscale.load(folder, device="cpu")
    assert loaded.config == model.config and torch.equal(loaded.encode(surface), model.encode(surface))
    half = nextscale.load(folder, device="cpu", dtype="bfloat16")
    assert half.quantizer.queries.dtype == torch.float32 and half.head.weight.dtype == torch.bfloat16
    hidden = half.decode(model.encode(surface))
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(
        half.occupancy(hidden, surface[..., :3]),
        model.occupancy(model.decode(model.encode(surface)), surface[..., :3]),
        atol=0.2,
        rtol=0.1,
    )


def test_sizes_and_mistakes() -> None:
    with torch.device("meta"):
        model = PointTokenizer(PRESETS["g3pt-tokenizer"])
    assert model.config.schedule.length == 2408
    # 28 layers of 12 x 512^2, five times that for the attentions, and the queries.
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(104.3, rel=0.01)
    with pytest.raises(ValueError, match="are not plain counts"):
        PointTokenizerConfig(schedule=ScaleSchedule.squares(1, 2))
    with pytest.raises(ValueError, match="patch is 2"):
        PointTokenizerConfig(quantizer=BitwiseQuantizerConfig(5, 2))
    with pytest.raises(ValueError, match="expected shares"):
        PointTokenizerLossConfig(continuous=1.0)
    assert spread(1).tolist() == [[0, 0, 0]] and spread(7).abs().max() <= 0.9
