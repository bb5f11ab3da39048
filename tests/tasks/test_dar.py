"""DAR: the recursion of the bins, the mask, files in both directions, prediction, training."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.checkpoint import CheckpointError, weightless
from nextscale.core.config import from_json, to_json
from nextscale.core.schedule import ScaleSchedule
from nextscale.datasets.depth import open_source
from nextscale.datasets.scenes import SceneSettings
from nextscale.datasets.scenes_write import write_scenes
from nextscale.evaluation.depth import depth_metrics
from nextscale.evaluation.depth_alignment import align
from nextscale.loading import load
from nextscale.tasks.depth.dar import DAR, PRESETS, DARConfig, as_published
from nextscale.tasks.depth.dar_backbones import diffusers_unet_rules, load_classifier, load_dinov2
from nextscale.tasks.depth.dar_bins import OrdinalBins, centres
from nextscale.tasks.depth.dar_decoder import DARDecoderConfig
from nextscale.tasks.depth.dar_diffusion import DiffusionEncoder, DiffusionEncoderConfig, squared
from nextscale.tasks.depth.dar_encoders import ConvEncoderConfig, PatchEncoder, PatchEncoderConfig
from nextscale.tasks.depth.dar_official import diffusion_config
from nextscale.tasks.depth.dar_training import scale_invariant_error
from nextscale.tasks.depth.dar_transformer import DARTransformerConfig
from nextscale.tasks.depth.dar_unet import UNet, UNetConfig
from nextscale.tasks.depth.dar_vit import ViTConfig
from nextscale.tasks.depth.dar_windows import cut_windows, join_windows
from nextscale.tasks.depth.sets import DepthSet

SCHEDULE = ScaleSchedule.parse("1x2 2x3 3x4")
VIT = ViTConfig(32, 4, 2, patch=4, grid=4)
PATCH = PatchEncoderConfig(VIT, (16, 16, 16, 16), 16, 32, unread_layers=True)


def decoder_config(memory: int = 32, context: int = 16, **changes) -> DARDecoderConfig:
    transformer = DARTransformerConfig(16, 3, 2, token_width=16, memory_width=memory)
    sizes = {"context_width": context, "bin_width": 8, "width": 8, "up_widths": (8,), "up_kernels": (2,)}
    return DARDecoderConfig(transformer, OrdinalBins(count=6), SCHEDULE, **sizes, **changes)


def small(**changes) -> DAR:
    torch.manual_seed(0)
    conv = ConvEncoderConfig((16, 16, 32, 32), blocks=1)
    model = DAR(DARConfig(decoder_config(**changes), conv=conv, image_size=(24, 32)))
    torch.nn.init.normal_(model.decoder.query_tokens)
    return model.eval()


def published(**overrides) -> DAR:
    """A model as if read from an official file."""
    torch.manual_seed(0)
    config = as_published(decoder_config(unread_layers=True), PATCH, schedule=SCHEDULE, heads=2, **overrides)
    return DAR(replace(config, image_size=(24, 32), out_size=(32, 40))).eval()


# --- bins -----------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0.01, 9.99), min_size=1, max_size=6),
    st.integers(2, 20),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from(["uniform", "log"]),
)
@settings(max_examples=80, deadline=None)
def test_divided_ranges_hold_the_depth_and_shrink(depths, count, neighbours, last_edge, spacing):
    bins = OrdinalBins(1e-3, 10.0, count, neighbours, last_edge=last_edge, spacing=spacing)
    depth = torch.tensor(depths)[:, None, None, None]
    edges = bins.first(depth)
    labels = bins.labels(depth, edges)
    j = labels[:, 0, 0, 0]
    line = edges[0, :, 0, 0]
    assert bool(((line[j] <= depth[:, 0, 0, 0]) & (depth[:, 0, 0, 0] < line[j + 1])).all())
    new = bins.divide(edges, labels)
    assert bool((new.diff(dim=1) >= 0).all()) and float(new.min()) >= 1e-3 and float(new.max()) <= 10.0
    if last_edge:
        slack = 1e-4
        assert bool((new[:, 0] <= depth[:, 0] + slack).all()) and bool((new[:, -1] >= depth[:, 0] - slack).all())
        share = min((2 * neighbours + 1) / count, 1.0)
        if spacing == "uniform":
            assert bool((new[:, -1] - new[:, 0] <= share * (10 - 1e-3) + slack).all())
        else:
            assert bool((new[:, -1] / new[:, 0] <= (10 / 1e-3) ** share * (1 + slack)).all())


def test_depths_outside_all_bins_are_in_the_first():
    bins = OrdinalBins(1.0, 5.0, 4)
    edges = bins.first(torch.zeros(1))
    depth = torch.tensor([0.5, 1.0, 2.5, 4.999, 5.0, 7.0]).view(-1, 1, 1, 1)
    assert bins.labels(depth, edges).flatten().tolist() == [0, 0, 1, 3, 0, 0]
    assert centres(edges).flatten().tolist() == [1.5, 2.5, 3.5, 4.5]


def test_logarithmic_bins_are_of_one_ratio():
    bins = OrdinalBins(0.5, 8.0, 4, spacing="log")
    edges = bins.first(torch.zeros(1))
    assert edges.flatten().tolist() == pytest.approx([0.5, 1, 2, 4, 8])
    new = bins.divide(edges, bins.labels(torch.full((1, 1, 1, 1), 3.0), edges))
    assert new.flatten().tolist() == pytest.approx([1, 8**0.25, 8**0.5, 8**0.75, 8])


@pytest.mark.parametrize("wrong", [{"min_depth": 0.0}, {"min_depth": 10.0}, {"count": 1}, {"neighbours": -1}])
def test_bins_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=r"expected|no range"):
        OrdinalBins(**wrong)


# --- the recursion over scales ----------------------------------------------------------------------------


def test_one_masked_pass_gives_what_the_scales_give_one_by_one():
    """The masked model; without its mask, the published code's way, earlier tokens change at every scale."""
    model = small()
    memory = torch.randn(2, 32, 3, 4)
    with torch.inference_mode():
        outputs = list(model.decoder.grow(memory, SCHEDULE))
        maps = [o.mT.unflatten(-1, s.grid) for o, s in zip(outputs, SCHEDULE.scales, strict=True)]
        tokens = [model.decoder.query_tokens.expand(2, -1, -1)]
        for before, scale in zip(maps, SCHEDULE.scales[1:], strict=False):
            tokens.append(torch.nn.functional.interpolate(before, size=scale.grid, mode="bilinear").flatten(2).mT)
        image = model.decoder.transformer.remember(memory.flatten(2).mT)
        at_once = model.decoder.transformer(torch.cat(tokens, 1), image, SCHEDULE.segments)
    torch.testing.assert_close(torch.cat(outputs, 1), at_once, atol=1e-5, rtol=1e-5)


