"""VarFormer: sizes, forms, batches, any size, files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import nextscale
from nextscale.core.checkpoint import CheckpointError
from nextscale.core.schedule import ScaleSchedule
from nextscale.datasets.degradations import degrade, parse_steps
from nextscale.datasets.restoration import squeezed
from nextscale.demo_tasks import photographs
from nextscale.systems import SYSTEMS
from nextscale.tasks.restoration.tiling import TileStore
from nextscale.tasks.restoration.varformer import PRESETS, VarFormer, VarFormerConfig
from nextscale.tasks.restoration.varformer_prior import unroll
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ

SMALL = {"steered": 1, "steering_heads": 4, "enhancement": 1, "decoder_blocks": 1}


def build(tiny, *, seed: int = 0, **options) -> VarFormer:
    """8 x 8 images; every weight counts, as in a trained model."""
    torch.manual_seed(seed)
    config = VarFormerConfig(**{**SMALL, "encoder_heads": 4, "window_groups": 1, **options})
    model = VarFormer(config, tiny.var())
    tiny.scattered(model, seed, 0.05)
    return model.eval()


@pytest.fixture(scope="module")
def fixed(tiny) -> VarFormer:
    return build(tiny)


@pytest.fixture(scope="module")
def published(tiny) -> VarFormer:
    return build(tiny, form="published", window_groups=2, adjust=True)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "millions"), [("varformer-d16", 908.2), ("varformer-d20", 1226.8), ("varformer-d20-stage1", 841.2)]
)
def test_published_sizes(name, millions):
    preset = PRESETS[name]
    model = VarFormer.empty(preset.config, preset.prior, preset.tokenizer)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert model.side == 256


def test_frozen_parts_take_no_gradient(fixed):
    frozen = {name for name, p in fixed.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in fixed.named_parameters() if n.startswith(("prior.tokenizer", "prior.transformer"))}
    assert not fixed.train().prior.training
    fixed.eval()


def test_roll_out_is_its_own_teacher_forcing_only_without_steering(tiny, images):
    # The exception to the library's invariant: steered blocks attend to one scale's hidden states only, which no
    # single pass over all scales gives. Without them the prior is a VAR of no class.
    model = build(tiny, steered=0)
    rolled = unroll(model, torch.zeros(3, 20, 4))
    schedule, quantizer = model.prior.config.schedule, model.tokenizer.quantizer
    labels = torch.full((3,), model.prior.config.classes)
    forced = model.prior(quantizer.teacher_inputs(rolled.tokens, schedule), labels)
    torch.testing.assert_close(rolled.logits, forced)
    torch.testing.assert_close(rolled.total, quantizer.decode(rolled.tokens, schedule)[-1])
    torch.testing.assert_close(rolled.prior.sum(1), rolled.total)


def test_gradients_change_nothing_in_the_roll_out(fixed, images):
    with torch.inference_mode():
        without = fixed(images * 2 - 1)
    torch.testing.assert_close(fixed(images * 2 - 1).pixels, without.pixels)


def test_fixed_form_is_the_same_in_any_batch(fixed, images):
    together = fixed.restore_squares(images)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], fixed.restore_squares(images[i : i + 1]), atol=1e-5, rtol=0)


def test_published_form_mixes_a_batch_but_restores_one_by_one(published, images):
    with torch.inference_mode():
        together, alone = published(images * 2 - 1), published(images[:1] * 2 - 1)
    assert (together.roll_out.logits[:1] - alone.roll_out.logits).abs().max() > 1e-3
    torch.testing.assert_close(published.restore_squares(images)[0], published.restore_squares(images[:1])[0])


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (3, 20), (21, 13)])
def test_any_size_and_no_seam(tiny, size):
    model = build(tiny)
    with torch.no_grad():
        model.decoder.input_share.fill_(1)  # what comes in goes out
    photo = torch.rand(3, *size)
    seen: list[tuple[int, int]] = []
    restored = model.restore(photo, overlap=3, batch=2, progress=lambda *at: seen.append(at))
    torch.testing.assert_close(restored, photo, atol=1e-6, rtol=0)
    assert seen[-1][0] == seen[-1][1] and restored.device.type == "cpu"


def test_a_flat_picture_is_restored_alike_everywhere(fixed):
    flat = fixed.restore(torch.full((3, 30, 30), 0.5), overlap=4)
    tile = fixed.restore(torch.full((1, 3, 8, 8), 0.5))[0]
    # Tiles see the same, so the picture repeats; where two overlap, it lies between what both say.
    torch.testing.assert_close(flat[:, :4, :4], tile[:, :4, :4])
    assert flat.amin() >= tile.amin() - 1e-6 and flat.amax() <= tile.amax() + 1e-6


def test_several_photos_and_what_is_refused(fixed, images):
    several = fixed.restore(torch.rand(2, 3, 9, 11))
    assert several.shape == (2, 3, 9, 11) and several.min() >= 0 and several.max() <= 1
    with pytest.raises(ValueError, match=r"\(1, 8, 8\), expected"):
        fixed.restore(images[0, :1])
    with pytest.raises(ValueError, match="divide by the largest value"):
        fixed.restore(torch.zeros(3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="`restore` takes any size"):
        fixed(torch.zeros(1, 3, 16, 16))


def test_without_the_prior_nothing_of_it_enters(tiny, images):
    model = build(tiny, with_prior=False, adjust=True)
    before = model.restore(images)
    with torch.no_grad():
        for parameter in model.prior.parameters():
            parameter.mul_(2)
    # The restoration network shares one convolution with the tokenizer, in both forms.
    model.tokenizer.quant_conv.load_state_dict({k: v / 2 for k, v in model.tokenizer.quant_conv.state_dict().items()})
    torch.testing.assert_close(model.restore(images), before)


def test_impossible_configurations(tiny):
    with pytest.raises(ValueError, match="a multiple of 4"):
        VarFormer(VarFormerConfig(**SMALL), tiny.var(tiny.tokenizer(schedule=ScaleSchedule.squares(1, 2, 3))))
    with pytest.raises(ValueError, match="the prior has 2"):
        VarFormer(VarFormerConfig(steered=3), tiny.var())
    with pytest.raises(ValueError, match="'published' or 'fixed'"):
        VarFormerConfig(form="right")
    with pytest.raises(ValueError, match="nothing to draw from"):
        VarFormerConfig(restoration=False, with_prior=False)
    with pytest.raises(ValueError, match="has no refinement, 2 blocks were asked for"):
        VarFormerConfig(refinement=2, form="published")
    with pytest.raises(ValueError, match="enters every level but one, not 1 levels"):
        VarFormerConfig(injected=1, form="published")
    with pytest.raises(ValueError, match="injected is 2; the prior enters 1 to 1 levels"):
        VarFormer(VarFormerConfig(**SMALL, encoder_heads=4, injected=2), tiny.var())


def test_photographs_may_follow_a_view_of_the_whole(tiny, images, tmp_path):
    plain, following = build(tiny), build(tiny, overview=True)
    photo = torch.rand(3, 20, 14, generator=torch.Generator().manual_seed(2))
    tiles, followed = plain.restore(photo), following.restore(photo)
    assert not torch.equal(followed, tiles)
    moved = (followed - tiles).mean((1, 2))
    wanted = (plain.restore_squares(squeezed(photo, 8)[None])[0] - squeezed(tiles, 8)).mean((1, 2))
    assert (moved * wanted > 0).all()
    assert torch.equal(following.restore(images), plain.restore(images))  # what is seen whole anyway stays
    # Gone on with, the same: what tiles differ by is kept with them.
    store = TileStore(tmp_path / "tiles", "me")

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        following.restore(photo, progress=stop, store=store, batch=2)
    assert list((tmp_path / "tiles").iterdir())
    assert torch.equal(following.restore(photo, store=store, batch=2), followed)


def test_the_prior_may_enter_the_coarsest_levels_only(tiny, images, tmp_path):
    sizes = tiny.tokenizer().config
    three_levels = replace(sizes, autoencoder=replace(sizes.autoencoder, multipliers=(1, 1, 2)))
    torch.manual_seed(0)
    prior = tiny.var(ResidualVQ(three_levels))
    config = VarFormerConfig(**SMALL, encoder_heads=4, window_groups=1)
    whole, coarse = VarFormer(config, prior), VarFormer(replace(config, injected=1), prior).eval()
    assert coarse.encoder is not None and coarse.decoder is not None and whole.encoder is not None
    assert list(whole.encoder.fusions) == ["1", "2"]
    assert list(coarse.encoder.fusions) == list(coarse.decoder.fusions) == ["2"]
    pictures = torch.rand(2, 3, coarse.side, coarse.side)
    restored = coarse.restore(pictures)
    assert torch.equal(nextscale.load(coarse.save(tmp_path / "model"), device="cpu").restore(pictures), restored)
    with pytest.raises(ValueError, match="enter every level but one, not 1 levels"):
        coarse.to_official()


def test_a_refinement_begins_with_nothing_and_is_kept(tiny, images, tmp_path):
    torch.manual_seed(0)
    config = VarFormerConfig(**SMALL, encoder_heads=4, window_groups=1, refinement=2)
    model = VarFormer(config, tiny.var()).eval()
    plain = VarFormer(replace(config, refinement=0), model.prior).eval()
    state = model.state_dict()
    plain.load_state_dict({name: value for name, value in state.items() if ".refinement." not in name})
    with torch.inference_mode():
        assert torch.equal(model(images).pixels, plain(images).pixels)
        torch.nn.init.normal_(model.decoder.refinement.conv_out.weight)
        changed = model(images).pixels
        assert (changed - plain(images).pixels).abs().mean() > 0.01
        again = nextscale.load(model.save(tmp_path / "model"), device="cpu")
        assert torch.equal(again(images).pixels, changed)
    with pytest.raises(ValueError, match="no place for 2 blocks of refinement"):
        model.to_official()


def test_the_model_that_ships_restores_photographs():
    """scikit-image's cat, of another size than the network's: better than it came, whatever was done to it."""
    model, photo = nextscale.load("varformer-small", device="cpu"), photographs(("chelsea",))["chelsea"]
    clean = torch.from_numpy(np.array(photo.crop((120, 60, 296, 200)))).permute(2, 0, 1).float() / 255

    def decibels(picture: Tensor) -> float:
        return float(-10 * (picture - clean).square().mean().log10())

    for degradation, gain in (("noise25", 8.0), ("jpeg10", 0.1), ("low-light", 4.0), ("hazy", 3.0)):
        damaged, _ = degrade(clean, parse_steps(degradation), 0)
        assert decibels(model.restore(damaged)) > decibels(damaged) + gain, degradation


# --- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"adjust": True},
        {"enhancement": 0},
        {"restoration": False, "steered": 2, "decoder_blocks": 2, "encoder_heads": 8},
    ],
)
def test_official_round_trip(tiny, options):
    model = build(tiny, form="published", window_groups=2, **{"steering_heads": 16, **options})
    official = model.to_official()
    again = VarFormer.from_official({"params": {}, "params_ema": official}, schedule="1 2 4", heads=2)
    assert again.config == model.config and again.prior.config.transformer.width == 16
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    exported = again.to_official()
    assert exported.keys() == official.keys()
    assert all(torch.equal(exported[name], value) for name, value in official.items())


def test_official_files_hold_what_nothing_reads(published):
    official = published.to_official()
    patch = "Mainencoder.cat_rec_syn.Level_0.swin_blocks.1.patch_embed.proj"
    assert official[f"{patch}.weight"].shape == (32, 0, 4, 4) and official[f"{patch}.bias"].shape == (32,)
    assert official["main_decoder.input_w"].shape == () and "main_decoder.conv1__w.weight" in official
    assert official["lvl_1L"].dtype == torch.int64


def test_fixed_form_exports_zeros_for_what_it_lacks(tiny, published):
    model = build(tiny, window_groups=2, adjust=True, steering_heads=16)
    official, names = model.to_official(), published.to_official().keys()
    assert official.keys() == names and len(model.official_differences()) == 2
    assert not official["main_decoder.DAE.Level_0.conv1x1.weight"].any()
    again = VarFormer.from_official(official, form="fixed", schedule="1 2 4", heads=2)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_recognised_saved_and_loaded(published, fixed, images, tmp_path):
    official = published.to_official()
    recognised = [name for name, system in SYSTEMS.items() if system.recognises(official)]
    assert recognised[0] == "varformer"
    loaded = nextscale.load(official, schedule="1 2 4", device="cpu", guidance=1.5)
    assert loaded.config.guidance == 1.5 and loaded.config.form == "published"
    saved = nextscale.load(fixed.save(tmp_path / "model"), device="cpu")
    assert torch.equal(saved.restore(images), fixed.restore(images))
    assert saved.parts["restorer"] is saved and saved.parts["tokenizer"] is saved.tokenizer
    with pytest.raises(CheckpointError, match="cross_attn_blocks"):
        VarFormer.from_official({"a": torch.zeros(1)})


def test_half_precision(tiny, images):
    model = build(tiny, adjust=True)
    restored = model.restore(images)
    half = nextscale.loading.cast(model, torch.bfloat16).restore(images)
    assert half.dtype == torch.float32 and (half - restored).abs().mean() < 0.05
