"""FlowAR: drawing by flow matching, what is computed once and what not at all, files both ways, training."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import nextscale
from nextscale.cli import main
from nextscale.cli.train import load_initial, recipe_parser
from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.checkpoint import CheckpointError
from nextscale.core.random import BatchDraws, ImageDraws
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingConfig
from nextscale.datasets.images import open_images
from nextscale.tasks.generation.flowar import FlowAR, is_official
from nextscale.tasks.generation.flowar_config import PRESETS, FlowARConfig
from nextscale.tasks.generation.flowar_flow import CrossFlowBlock, FlowConfig, FlowNetwork, euler_times
from nextscale.tasks.generation.flowar_recipe import FlowARRecipe
from nextscale.tasks.generation.flowar_training import initialize
from nextscale.tasks.generation.flowar_transformer import rotation_of
from nextscale.tasks.tokenizers.kl_autoencoder import KLAutoencoder, KLConfig
from nextscale.tasks.tokenizers.tokenize import write_tokens

SCHEDULE = ScaleSchedule.squares(1, 2, 4)
NAMES = ("tench", "fox", "hare", "owl", "boat")


def autoencoder() -> KLAutoencoder:
    torch.manual_seed(0)
    return KLAutoencoder(KLConfig(AutoencoderConfig(32, (1, 1), 1, 4), schedule=SCHEDULE, latent_scale=0.5)).eval()


def build(tiny: SimpleNamespace, flow: dict[str, Any] | None = None, **options: Any) -> FlowAR:
    sizes = FlowConfig(**{"width": 64, "depth": 1, **(flow or {})})
    config = FlowARConfig.of_depth(16, 1, 2, sizes, classes=5, channels=4, schedule=SCHEDULE, class_names=NAMES)
    config = replace(config, ode_steps=4, **options)
    model = initialize(FlowAR(config, autoencoder()))
    for part in (model.encoder, model.decoder, model.flow, model.class_embedding):
        tiny.scattered(part, 1, std=0.2)
    return model.eval()


@pytest.fixture(scope="module", params=["plain", "cross"])
def model(request: pytest.FixtureRequest, tiny: SimpleNamespace) -> FlowAR:
    return build(tiny, {"cross": request.param == "cross"})


# --- the network --------------------------------------------------------------------------------------


def test_stepping_is_teacher_forcing(tiny: SimpleNamespace) -> None:
    """Also where the first scales are run in one pass, and with one modulation for all blocks."""
    model = build(tiny)
    blocks = replace(model.config.encoder, conditioning="shared", heads=4)
    shared = initialize(FlowAR(replace(model.config, encoder=blocks), autoencoder())).eval()
    for each in (model, shared):
        pyramid, labels = each.tokenizer.quantizer, torch.tensor([1, 5])
        with torch.inference_mode():
            latents = torch.cat(pyramid.encode(torch.randn(2, 4, 4, 4), SCHEDULE)[0], dim=1)
            inputs = pyramid.teacher_inputs(latents, SCHEDULE)
            at_once = each.conditioning(inputs, labels)
            session, total, steps = each.start(labels, SCHEDULE), pyramid.begin(2, SCHEDULE), []
            for k, part in enumerate(SCHEDULE.split(latents)):
                steps.append(session.step(k, pyramid.next_input(total, SCHEDULE, k) if k else None))
                total = pyramid.advance(total, part, SCHEDULE, k)
            together = each.start(labels, SCHEDULE).step(2, inputs, first=0)
        torch.testing.assert_close(torch.cat(steps, 1), at_once, rtol=0, atol=1e-5)
        torch.testing.assert_close(together, at_once, rtol=0, atol=1e-5)
        assert all(cache.filled(0) == SCHEDULE.length for cache in session.caches)


def test_published_sizes() -> None:
    counts = {"flowar-small": 171_718_072, "flowar-large": 586_862_912, "flowar-huge": 1_913_316_880}
    for name, config in PRESETS.items():
        with torch.device("meta"):
            made = FlowAR(config, KLAutoencoder())
        own = (p.numel() for n, p in made.named_parameters() if not n.startswith("tokenizer."))
        assert sum(own) == counts.pop(name)
    assert not counts


def test_times() -> None:
    points = euler_times(25)
    assert len(points) == 25 and points[11] == 0.3 and points[12] == 0.25
    for steps in (1, 2, 3, 7, 24, 26, 50):
        points = euler_times(steps)
        assert len(points) == steps + 1 and points[0] == 1 and points[-1] == 0 and (points.diff() < 0).all()
    torch.testing.assert_close(euler_times(50).diff(), torch.full((50,), -0.02, dtype=torch.float64))
    with pytest.raises(ValueError, match="0 steps were asked for"):
        euler_times(0)
    published, exact = (FlowNetwork(FlowConfig(64, 1, truncate_time=each), 4, 16) for each in (True, False))
    assert published.fed(torch.tensor([0.9999])).tolist() == [999]
    assert exact.fed(torch.tensor([0.9999])).item() == pytest.approx(999.9)


# --- drawing ------------------------------------------------------------------------------------------


def test_an_image_is_the_same_alone_and_in_any_batch(model: FlowAR) -> None:
    whole = model.generate(["fox", 2, "owl"], seed=4, batch_size=2)
    assert whole.shape == (3, 3, 8, 8)
    torch.testing.assert_close(whole[1:2], model.generate(2, seed=5), rtol=0, atol=1e-5)
    assert not torch.allclose(whole[1:2], model.generate(2, seed=6), atol=1e-2)


def test_the_solution_is_the_official_samplers(model: FlowAR) -> None:
    """Written out after the published code: both halves solved side by side, guidance from the bound on."""
    labels, bound, strength = torch.tensor([1, 3]), 0.5, 3.0
    draws, noise = BatchDraws(torch.Generator().manual_seed(3)), torch.Generator().manual_seed(3)
    options: dict[str, Any] = {"guidance": strength, "guidance_bound": bound, "ode_steps": 6}
    steps = list(model.steps(labels, draws=draws, **options))
    times, flow, total = euler_times(6).tolist(), model.flow, None
    session = model.start(torch.cat((labels, torch.tensor([5, 5]))), SCHEDULE)
    with torch.inference_mode():
        for index, step in enumerate(steps):
            inputs = None if total is None else model.tokenizer.quantizer.next_input(total, SCHEDULE, index)
            hidden = session.step(index, inputs)
            x = torch.randn(4, SCHEDULE.lengths[index], 4, generator=noise).double()
            start, stop = SCHEDULE.ranges[index]
            rotation = rotation_of(SCHEDULE, model.config.flow.blocks.head_size, torch.device("cpu"))[start:stop]
            weight, given = 1 + strength * SCHEDULE.ratio(index), flow.condition(hidden, rotation)
            for now, then in pairwise(times):
                guided = weight > 1 and now <= bound
                x = x[:2].repeat(2, 1, 1) if guided else x
                velocity = flow(x.float(), flow.at(torch.full((4,), now)), given, rotation).double()
                if guided:
                    own, other = velocity.chunk(2)
                    velocity = (other + weight * (own - other)).repeat(2, 1, 1)
                x = x + (then - now) * velocity
            torch.testing.assert_close(step.codes, x[:2].float(), rtol=0, atol=1e-4)
            total = step.total
    assert steps[-1].total.shape == (2, 4, 4, 4)


def test_what_is_computed(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values once per scale, times once per run, the other branch only where it is used."""
    model = build(tiny, {"cross": True})
    rows: list[int] = []
    remembered: list[int] = []
    timed: list[int] = []
    forward, remember, at = FlowNetwork.forward, CrossFlowBlock.remember, FlowNetwork.at
    monkeypatch.setattr(FlowNetwork, "forward", lambda s, x, *a: rows.append(len(x)) or forward(s, x, *a))
    monkeypatch.setattr(CrossFlowBlock, "remember", lambda s, z, r: remembered.append(len(z)) or remember(s, z, r))
    monkeypatch.setattr(FlowNetwork, "at", lambda s, t: timed.append(len(t)) or at(s, t))
    list(model.steps(torch.tensor([1, 2]), draws=ImageDraws([0, 1]), guidance=2.0, guidance_bound=0.25))
    # 4 steps, at 1, 0.3, 0.25 and 0.125: the first scale is never guided, the others at the last two.
    assert rows == [2] * 4 + [2, 2, 4, 4] * 2 and remembered == [2, 4, 4] and timed == [4]
    rows.clear(), remembered.clear()
    for strength in (0.0, -0.5):
        session = list(model.steps(torch.tensor([1]), draws=ImageDraws([0]), guidance=strength))
    assert set(rows) == {1} and set(remembered) == {1} and len(session) == 3