def test_without_the_mask_earlier_tokens_change():
    model = small(causal=False)
    with torch.inference_mode():
        outputs = list(model.decoder.grow(torch.randn(1, 32, 3, 4), SCHEDULE))
    assert [o.shape[1] for o in outputs] == [2, 8, 20]
    assert not torch.allclose(outputs[0], outputs[1][:, :2], atol=1e-4)


def test_gradients_through_the_scales_equal_those_of_the_kept_keys():
    model, images = small(), torch.rand(1, 3, 24, 32)
    with torch.no_grad():
        plain = model(images)
    taught = model(images)
    for one, other in zip(plain, taught, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    taught[-1].mean().backward()
    assert model.decoder.query_tokens.grad.abs().sum() > 0


def test_centres_are_refined_or_stay():
    images = torch.rand(1, 3, 24, 32) * 2 - 1
    refined = list(small().steps(images))
    widths = [(s.edges[:, -1] - s.edges[:, 0]).max().item() for s in refined]
    assert widths[0] > widths[1] > widths[2]
    for before, after in pairwise(refined):
        assert bool((after.edges[:, 0] <= before.depth[:, 0] + 1e-4).all())
    stays = small()
    stays.decoder.config = replace(stays.decoder.config, bins=replace(stays.decoder.config.bins, refined=False))
    assert all(step.edges is not None and step.edges.numel() == 7 for step in stays.steps(images))


def test_other_grids_must_begin_alike():
    model, images = small(), torch.rand(1, 3, 24, 32)
    assert len(model(images, ScaleSchedule.parse("2x1 4x4"))) == 2
    with pytest.raises(ValueError, match="begins with 2"):
        model(images, ScaleSchedule.parse("2x2 4x4"))


# --- prediction -------------------------------------------------------------------------------------------


def test_predict_any_photo():
    model = small()
    one = model.predict(torch.rand(3, 30, 50))
    assert one.depth.shape == (30, 50) and one.unit == "metre" and bool((one.depth > 0).all())
    several = model.predict(torch.rand(2, 3, 30, 50), flip=True)
    assert several.depth.shape == (2, 30, 50)
    photo = torch.rand(3, 24, 32)
    flipped = model.predict(photo.flip(-1), flip=True).depth
    torch.testing.assert_close(flipped.flip(-1), model.predict(photo, flip=True).depth, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="draws nothing"):
        model.predict(photo, n=3)


def test_windows_are_blended_where_they_meet():
    images = torch.arange(12.0).expand(2, 1, 3, 12)
    views = cut_windows(images, 8)
    assert views.shape == (4, 1, 3, 8) and torch.equal(join_windows(views, 12), images)
    assert cut_windows(images, 12) is images and cut_windows(images, None) is images
    with pytest.raises(ValueError, match="unseen"):
        join_windows(torch.zeros(2, 1, 3, 5), 12)


def test_a_window_reaches_the_prediction():
    model = small()
    wide = DAR(replace(model.config, image_size=(24, 48), window=32)).eval()
    wide.load_state_dict(model.state_dict())
    photo = torch.rand(3, 24, 48)
    left = model.predict(photo[..., :32]).depth
    torch.testing.assert_close(wide.predict(photo).depth[:, :16], left[:, :16], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="do not cover"):
        replace(model.config, image_size=(24, 80), window=32)


# --- files ------------------------------------------------------------------------------------------------


def test_official_files_in_both_directions(tmp_path):
    model = published()
    official = model.to_official()
    assert {"decoder.update.gru.convz1.weight", "encoder.scratch.refinenet4.resConfUnit1.conv1.weight"} <= set(official)
    torch.save({"model": {f"module.{k}": v for k, v in official.items()}, "epoch": 1}, tmp_path / "dar.pth")
    again = load(tmp_path / "dar.pth", schedule=SCHEDULE, heads=2)
    assert isinstance(again, DAR) and not again.config.decoder.causal
    assert again.config.decoder.bins == OrdinalBins(count=6, neighbours=2, refined=False, last_edge=False)
    # A file does not tell the heads of a vision transformer this narrow.
    assert again.config.patch == replace(PATCH, vit=replace(VIT, heads=1))
    back = again.to_official()
    assert list(back) == list(official) and all(torch.equal(back[k], v) for k, v in official.items())
    kitti = DAR.from_official(official, dataset="kitti", schedule=SCHEDULE, heads=2).config
    assert (kitti.decoder.bins.max_depth, kitti.window, kitti.out_size) == (80.0, 640, (392, 672))
    with pytest.raises(ValueError, match="knows no data set"):
        DAR.from_official(official, dataset="moon")
    with pytest.raises(CheckpointError, match="query_tokens"):
        DAR.read_official({"x": torch.zeros(1)})


def test_saved_folders(tmp_path):
    model = small()
    model.save(tmp_path)
    again, image = load(tmp_path), torch.rand(3, 24, 32)
    assert again.config == model.config and from_json(DARConfig, to_json(model.config)) == model.config
    assert torch.equal(again.predict(image).depth, model.predict(image).depth)
    with pytest.raises(ValueError, match="no convolutional encoder"):
        again.to_official()


def diffusion() -> DiffusionEncoderConfig:
    return DiffusionEncoderConfig(
        UNetConfig(32, heads=4, context_width=16),
        AutoencoderConfig(channels=32, multipliers=(1, 2, 4, 4), latent_channels=8),
        ViTConfig(32, 1, 2, 16, 2, branch_scale=False, grid_offset=0.0, norm_eps=1e-12, classes=10),
        scenes=5,
        outputs=32,
    )


def test_the_diffusion_model_has_the_published_names():
    with weightless():
        model = DAR(DARConfig(decoder_config(context=32), diffusion=diffusion()))
    names = set(model.to_official())
    assert {
        "encoder.cide_module.vit_model.vit.encoder.layer.0.attention.attention.key.bias",
        "encoder.cide_module.embedding_adapter.fc.2.weight",
        "encoder.encoder_vq.encoder.mid.attn_1.q.weight",
        "encoder.encoder_vq.quant_conv.weight",
        "encoder.unet.unet.diffusion_model.input_blocks.3.0.op.weight",
        "encoder.unet.unet.diffusion_model.output_blocks.8.2.conv.weight",
        "encoder.unet.unet.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_out.0.bias",
    } <= names
    found = diffusion_config(model.to_official())
    assert (found.scenes, found.outputs, found.classifier.classes, found.unet) == (5, 32, 10, UNetConfig())
    assert model.rates["encoder.unet."] == 0.01


def test_the_diffusion_encoder_sees_a_photo():
    torch.manual_seed(0)
    encoder = DiffusionEncoder(diffusion()).train()
    memory, context = encoder(torch.rand(1, 3, 64, 128) * 2 - 1)
    assert memory.shape == (1, 32, 2, 4) and context.shape == (1, 32, 8, 16)
    assert not encoder.classifier.training and not any(p.requires_grad for p in encoder.first_stage.parameters())
    tall = squared(torch.ones(1, 3, 4, 2))
    assert tall.shape == (1, 4, 4, 3) and int(tall[0, :, 2:].sum()) == 0 and int(tall.max()) == 255


# --- trained backbones ------------------------------------------------------------------------------------


def test_vision_transformers_compute_what_those_of_transformers_do(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4}
    dino = transformers.Dinov2Model(transformers.Dinov2Config(**size, image_size=16, patch_size=4, mlp_ratio=4)).eval()
    torch.nn.init.normal_(dino.embeddings.position_embeddings)
    dino.save_pretrained(tmp_path / "dino")
    encoder = PatchEncoder(PATCH).eval()
    load_dinov2(encoder, tmp_path / "dino")
    image = torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        theirs = dino(image).last_hidden_state[:, 1:].mT.unflatten(-1, (4, 4))
        torch.testing.assert_close(encoder.vit.last_layers(image, 2)[-1], theirs, atol=1e-5, rtol=1e-5)
    shape = {"image_size": 32, "patch_size": 16, "intermediate_size": 128, "num_labels": 10, "num_hidden_layers": 1}
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**(size | shape))).eval()
    vit.save_pretrained(tmp_path / "vit")
    whole = DiffusionEncoder(diffusion()).eval()
    load_classifier(whole, tmp_path / "vit")
    with torch.inference_mode():
        picture = torch.rand(1, 3, 32, 32)
        torch.testing.assert_close(whole.classifier(picture), vit(picture).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(CheckpointError, match="do not fit DINOv2"):
        load_dinov2(encoder, tmp_path / "vit")
    with pytest.raises(FileNotFoundError, match="holds none of"):
        load_dinov2(encoder, tmp_path)


def test_every_part_of_the_unet_has_a_name_in_diffusers():
    config = UNetConfig(32, heads=4, context_width=16)
    from nextscale.core.checkpoint import KeyMap

    keys = KeyMap(diffusers_unet_rules(config))
    with weightless():
        names = list(UNet(config).state_dict())
    theirs = [keys.to_official(name) for name in names]
    assert len(set(theirs)) == len(names) and [keys.from_official(name) for name in theirs] == names
    assert "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj.weight" in theirs
    assert "down_blocks.3.resnets.1.conv2.bias" in theirs and "up_blocks.0.upsamplers.0.conv.weight" in theirs


# --- sizes and training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"), [("dar-small", 440), ("dar-base", 1000), ("dar-large", 2000), ("dar-tiny", 3.9)]
)
def test_sizes(name, millions):
    with weightless():
        model = DAR(PRESETS[name])
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.015)
    assert len(PRESETS[name].decoder.schedule) == (3 if name == "dar-tiny" else 5)


