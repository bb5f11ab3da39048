"""FlexVAR's tokenizer: maps that stand alone, files both ways, and its training."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.checkpoint import weightless
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingConfig
from nextscale.datasets.images import open_images
from nextscale.tasks.data import ImageData
from nextscale.tasks.tokenizers.flex_training import FlexTokenizerRecipe, FlexTokenizerTraining
from nextscale.tasks.tokenizers.flex_vq import (
    FlexQuantizerConfig,
    FlexVQ,
    FlexVQConfig,
    config_from_official,
    is_official,
)
from nextscale.tasks.tokenizers.tokenize import write_tokens
from nextscale.tasks.tokenizers.training import TokenizerLossConfig


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def pictures(count: int, height: int, width: int | None = None) -> Tensor:
    coarse = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(coarse, size=(height, width or height), mode="bilinear")


@pytest.mark.parametrize("unit_norm", [True, False])
def test_every_scale_is_the_nearest_codes_of_the_averaged_latent(unit_norm: bool, tiny: SimpleNamespace) -> None:
    tokenizer = tiny.flex_tokenizer(unit_norm=unit_norm)
    torch.nn.init.normal_(tokenizer.quantizer.codebook.weight)
    images = pictures(2, 12, 8)
    schedule = ScaleSchedule.parse("1 2x3 6x4 7x5")
    tokens, latent = tokenizer.encode(images, schedule), tokenizer.features(images)
    codes = tokenizer.quantizer.codebook.weight
    for part, scale in zip(schedule.split(tokens), schedule.scales, strict=True):
        z = F.adaptive_avg_pool2d(latent, scale.grid).flatten(2).mT
        a, b = (F.normalize(z, dim=-1), F.normalize(codes, dim=-1)) if unit_norm else (z, codes)
        assert torch.equal(part, torch.cdist(a, b[None]).argmin(-1))
        alone = ScaleSchedule((scale,))
        assert torch.equal(tokenizer.encode(images, alone), part)
        assert tokenizer.decode(part, alone).shape == (2, 3, 2 * scale.height, 2 * scale.width)


def test_what_enters_the_next_scale_is_the_last_map_in_unit_codes(tiny: SimpleNamespace) -> None:
    for unit_norm in (True, False):
        tokenizer = tiny.flex_tokenizer(unit_norm=unit_norm)
        quantizer, schedule = tokenizer.quantizer, ScaleSchedule.parse("1 2 3x4")
        tokens = torch.randint(16, (2, schedule.length))
        inputs = tokenizer.teacher_inputs(tokens, schedule)
        assert inputs.shape == (2, 4 + 12, 4)
        codes = F.normalize(quantizer.codebook.weight, dim=-1)[tokens[:, 1:5]].mT.unflatten(-1, (2, 2))
        torch.testing.assert_close(inputs[:, 4:], F.interpolate(codes, (3, 4), mode="bicubic").flatten(2).mT)


@pytest.mark.parametrize("attention", [True, False])
def test_official_round_trip(attention: bool, tiny: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = tiny.flex_tokenizer(attention=attention)
    state = tokenizer.to_official()
    assert is_official(state) and is_official({"model": state})
    assert ("encoder.mid.1.k.weight" in state) == attention
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "FlexVAE.pth")
    again = FlexVQ.load(tmp_path / "FlexVAE.pth", schedule="1 2 3 4")
    assert same(again, tokenizer) and again.config == tokenizer.config
    assert ("no attention" in " ".join(again.official_differences())) == (not attention)


def test_sizes_are_read_from_shapes() -> None:
    config = FlexVQConfig(
        AutoencoderConfig(32, (1, 2, 3), blocks=2, latent_channels=6, image_channels=1),
        FlexQuantizerConfig(20, 5),
        decoder_multipliers=(2, 1, 3),
    )
    assert config_from_official(FlexVQ(config).to_official()) == config
    with pytest.raises(ValueError, match="not of one length"):
        FlexVQ(replace(config, decoder_multipliers=(1, 2)))


def test_released_layout() -> None:
    with weightless():
        tokenizer = FlexVQ()
    state = tokenizer.to_official()
    for key, shape in {
        "encoder.conv_blocks.4.attn.1.q.weight": (512, 512, 1, 1),
        "encoder.conv_blocks.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.conv_blocks.2.res.0.nin_shortcut.weight": (256, 128, 1, 1),
        "decoder.conv_blocks.0.attn.2.proj_out.bias": (512,),
        "decoder.conv_blocks.3.upsample.conv.weight": (128, 128, 3, 3),
        "decoder.conv_blocks.4.res.2.conv2.weight": (128, 128, 3, 3),
        "decoder.mid.2.conv1.weight": (512, 512, 3, 3),
        "quant_conv.weight": (32, 256, 1, 1),
        "quantize.embedding.weight": (8912, 32),
        "quantize.codebook_used": (65536,),
    }.items():
        assert tuple(state[key].shape) == shape


def test_own_files_round_trip(tiny: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = tiny.flex_tokenizer(beta=0.5)
    again = FlexVQ.load(tokenizer.save(tmp_path))
    assert same(again, tokenizer) and again.config == tokenizer.config


def test_codes_stay_float32_in_a_model_of_another_precision(tiny: SimpleNamespace) -> None:
    tokenizer = tiny.flex_tokenizer().to(torch.bfloat16)
    assert tokenizer.quantizer.vectors.dtype == torch.float32
    assert tokenizer.encoder.conv_in.weight.dtype == torch.bfloat16
    assert tokenizer.decode(tokenizer.encode(pictures(1, 8))).shape == (1, 3, 8, 8)


def test_the_training_pass_reaches_every_weight(tiny: SimpleNamespace) -> None:
    tokenizer = tiny.flex_tokenizer().train()
    output = tokenizer(pictures(2, 8), ScaleSchedule.parse("2 3x4 4"))
    assert [tuple(made.shape[2:]) for made in output.reconstructions] == [(4, 4), (6, 8), (8, 8)]
    for made, kept in zip(output.quantizer.maps, tokenizer.quantizer.decode(
        torch.cat(output.quantizer.tokens, 1), ScaleSchedule.parse("2 3x4 4")), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(made, kept)
    loss, metrics = tokenizer.loss({"image": pictures(2, 8)})
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in tokenizer.parameters())
    assert set(metrics) == {"squared", "quantizer"}


def test_each_step_draws_scales_of_its_own(tiny: SimpleNamespace) -> None:
    task = FlexTokenizerTraining(tiny.flex_tokenizer(), TokenizerLossConfig(), drawn=2, seed=3)
    drawn = [task.scales(step) for step in range(40)]
    assert {str(part) for part in drawn} == {"1 2 4", "1 3 4", "2 3 4"}
    assert drawn == [task.scales(step) for step in range(40)]
    other = FlexTokenizerTraining(tiny.flex_tokenizer(), TokenizerLossConfig(), drawn=9, seed=4)
    assert str(other.scales(0)) == "1 2 3 4"
    assert str(FlexTokenizerTraining(tiny.flex_tokenizer(), TokenizerLossConfig(), drawn=0).scales(5)) == "4"


# --- the recipe ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.images(tmp_path_factory.mktemp("data") / "images", side=16))


def recipe(images: str, folder: Path, **changes: Any) -> FlexTokenizerRecipe:
    steps = TrainingConfig(
        str(folder), epochs=3, batch_size=8, log_every=1, schedule="constant", learning_rate=0.05, warmup_epochs=0
    )
    return FlexTokenizerRecipe(
        data=ImageData(images, validation=images, size=16, resize_ratio=1.0),
        training=steps,
        scales="1 2 3x4 8",
        autoencoder=AutoencoderConfig(8, (1, 1), 1, latent_channels=4, attention=False, norm_groups=4),
        quantizer=FlexQuantizerConfig(16, 4),
        **changes,
    )


def no_model(source: str, tokenizer: Any = None) -> Any:
    raise AssertionError("nothing is to be read")


def test_training_to_tokens(images: str, tmp_path: Path) -> None:
    run = (made := recipe(images, tmp_path)).trainer(no_model)
    run.run()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"loss", "psnr", "psnr_coarse", "usage/all"} <= rows[0].keys()
    assert rows[-1]["validation/psnr"] > 0
    shown = made.examples(run)
    assert [name for name, _ in shown.rows] == ["images", "1", "2", "3x4", "8"]
    assert {tuple(picture.shape) for _, row in shown.rows for picture in row} == {(3, 16, 16)}
    tokenizer = FlexVQ.load(made.finish(run))
    folder = write_tokens(tokenizer, open_images(images, size=16, resize_ratio=1), tmp_path / "tokens")
    assert json.loads((folder / "index.json").read_text())["metadata"]["schedule"] == "1 2 3x4 8"


def test_an_autoencoder_is_taken_over_where_it_fits(images: str, tiny: SimpleNamespace, tmp_path: Path) -> None:
    source = tiny.var().tokenizer
    sizes = replace(source.config.autoencoder, attention=False)
    made = replace(recipe(images, tmp_path, init="x"), autoencoder=sizes, scales="1 2 8")
    built = made.build(lambda _: SimpleNamespace(tokenizer=source))
    own, theirs = built.state_dict(), source.state_dict()
    assert torch.equal(own["encoder.conv_in.weight"], theirs["encoder.conv_in.weight"])
    assert torch.equal(own["decoder.conv_out.weight"], theirs["decoder.conv_out.weight"])
    whole = made.build(lambda _: tiny.flex_tokenizer())
    assert isinstance(whole, FlexVQ) and str(whole.config.schedule) == "1 2 8"
    with pytest.raises(ValueError, match="no weight of the autoencoder in x has the shape"):
        recipe(images, tmp_path, init="x").build(lambda _: torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="drawn is -1"):
        recipe(images, tmp_path, drawn=-1)
    with pytest.raises(ValueError, match="the last scale must be 8"):
        replace(made, init=None, scales="1 4").build(no_model)