def test_guidance_of_nothing_is_the_class_alone(model: FlowAR) -> None:
    plain = model.generate("hare", guidance=0.0)
    torch.testing.assert_close(plain, model.generate("hare", guidance=1e-9), rtol=0, atol=1e-4)
    assert not torch.allclose(plain, model.generate("hare", guidance=4.0), atol=1e-2)
    official = model.generate([1, 2], official_draws=True, guidance=0.0)
    assert official.shape == (2, 3, 8, 8)


def test_what_does_not_suit_is_refused(tiny: SimpleNamespace) -> None:
    model = build(tiny)
    with pytest.raises(ValueError, match="top_k, smooth: FlowAR draws continuous values, not codes"):
        model.generate(1, top_k=5, smooth=True)
    with pytest.raises(ValueError, match="guidance_bound is 2; expected a time from 0 to 1"):
        model.generate(1, guidance_bound=2)
    with pytest.raises(ValueError, match="latents of 4 channels, the autoencoder of 8"):
        FlowAR(model.config, KLAutoencoder(KLConfig(AutoencoderConfig(32, (1,), 1, 8))))
    with pytest.raises(ValueError, match="begin with 4 tokens; expected 1"):
        replace(model.config, schedule=ScaleSchedule.squares(2, 4))
    with pytest.raises(ValueError, match="is a dot product"):
        replace(model.config.encoder, attention="cosine")


