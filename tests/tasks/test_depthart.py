"""DepthART: any photo in, the same scale by scale as at once, learning from its own mistakes, official files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nextscale
from nextscale.core.checkpoint import CheckpointError
from nextscale.core.random import BatchDraws, ImageDraws
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import TransformerConfig
from nextscale.tasks.depth.depthart import PRESETS, DepthART, DepthARTConfig
from nextscale.tasks.depth.depthart_normalizer import DepthNormalizer
from nextscale.tasks.depth.depthart_sampling import GREEDY, AveragedEmitter
from nextscale.tasks.depth.depthart_training import DepthARTLoss, DepthARTTraining, refine
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ


@pytest.fixture
def build(tiny):
    def make(schedule=None, **options):
        tokenizer = tiny.tokenizer(**({} if schedule is None else {"schedule": schedule}))
        codes = tokenizer.config.quantizer
        config = DepthARTConfig(
            TransformerConfig(64, 2, 1, attention="dot"),
            vocabulary=codes.vocabulary,
            code_channels=codes.channels,
            schedule=tokenizer.config.schedule,
            **options,
        )
        model = DepthART(config, tokenizer)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if not name.startswith("tokenizer."):
                torch.nn.init.normal_(parameter, std=0.1)
        return model.eval()

    return make


@pytest.fixture
def batch():
    torch.manual_seed(2)
    depth = torch.rand(3, 1, 8, 8) * 4 + 1
    return {"image": torch.rand(3, 3, 8, 8) * 2 - 1, "depth": depth, "valid": torch.rand(3, 1, 8, 8) > 0.2}


# --- the network --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [None, ScaleSchedule.squares(2, 3, 4)])
def test_scale_by_scale_is_what_teacher_forcing_gives_at_once(build, batch, schedule):
    model = build(schedule)
    photo = model.pyramid(batch["image"])
    steps = list(model.steps(photo, draws=ImageDraws([0] * 3), emitter=GREEDY))
    tokens = torch.cat([step.tokens[..., 0] for step in steps], dim=1)
    inputs = model.tokenizer.quantizer.teacher_inputs(tokens, model.config.schedule)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([step.logits for step in steps], dim=1), model(photo, inputs))


def test_the_released_baseline_leaves_the_start_position_out_of_training_alone(build, batch):
    model = build(training="plain", published_start=True)
    photo = model.pyramid(batch["image"])
    step = next(model.steps(photo, draws=ImageDraws([0] * 3), emitter=GREEDY))
    inputs = torch.zeros(3, model.config.schedule.length - 1, model.config.code_channels)
    with torch.no_grad():
        assert not torch.allclose(step.logits, model(photo, inputs)[:, :1])
        model.start_position.zero_()
        torch.testing.assert_close(
            next(model.steps(photo, draws=ImageDraws([0] * 3), emitter=GREEDY)).logits, model(photo, inputs)[:, :1]
        )


def test_several_scales_in_one_pass(build, batch):
    model = build()
    photo, schedule = model.pyramid(batch["image"]), model.config.schedule
    steps = list(model.steps(photo, draws=ImageDraws([0] * 3), emitter=GREEDY))
    quantizer = model.tokenizer.quantizer
    inputs = torch.cat([quantizer.next_input(steps[i].total, schedule, i + 1) for i in range(2)], dim=1)
    session = model.start(photo, schedule)
    with torch.no_grad():
        hidden = session.step(2, inputs, first=0)
        assert hidden.shape[1] == schedule.length
        torch.testing.assert_close(session.logits(hidden, slice(None))[:, -16:], steps[-1].logits)


# --- prediction ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(30, 50), (7, 5), (8, 8)])
def test_depth_has_the_photos_size_and_range(build, size):
    found = build().predict(torch.rand(3, *size))
    assert found.depth.shape == size and found.unit == "relative" and found.depth.dtype == torch.float32
    assert found.depth.min() >= 0 and found.depth.max() <= 1


def test_a_photo_gets_the_same_depth_alone_and_in_any_batch(build):
    model, photos = build(), torch.rand(3, 3, 12, 10)
    together = model.predict(photos, seed=5, batch_size=3)
    for i in range(3):
        torch.testing.assert_close(model.predict(photos[i], seed=5 + i).depth, together[i].depth)
    assert not torch.equal(model.predict(photos[0], seed=9).depth, together[0].depth)


def test_a_mirrored_photo_counts_as_much(build):
    model, photo = build(pick="expected"), torch.rand(3, 8, 8)
    plain, mirrored = model.predict(photo).depth, model.predict(photo.flip(-1)).depth.flip(-1)
    torch.testing.assert_close(model.predict(photo, flip=True).depth, (plain + mirrored) / 2)
    done = []
    model.predict(photo, flip=True, progress=lambda *now: done.append(now))
    assert done == [(i + 1, 6) for i in range(6)]


def test_what_is_expected_is_what_many_draws_average_to(build, batch):
    model = build(top_k=5, top_p=0.8)
    photo = model.pyramid(batch["image"])
    means = {}
    for pick in ("drawn", "expected"):
        emitter = model.emitter(20_000, pick)
        means[pick] = next(model.steps(photo, draws=BatchDraws(torch.Generator().manual_seed(0)), emitter=emitter))
    torch.testing.assert_close(means["drawn"].codes, means["expected"].codes, atol=0.03, rtol=0)
    assert means["drawn"].tokens.shape == (3, 1, 20_000)


@pytest.mark.parametrize(
    ("image", "options", "said"),
    [
        (torch.zeros(1, 8, 8), {}, "shape"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), {}, "255"),
        (torch.full((3, 8, 8), 2.0), {}, "0, 1"),
        (torch.full((3, 8, 8), float("nan")), {}, "0, 1"),
        (torch.zeros(3, 8, 8), {"n": 0}, "n is 0"),
        (torch.zeros(3, 8, 8), {"guidance": 2.0}, "guidance"),
        (torch.zeros(3, 8, 8), {"pick": "best"}, "best"),
        (torch.zeros(3, 8, 8), {"n": 17, "pick": "likeliest"}, "vocabulary"),
    ],
)
def test_what_makes_no_sense_is_refused(build, image, options, said):
    with pytest.raises(ValueError, match=said):
        build().predict(image, **options)


# --- training -----------------------------------------------------------------------------------------


def test_refined_targets_are_what_is_left_to_say(build, batch):
    """Where the model is right, they are the true tokens; where it is not, they make up for it."""
    model, quantizer = build(), build().tokenizer.quantizer
    schedule = model.config.schedule
    photo, latent = model.pyramid(batch["image"]), model.depth_features(batch["depth"] / 5)
    refined = refine(model, photo, latent, len(schedule))
    total = quantizer.begin(3, schedule)
    for index, step in enumerate(model.steps(photo, draws=ImageDraws([0] * 3), emitter=GREEDY)):
        start, stop = schedule.ranges[index]
        rest = quantizer.shrink(latent - total, schedule, index)
        distance = torch.cdist(rest.flatten(2).mT, quantizer.vectors.expand(3, -1, -1))
        assert torch.equal(distance.argmin(-1), refined.targets[:, start:stop])
        total = step.total
    torch.testing.assert_close(refined.total, total)
    assert torch.equal(refined.targets[:, :1], torch.cat(quantizer.encode(latent, schedule)[0], 1)[:, :1])


def test_gradients_are_those_of_a_pass_scale_by_scale(build, batch):
    """The roll-out without gradients and one pass over its inputs: as through a roll-out whose inputs are cut off."""
    model = build()
    task = DepthARTTraining(model, DepthARTLoss(noise=False))
    photo, latent = model.pyramid(batch["image"]), model.depth_features(batch["depth"] / 5)
    terms = task.terms(model, photo, latent)
    terms.loss.backward()
    assert terms.logits.shape[1] == 5 and terms.latent > 0
    refined = refine(model, photo, latent, 2)
    logits = model(photo, refined.inputs)
    picked = logits[:, :5].log_softmax(-1).gather(-1, refined.targets[..., None]).mean()
    torch.testing.assert_close(terms.cross_entropy, -picked)
    frozen = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert frozen and all(name.startswith("tokenizer.") for name in frozen)


@pytest.mark.parametrize("training", ["refined", "plain"])
def test_it_learns(build, batch, training):
    model = build(training=training).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(15):
        loss, metrics = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(metrics["cross_entropy"]))
    assert losses[-1] < 0.85 * losses[0] and not model.tokenizer.training


def test_the_target_is_in_range_and_unknown_pixels_do_not_matter():
    depth, valid = torch.rand(2, 1, 6, 7) * 9 + 1, torch.ones(2, 1, 6, 7, dtype=torch.bool)
    how = DepthNormalizer()
    torch.testing.assert_close(how.target(depth), how.target(3 * depth))
    valid[:, :, 2, 3] = False
    wild = depth.clone()
    wild[~valid] = float("nan")
    found = how.target(wild, valid)
    assert found.abs().max() <= 1 and not found.isnan().any()
    torch.testing.assert_close(
        DepthNormalizer(kind="range").target(depth), DepthNormalizer(kind="range").target(depth + 5)
    )
    with pytest.raises(ValueError, match="no pixel"):
        how.target(depth, torch.zeros_like(valid))
    with pytest.raises(ValueError, match="no pixel"):
        how.normalize(depth, torch.zeros_like(valid))


@pytest.mark.parametrize("options", [{"quantile": 0.4}, {"kind": "log"}, {"alpha": 0}])
def test_normalizers_that_make_no_sense(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DepthNormalizer(**options)


@pytest.mark.parametrize("options", [{"pick": "any"}, {"samples": 0}])
def test_emitters_that_make_no_sense(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        AveragedEmitter(**options)


# --- files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"training": "plain", "published_start": True}, {"unused_scales": True}])
def test_official_files_in_both_directions(build, tmp_path, options):
    model = build(classes=4, **options)
    if "unused_scales" in options:
        model.config = replace(model.config, transformer=replace(model.config.transformer, attention_scale=1.0))
    official = model.to_official()
    torch.save(official, tmp_path / "depthart.pth")
    again = nextscale.load(tmp_path / "depthart.pth")
    assert isinstance(again, DepthART) and again.config.training == model.config.training
    assert again.config.schedule == model.config.schedule == again.tokenizer.config.schedule
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    back = again.to_official()
    assert list(back) == list(official) and all(torch.equal(back[name], official[name]) for name in official)
    assert ("attn_bias_for_masking" in official) == ("training" in options)


@pytest.mark.parametrize("dropped", ["vae_proxy.quantize.", "vae_quant_proxy."])
def test_safetensors_hold_one_of_two_names(build, dropped):
    model = build()
    official = {n: v for n, v in model.to_official().items() if not n.startswith(dropped)}
    again = DepthART.from_official(official)
    assert all(torch.equal(again.state_dict()[n], v) for n, v in model.state_dict().items())


def test_a_file_without_a_tokenizer_needs_one(build, tmp_path):
    model = build()
    official = {n: v for n, v in model.to_official().items() if not n.startswith("vae_proxy.")}
    with pytest.raises(CheckpointError, match="tokenizer"):
        DepthART.from_official(official)
    assert DepthART.from_official(official, tokenizer=model.tokenizer).tokenizer is model.tokenizer
    model.tokenizer.save(tmp_path / "tokenizer")
    made = DepthART.from_official(official, tokenizer=tmp_path / "tokenizer")
    assert torch.equal(made.tokenizer.quantizer.vectors, model.tokenizer.quantizer.vectors)


def test_cosine_attention_has_no_official_form(build):
    model = build()
    sizes = replace(model.config.transformer, attention="cosine")
    with pytest.raises(ValueError, match="cosine"):
        DepthART(replace(model.config, transformer=sizes), model.tokenizer).to_official()


def test_saved_and_loaded(build, tmp_path: Path):
    model = build(pick="expected")
    model.save(tmp_path / "model")
    again = nextscale.load(tmp_path / "model")
    photo = torch.rand(3, 9, 9)
    # Weights to the bit; what is computed from them may end in other digits, as memory of a file is aligned otherwise.
    assert again.config == model.config
    torch.testing.assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(again.predict(photo).depth, model.predict(photo).depth)


def test_published_sizes():
    for config in PRESETS.values():
        with torch.device("meta"):
            model = DepthART(config, ResidualVQ())
        own = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("tokenizer."))
        assert own == 310_283_264 and model.published_samples in (1, 5)


def test_codes_of_another_tokenizer_are_refused(build, tiny):
    with pytest.raises(ValueError, match="belong together"):
        DepthART(build().config, tiny.tokenizer(vocabulary=32))


def test_from_scenes_to_a_depth_model_on_the_command_line(tmp_path):
    """A tokenizer of photos and depth maps, then both objectives over its tokens."""
    from nextscale.cli import main

    scenes = str(tmp_path / "scenes")
    assert main(["prepare", "scenes", scenes, "--number", "6", "--size", "16x16", "--workers", "1"]) == 0
    sizes = ["--data.pairs.height", "16", "--data.pairs.width", "16", "--scales", "1 2 4"]
    sizes += ["--autoencoder.channels", "8", "--autoencoder.multipliers", "[1, 1, 1]", "--autoencoder.blocks", "1"]
    sizes += ["--autoencoder.latent_channels", "8", "--quantizer.channels", "8", "--quantizer.vocabulary", "16"]
    sizes += ["--autoencoder.norm_groups", "4"]
    steps = ["--training.epochs", "1", "--training.batch_size", "3"]
    data = ["--data.pairs.source", scenes, "--data.pairs.validation", scenes]
    tokenizer = str(tmp_path / "tokenizer")
    assert main(["train", "depth-tokenizer", *data, *sizes, *steps, "--training.output", tokenizer]) == 0
    assert (tmp_path / "tokenizer" / "samples" / "step-00000004.png").is_file()

    data = ["--data.source", scenes, "--data.validation", scenes, "--data.height", "16", "--data.width", "16"]
    for objective in ("refined", "plain"):
        run = str(tmp_path / objective)
        command = ["train", "depthart", *data, "--tokenizer", tokenizer, "--objective", objective, "--depth", "1"]
        assert main([*command, *steps, "--training.output", run]) == 0
        model = nextscale.load(run)
        assert model.config.training == objective
        found = model.predict(torch.rand(3, 20, 30), seed=0)
        assert found.unit == "relative" and found.depth.shape == (20, 30)
