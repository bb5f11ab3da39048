"""Compressed models: they draw as before, save what they say, and come back from their files."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nextscale
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.code import CoDe
from nextscale.tasks.generation.litevar import (
    LiteConfig,
    LiteModel,
    LitePlan,
    attention_compressed,
    compress,
    fingerprint,
    simulate,
)
from nextscale.tasks.generation.litevar_calibration import Calibration, attention_saved, calibrate, scores_left
from nextscale.tasks.generation.litevar_packing import linears
from nextscale.tasks.generation.litevar_quantizers import PUBLISHED
from nextscale.tasks.generation.litevar_recording import Seen, divergences, draw_recorded
from nextscale.tasks.generation.litevar_search import (
    band_attention,
    best_keys,
    kept_attention,
    late_scales,
    published_windows,
    tile_attention,
)
from nextscale.tasks.generation.litevar_windows import ALL, tile_size
from nextscale.tasks.generation.var import VAR

SCHEDULE = ScaleSchedule.squares(1, 2, 4, 6)
PLAIN = LiteConfig(SCHEDULE, cache_bits=16, share_from=None)


@pytest.fixture
def model(tiny: SimpleNamespace) -> VAR:
    return tiny.var(tiny.tokenizer(schedule=SCHEDULE), width=32, heads=4)


def narrow(heads: int = 4) -> torch.Tensor:
    """Bands for the late scales."""
    widths = torch.full((2, heads, 4, 4), ALL, dtype=torch.int16)
    widths[:, :, 2, 2] = 3
    widths[:, ::2, 3, 2] = 0
    widths[:, :, 3, 3] = 9
    return widths


def picked(heads: int = 4) -> dict[int, torch.Tensor]:
    """Keys for the tiles of the late scales."""
    generator = torch.Generator().manual_seed(0)
    keys = {}
    for index in (2, 3):
        tiles = -(-SCHEDULE.lengths[index] // tile_size(SCHEDULE, index))
        keys[index] = torch.rand(2, heads, tiles, SCHEDULE.ranges[index][1], generator=generator) < 0.3
        keys[index][..., 0] = True
    return keys


def copy(model: VAR, tiny: SimpleNamespace) -> VAR:
    again = tiny.var(tiny.tokenizer(schedule=SCHEDULE), width=32, heads=4)
    again.load_state_dict(model.state_dict())
    return again


def test_without_savings_nothing_changes(model: VAR, tiny: SimpleNamespace) -> None:
    lite = compress(copy(model, tiny), LitePlan(PLAIN))
    assert isinstance(lite, VAR) and isinstance(lite, LiteModel) and lite.attention_work.done == 0
    for guidance in (0.0, 2.0):
        assert torch.equal(
            lite.generate([1, 3], 3, 5, guidance=guidance), model.generate([1, 3], 3, 5, guidance=guidance)
        )
    assert lite.attention_work.saved == 0 and lite.attention_work.done > 0
    assert lite.state_dict().keys() == model.state_dict().keys()
    assert lite.to_official().keys() == model.to_official().keys()


@pytest.mark.parametrize("windows", ["widths", "keys"])
@pytest.mark.parametrize("form", ["absent", "logits", "probabilities"])
def test_scale_by_scale_is_all_at_once(form: str, windows: str, model: VAR) -> None:
    """Windows and packed weights are the same in both; shared attention belongs to drawing alone."""
    precision = {name: 8 for name, _ in linears(model)}
    given = {"widths": narrow()} if windows == "widths" else {"keys": picked()}
    compress(model, LitePlan(replace(PLAIN, form=form, precision=precision), **given))  # type: ignore[arg-type]
    labels = torch.tensor([1, 4])
    with torch.inference_mode():
        tokens = model.tokenizer.encode(torch.rand(2, 3, 12, 12) * 2 - 1)
        inputs = model.tokenizer.quantizer.teacher_inputs(tokens, SCHEDULE)
        expected = model(inputs, labels)
        session = model.start(labels, SCHEDULE)
        parts = [session.logits(session.step(0, None), slice(None))]
        start = 0
        for index in (1, 2, 3):
            stop = start + SCHEDULE.lengths[index]
            parts.append(session.logits(session.step(index, inputs[:, start:stop]), slice(None)))
            start = stop
        joined = model.start(labels, SCHEDULE)
        rest = joined.logits(joined.step(3, inputs, first=0), slice(None))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rest, expected, rtol=1e-4, atol=1e-4)
    assert (0 < model.attention_work.saved < 1) == (form != "probabilities")


def test_an_image_is_the_same_alone_and_in_any_batch(model: VAR) -> None:
    compress(model, LitePlan(LiteConfig(SCHEDULE), keys=picked()))
    together = model.generate([0, 1, 2], 3, 7, batch_size=3)
    apart = model.generate([0, 1, 2], 3, 7, batch_size=2)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.generate(1, 1, 8)[0], together[1], rtol=1e-4, atol=1e-4)


def test_shared_attention_is_the_first_branchs(model: VAR, tiny: SimpleNamespace) -> None:
    """The conditional half is untouched, the other half changes; without guidance there is nothing to share."""
    lite = compress(copy(model, tiny), LitePlan(replace(PLAIN, share_from=2)))
    labels = torch.tensor([1, 3, 5, 5])
    steps: list[list[torch.Tensor]] = [[], []]
    with torch.inference_mode():
        for each, out in zip((model, lite), steps, strict=True):
            session = each.start(labels, SCHEDULE)
            for index, length in enumerate(SCHEDULE.lengths):
                torch.manual_seed(index)
                out.append(session.step(index, torch.randn(2, length, 4) if index else None))
    for index, (plain, shared) in enumerate(zip(*steps, strict=True)):
        torch.testing.assert_close(shared[:2], plain[:2], rtol=1e-4, atol=1e-4)
        assert torch.allclose(shared[2:], plain[2:], atol=1e-4) == (index < 2)
    work = lite.attention_work
    lengths, stops = SCHEDULE.lengths, [stop for _, stop in SCHEDULE.ranges]
    late = sum(n * s for n, s in zip(lengths[2:], stops[2:], strict=True))
    every = sum(n * s for n, s in zip(lengths, stops, strict=True))
    assert work.saved == pytest.approx(late / every / 4)
    assert torch.equal(lite.generate(2, 2, guidance=0.0), model.generate(2, 2, guidance=0.0))


def test_cache_and_weights_take_fewer_bytes(model: VAR, tiny: SimpleNamespace) -> None:
    precision = {name: 4 if "expand" in name else 8 for name, _ in linears(model) if "contract" not in name}
    before = sum(p.nbytes for p in model.transformer.parameters())
    lite = compress(copy(model, tiny), LitePlan(LiteConfig(SCHEDULE, precision)))
    after = sum(t.nbytes for t in (*lite.transformer.parameters(), *lite.transformer.buffers()))
    assert after < 0.55 * before
    cache = lite.transformer.allocate_cache(4, SCHEDULE.length, torch.float32)
    cache.images = 2
    cache.write(0, torch.randn(4, 1, 4, 8), torch.randn(4, 1, 4, 8))
    plain = model.transformer.allocate_cache(4, SCHEDULE.length, torch.float32)
    # Three of four parts, of a byte a number and two a vector, where four bytes were a number.
    assert cache.nbytes / plain.nbytes == pytest.approx(0.75 * (8 + 2) / (8 * 4))
    lite.generate(0)
    # Two blocks hold the 21 positions before the last scale; the 36 of that have room once.
    drawn = lite.transformer.allocate_cache(4, SCHEDULE.length, torch.float32)
    drawn.images = 2
    drawn.write(0, torch.randn(4, 1, 4, 8), torch.randn(4, 1, 4, 8))
    assert drawn.nbytes / cache.nbytes == pytest.approx((2 * 21 + 57) / (2 * 57))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_saved_model_comes_back_packed(bits: int, model: VAR, tmp_path: Path) -> None:
    precision = {name: bits for name, _ in linears(model) if "contract" not in name}
    plan = LitePlan(LiteConfig(SCHEDULE, precision, fingerprint=fingerprint(model)), keys=picked())
    plain_size = (model.save(tmp_path / "plain") / "model.safetensors").stat().st_size
    compress(model, plan)
    images = model.generate([0, 3], 2, 3)
    folder = model.save(tmp_path / "lite")
    assert (folder / "model.safetensors").stat().st_size < plain_size
    again = nextscale.load(folder)
    assert isinstance(again, LiteModel) and torch.equal(again.generate([0, 3], 2, 3), images)
    half = nextscale.load(folder, dtype="bfloat16")
    assert {b.dtype for n, b in half.named_buffers() if "packed_" in n} == {torch.bfloat16}
    assert half.generate([0, 3], 2, 3).shape == images.shape
    (tmp_path / "lite" / "lite" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        nextscale.load(folder)
    with pytest.raises(ValueError, match="packed weights have no place in the official layout"):
        model.to_official()


def test_plans_are_files_and_belong_to_a_model(model: VAR, tiny: SimpleNamespace, tmp_path: Path) -> None:
    plan = LitePlan(LiteConfig(SCHEDULE, {"head.linear": 4}, fingerprint=fingerprint(model)), narrow())
    again = LitePlan.load(plan.save(tmp_path / "plan"))
    assert again.config == plan.config and again.widths is not None and torch.equal(again.widths, narrow())
    model.save(tmp_path / "model")
    for source, dtype in ((tmp_path / "model", "float32"), (tmp_path / "model", "bfloat16")):
        assert isinstance(nextscale.load(source, lite=tmp_path / "plan", dtype=dtype), LiteModel)
    assert fingerprint(nextscale.load(tmp_path / "model", dtype="bfloat16")) == fingerprint(model)
    with pytest.raises(ValueError, match="holds a saved 'var', expected the plan"):
        LitePlan.load(tmp_path / "model")
    other = tiny.var(tiny.tokenizer(schedule=SCHEDULE), width=32, heads=4, seed=1)
    with pytest.raises(ValueError, match="the plan was made for another model"):
        compress(other, plan)
    with pytest.raises(ValueError, match="windows for 2 blocks of 2 heads, the model has 2 of 4"):
        compress(other, LitePlan(LiteConfig(SCHEDULE), narrow(2)))
    with pytest.raises(ValueError, match="compressed already"):
        compress(compress(model, plan), plan)
    with pytest.raises(ValueError, match="has 0 next-scale transformers"):
        compress(model.tokenizer, plan)
    windows = compress(other, LitePlan(replace(PLAIN, schedule=ScaleSchedule.squares(1, 2, 3)), None))
    assert windows.generate(0).shape == (1, 3, 12, 12)


def test_windows_of_other_scales_are_refused(model: VAR) -> None:
    schedule = ScaleSchedule.squares(1, 2, 3, 6)
    compress(model, LitePlan(replace(PLAIN, schedule=schedule), narrow()))
    with pytest.raises(
        ValueError, match="windows belong to the scales '1 2 3 6', none of which has the positions 5 to 21"
    ):
        model.generate(0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("cache_bits", 4, "cache_bits is 4"), ("form", "other", "form is 'other'"), ("precision", {"a": 3}, "a: 3 bits")],
)
def test_plans_that_mean_nothing(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LiteConfig(**{"schedule": SCHEDULE, field: value})  # type: ignore[arg-type]


def test_published_simulation(model: VAR, tiny: SimpleNamespace) -> None:
    images = model.generate([0, 1], 2)
    for setting in PUBLISHED.values():
        simulated = simulate(copy(model, tiny), setting, LitePlan(replace(PLAIN, share_from=0), narrow()))
        kept = [name for name, _ in linears(simulated)]
        assert len(kept) == (2 if setting.keep else 0)
        assert simulated.generate([0, 1], 2).shape == images.shape
    gentle = simulate(copy(model, tiny), replace(PUBLISHED[1], weight=16, activation=16, attention=16))
    assert (gentle.generate([0, 1], 2) - images).abs().mean() < 0.02


# --- calibration --------------------------------------------------------------------------------------


def test_calibration_saves_what_is_asked(model: VAR) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[tuple[int, int]] = []
    settings = Calibration(images=6, batch_size=4, saving=0.6, weight_bits=4, tolerance=1e-4, share=True)
    plan = calibrate(model, settings, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == len(seen)
    assert type(model) is VAR and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert plan.config.share_from == 2 and plan.config.fingerprint == fingerprint(model)
    assert {bits for name, bits in plan.config.precision.items() if "contract" in name} == {16}
    found = plan.config.measured["divergence"]
    for name, bits in plan.config.precision.items():
        tried = {int(b): value for b, value in found.get(name, {}).items()}
        assert bits == next((b for b in sorted(tried) if tried[b] <= 1e-4), 16)
    again = calibrate(model, settings)
    assert again.config == plan.config and again.keys is not None and plan.keys is not None
    assert all(torch.equal(again.keys[index], plan.keys[index]) for index in (2, 3))
    compress(model, plan)
    model.generate([0, 1], 2)
    work = model.attention_work
    assert work.saved == pytest.approx(plan.config.measured["attention_saved"], abs=1e-9) and work.saved >= 0.6


def seen_attention(model: VAR) -> tuple[dict[int, torch.Tensor], dict[tuple[int, int], torch.Tensor]]:
    """Of four pictures: in tiles of the late scales, and by bands."""
    run = draw_recorded(model, 4, 0)
    assert run.branches == 2 and [len(w) for w in run.weights] == [2] * 4
    tiles, bands = dict[int, list[torch.Tensor]](), dict[tuple[int, int], list[torch.Tensor]]()

    def see(seen: Seen) -> None:
        assert seen.shared is None and seen.value.shape == seen.key.shape
        attention = seen.weights().mean(0)
        tiles.setdefault(seen.index, []).append(tile_attention(attention, SCHEDULE, seen.index))
        for j, part in enumerate(band_attention(attention, SCHEDULE, seen.index)):
            bands.setdefault((seen.index, j), []).append(part)

    run.watch(model, see)
    stacked = {place: torch.stack(parts) for place, parts in bands.items()}
    return {index: torch.stack(tiles[index]) for index in late_scales(SCHEDULE)}, stacked


def test_windows_for_less_work_keep_less(model: VAR) -> None:
    attention, bands = seen_attention(model)
    for index, tiles in attention.items():
        torch.testing.assert_close(tiles.sum(-1), torch.ones(tiles.shape[:3]), rtol=1e-4, atol=1e-4)
        parts = [bands[index, j].sum(-1) for j in range(index + 1)]
        torch.testing.assert_close(sum(parts), torch.ones(2, 4), rtol=1e-4, atol=1e-4)
    kept = []
    for share in (0.9, 0.6, 0.3):
        keys = best_keys(attention, SCHEDULE, share)
        summed = {index: part * tile_size(SCHEDULE, index) for index, part in attention.items()}
        kept.append(kept_attention(summed, keys, SCHEDULE))
        saved = attention_saved(LitePlan(PLAIN, keys=keys), 2)
        assert 1 - share <= saved < 1 - 0.8 * share
    assert 1 > kept[0] > kept[1] > kept[2] > 0.3
    widths = [published_windows(bands, SCHEDULE, threshold) for threshold in (0.95, 0.5)]
    assert (widths[0] >= widths[1]).all() and (widths[1] < widths[0]).any() and (widths[0][:, :, :2] == ALL).all()
    assert scores_left(0.75, 2) == pytest.approx(1 / 3) and scores_left(0.6, 1, 0.1) == pytest.approx(0.4)
    with pytest.raises(ValueError, match=r"1\.0% of the scores were to be computed, but the small scales"):
        best_keys(attention, SCHEDULE, 0.01)
    with pytest.raises(ValueError, match="threshold is 2"):
        published_windows(bands, SCHEDULE, 2)


def test_stand_ins_change_what_is_drawn_from_less_than_strongest_keys(model: VAR) -> None:
    """For the same work: keys by attention alone, those of the plan without and with what stands in for the others."""
    with torch.no_grad():
        for block in model.transformer.blocks:
            block.attention.qkv.weight.mul_(4)
    share, run = 0.3, draw_recorded(model, 8, 100)
    plan = calibrate(model, Calibration(images=16, saving=1 - share, weight_bits=16, cache_bits=16, tile=2))
    attention, _ = seen_attention(model)
    strongest = LitePlan(replace(PLAIN, tile=None), keys=best_keys(attention, SCHEDULE, share))
    before, changes = run.log_probabilities(), []
    for each in (strongest, replace(plan, bias=None, offsets=None), plan):
        with attention_compressed(model, each):
            changes.append(sum(divergences(before, run.log_probabilities())))
    assert changes[2] < 0.7 * changes[1] < changes[0] and type(model) is VAR
    # On the pictures of the calibration, what the heads of the first block take is right on average.
    assert plan.offsets is not None and plan.bias is not None
    assert plan.offsets[3].shape == (2, 4, 36, 8) and (plan.bias[3] != 0).float().mean() > 0.1


def test_smaller_tiles_lose_less_for_the_same_work(model: VAR, tmp_path: Path) -> None:
    plans = [calibrate(model, Calibration(images=4, saving=0.6, tile=tile)) for tile in (8, 1)]
    changes = [plan.config.measured["attention_divergence"] for plan in plans]
    assert changes[1] < changes[0]
    assert all(0.6 <= plan.config.measured["attention_saved"] < 0.66 for plan in plans)
    again = LitePlan.load(plans[1].save(tmp_path / "plan"))
    assert again.config.tile == 1 and again.keys is not None and plans[1].keys is not None
    assert torch.equal(again.keys[3], plans[1].keys[3]) and again.keys[3].shape[2] == 36
    for name in ("bias", "offsets"):
        found, expected = getattr(again, name), getattr(plans[1], name)
        assert found.keys() == expected.keys() and all(torch.equal(found[i], expected[i]) for i in found)
    before = model.generate([1], 1)
    assert compress(model, again).generate([1], 1).shape == before.shape
    with pytest.raises(ValueError, match="tiles of 0 queries"):
        Calibration(tile=0)


def test_calibration_by_the_published_rule_and_without_windows(model: VAR, tiny: SimpleNamespace) -> None:
    plan = calibrate(model, Calibration(images=2, rule="mass", weight_bits=16))
    assert plan.widths is not None and plan.config.share_from is None and set(plan.config.precision.values()) == {16}
    plan = calibrate(model, Calibration(images=2, rule="none", share=True))
    assert plan.sizes is None and plan.config.measured["attention_saved"] == pytest.approx(0.25, abs=0.01)
    for wrong in ({"images": 0}, {"rule": "best"}, {"weight_bits": 5}, {"saving": 1.0}):
        with pytest.raises(ValueError):
            Calibration(**wrong)  # type: ignore[arg-type]


def test_flexvar_too(tiny: SimpleNamespace) -> None:
    """Nothing here is VAR's own."""
    flex = tiny.flexvar()
    plan = calibrate(flex, Calibration(images=2, saving=0.3))
    before = flex.generate([0, 1], 2)
    lite = compress(flex, plan)
    assert lite.generate([0, 1], 2).shape == before.shape and lite.attention_work.saved > 0.2


def test_parts_of_a_pair(model: VAR, tiny: SimpleNamespace) -> None:
    """Each model of a CoDe for itself, over the scales that it runs."""
    other = copy(model, tiny)
    pair = CoDe([model, other], [3])
    images = pair.generate([0, 1], 2)
    with pytest.raises(ValueError, match="has 2 next-scale transformers: compress its parts one by one"):
        compress(pair, LitePlan(PLAIN))
    for part in (model, other):
        compress(part, LitePlan(replace(PLAIN, share_from=2), keys=picked()))
    assert pair.generate([0, 1], 2).shape == images.shape
    assert min(part.attention_work.saved for part in (model, other)) > 0.3  # type: ignore[attr-defined]