# --- files --------------------------------------------------------------------------------------------


def test_official_files_both_ways(tiny: SimpleNamespace, tmp_path: Path) -> None:
    for cross in (False, True):
        model = build(tiny, {"cross": cross, "truncate_time": True})
        state = model.to_official()
        assert state["mask"].shape == (1, 1, 21, 21) and state["mask"][0, 0, 0, 1] == -torch.inf
        assert state["encoder_blocks.0.attn.rope.freqs"].shape == (2,)
        other = {name: torch.zeros_like(value) for name, value in state.items()}
        checkpoint = {"model": other, "model_ema": state, "optimizer": {}, "epoch": 3, "scaler": {}}
        assert is_official(state) and is_official(checkpoint) and not is_official({"model": {}})
        for content in (state, checkpoint):
            loaded = nextscale.load(content, device="cpu", tokenizer=model.tokenizer, ode_steps=4, guidance=1.5)
            assert isinstance(loaded, FlowAR)
            again = loaded.to_official()
            assert set(again) == set(state) and all(torch.equal(again[name], state[name]) for name in state)
            assert loaded.config == replace(model.config, class_names=None)
            torch.testing.assert_close(loaded.generate(3, seed=1), model.generate(3, seed=1), rtol=0, atol=0)
        bare = {name: value for name, value in state.items() if not name.endswith("freqs")}
        with pytest.raises(CheckpointError, match="number of heads: give heads"):
            FlowAR.from_official(bare, model.tokenizer)
        assert FlowAR.from_official(bare, model.tokenizer, heads=2).config.encoder.heads == 2
        del bare["mask"]
        with pytest.raises(CheckpointError, match="21 positions, which is no published list"):
            FlowAR.from_official(bare, model.tokenizer, heads=2)
        saved = nextscale.load(model.save(tmp_path / str(cross)), device="cpu")
        assert saved.config == model.config and torch.equal(saved.generate(2), model.generate(2))
    shared = replace(model.config, encoder=replace(model.config.encoder, conditioning="shared"))
    with pytest.raises(ValueError, match="no modulation that blocks share"):
        FlowAR(shared, autoencoder()).to_official()