def test_the_error_is_of_logarithms():
    truth = torch.rand(1, 1, 4, 4) + 0.5
    valid = torch.ones_like(truth, dtype=torch.bool)
    g = np.log(truth.double().numpy()) - np.log(2.0)
    expected = 10 * np.sqrt((g**2).mean() - 0.85 * g.mean() ** 2)
    assert float(scale_invariant_error(torch.full_like(truth, 2.0), truth, valid)) == pytest.approx(expected, rel=1e-5)
    assert float(scale_invariant_error(3 * truth, truth, valid, 1.0)) == pytest.approx(0, abs=0.02)
    prediction = truth.clone().requires_grad_()
    for error in (
        scale_invariant_error(prediction, truth, valid),
        scale_invariant_error(prediction, truth, ~valid),
    ):
        error.backward()
        assert error.item() == 0 and bool(prediction.grad.isfinite().all())


def test_a_few_steps_lower_the_loss():
    model = small().train()
    image = torch.rand(2, 3, 24, 32) * 2 - 1
    depth = torch.linspace(1, 3, 24).view(1, 1, -1, 1).expand(2, 1, 24, 32)
    batch = {"image": image, "depth": depth, "valid": depth > 1.1}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(16):
        loss, metrics = model.loss(batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.75 * losses[0] and {"abs_rel", "delta1", "first_scale", "last_scale"} <= set(metrics)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"conv": None}, "given by nothing"), ({"patch": PATCH}, "given by conv and patch")],
)
def test_one_encoder(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(small().config, **changes)


def test_train_from_the_command_line(tmp_path):
    from nextscale.cli import main
    from nextscale.datasets.depth_store import DepthStoreWriter

    writer = DepthStoreWriter(tmp_path / "pairs", settings={"kind": "test"}, size=(24, 32), total=4, shard_size=4)
    rng = np.random.default_rng(0)
    for _ in range(4):
        image = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        writer.write(image, rng.uniform(1, 5, (24, 32)).astype(np.float32), np.eye(3, dtype=np.float32))
    command = f"train dar --data.source {tmp_path}/pairs --data.validation {tmp_path}/pairs --data.height 24".split()
    command += f"--data.width 32 --max_depth 8 --bins 4 --training.output {tmp_path}/run".split()
    command += ["--width", "16", "--heads", "2", "--depth", "1", "--scales", "1x2,2x3"]
    command += ["--training.epochs", "1", "--training.batch_size", "2", "--training.sample_every", "0"]
    assert main(command) == 0
    model = load(tmp_path / "run")
    assert model.config.decoder.bins.max_depth == 8 and model.config.image_size == (24, 32)
    assert model.predict(torch.rand(3, 20, 20)).depth.shape == (20, 20)
    assert DepthSet(str(tmp_path / "pairs")).open_validation() is None


def test_the_model_that_ships_knows_scenes_that_it_has_not_seen(tmp_path):
    """Rendered here, of a seed that it was not trained on; constants have a third of their pixels right."""
    write_scenes(tmp_path / "scenes", SceneSettings(width=128, height=96, seed=2), 12, workers=0)
    pairs, model = open_source("scenes", tmp_path / "scenes"), load("dar-scenes", device="cpu")
    right, constant = [], []
    for index in range(len(pairs)):
        depth, valid = pairs.depth(index)
        photo = torch.from_numpy(pairs.image(index).copy()).permute(2, 0, 1) / 255
        truth, found = depth[valid], model.predict(photo).depth.numpy()[valid]
        for shares, prediction in ((right, found), (constant, np.ones_like(truth))):
            aligned = align(truth, prediction, "median")(prediction)
            shares.append(depth_metrics(truth, aligned, ("d1",))["d1"])
    assert np.mean(right) > 0.75 and np.mean(constant) < 0.5