def test_command_line(tiny: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = build(tiny), tmp_path / "out"
    place = str(model.save(tmp_path / "model"))
    words = ["generate", place, "--classes", "fox", "--num", "2", "--steps", "3", "--guidance-bound", "0.5"]
    assert main([*words, "--guidance", "2", "--tokens", "--animate", "--out", str(out), "--device", "cpu"]) == 0
    record = json.loads((out / "generate.json").read_text())
    assert record["settings"]["ode_steps"] == 3 and record["settings"]["guidance_bound"] == 0.5
    assert np.load(out / "tokens.npz")["tokens"].shape == (2, 21, 4)
    assert main(["generate", place, "--scales", "1 2", "--out", str(out)]) == 2
    assert main(["convert", place, str(tmp_path / "official"), "--to", "official"]) == 0
    back = nextscale.load(tmp_path / "official" / model.official_name, device="cpu", latent_scale=None)
    assert isinstance(back.tokenizer, KLAutoencoder)
    assert "latents times 0.5, where it has 0.2325" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "official" / model.official_name)]) == 0
    own = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("tokenizer."))
    assert f"({own:,})" in capsys.readouterr().out


# --- training -----------------------------------------------------------------------------------------


def test_the_loss_falls_and_runs_end_in_a_model(tiny: SimpleNamespace, tmp_path: Path) -> None:
    place = str(autoencoder().save(tmp_path / "kl"))
    images = tiny.images(tmp_path / "images")
    data = open_images(str(images), size=8, crop="center", resize_ratio=1.0)
    tokens = write_tokens(autoencoder(), data, tmp_path / "tokens", mirrored=True)
    config = TrainingConfig(
        output=str(tmp_path / "run"), epochs=12, batch_size=8, learning_rate=0.1, warmup_epochs=0, average=0.5
    )
    flow = FlowConfig(64, 1)
    recipe = FlowARRecipe(
        tokenizer=place, tokens=str(tokens), validation_tokens=str(tokens), training=config, width=16, depth=1, heads=2,
        conditioning="shared", flow=flow, ode_steps=2,
    )  # fmt: skip
    run = recipe.trainer(load_initial)
    run.run()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"squared/scale0", "squared/scale2"} <= set(log[-2]) and "validation/loss" in log[-1]
    task: Any = run.task
    batch = {**data.fetch(range(8)), "uniform": torch.ones(8)}
    fresh = recipe.build(recipe.open(), load_initial)
    assert task.evaluate(batch)["loss"] < fresh.training_task().evaluate(batch)["loss"]  # type: ignore[attr-defined]
    model = nextscale.load(recipe.finish(run), device="cpu")
    assert isinstance(model, FlowAR) and model.config.ode_steps == 2 and not model.config.flow.truncate_time
    assert model.generate("cat", n=2).shape == (2, 3, 8, 8)
    loss, _ = model.loss({key: batch[key] for key in ("image", "label")})
    assert loss.item() > 0
    again = replace(recipe, init=str(tmp_path / "run" / "model"), tokenizer=None).build(recipe.open(), load_initial)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_dropout_and_half_precision(tiny: SimpleNamespace) -> None:
    model = build(tiny, {"cross": True}).train()
    assert model.config.encoder.attention_dropout == 0.1
    batch = {"image": torch.rand(4, 3, 8, 8) * 2 - 1, "label": torch.arange(4), "uniform": torch.tensor([0.0, 1, 1, 1])}
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.loss(batch)
    loss.backward()
    trained = [p for n, p in model.named_parameters() if not n.startswith("tokenizer.")]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert model.class_embedding.weight.grad is not None and model.class_embedding.weight.grad[5].any()
    half = build(tiny).to(torch.bfloat16)
    assert half.generate(1).isfinite().all()


def test_wrong_tokenizers_are_named(tiny: SimpleNamespace, tmp_path: Path) -> None:
    place = str(tiny.tokenizer().save(tmp_path / "vq"))
    recipe = FlowARRecipe(tokenizer=place, tokens="somewhere")
    with pytest.raises(ValueError, match="has a ResidualVQ; FlowAR needs continuous latents"):
        recipe.build(SimpleNamespace(num_classes=2, classes=None, labels=np.arange(2)), load_initial)
    with pytest.raises(ValueError, match="a FlowAR needs a tokenizer"):
        FlowARRecipe(tokens="somewhere")


def test_the_shipped_recipe_is_read() -> None:
    path = Path(nextscale.__file__).parent / "recipes" / "flowar-cifar10.yaml"
    options = recipe_parser("flowar").parse_args(["--config", str(path)])
    assert options.width == 160 and options.flow.width == 128
