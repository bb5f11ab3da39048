"""VAR's tokenizer: the official layout in both directions, sizes from shapes, files of its own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.checkpoint import CheckpointError, save_folder
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig, config_from_official, is_official


def same(a: ResidualVQ, b: ResidualVQ) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return a.config == b.config and mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"smoothers": 4}, "quantize.quant_resi.qresi_ls.3.weight"),
        ({"smoothers": 1}, "quantize.quant_resi.qresi.bias"),
        ({"smoothers": 3, "separate": True}, "quantize.quant_resi.2.weight"),
        ({"smoothing": 0.0, "smoothers": 0}, "quantize.embedding.weight"),
    ],
)
def test_official_round_trip(options: dict[str, Any], name: str, tiny: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(**options)
    state = tokenizer.to_official()
    assert name in state
    assert is_official(state)
    nested = {"trainer": {"vae_local": {f"module._orig_mod.{k}": v for k, v in state.items()}}, "epoch": 3}
    torch.save(nested, tmp_path / "ckpt.pth")
    again = ResidualVQ.load(tmp_path / "ckpt.pth", schedule="1 2 4")
    assert same(again, tokenizer)
    assert {k: v.shape for k, v in again.to_official().items()} == {k: v.shape for k, v in state.items()}
    assert ResidualVQ.from_official(state).config.schedule == ScaleSchedule.squares(1, 2, 3)
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    assert torch.equal(again.encode(image), tokenizer.encode(image))


def test_sizes_are_read_from_shapes() -> None:
    config = ResidualVQConfig(
        AutoencoderConfig(32, (1, 2, 3), blocks=2, latent_channels=6, image_channels=1, attention=False),
        QuantizerConfig(20, 6, smoothers=4),
        ScaleSchedule.squares(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        quant_conv_kernel=1,
    )
    assert config_from_official(ResidualVQ(config).to_official()) == config


def test_released_layout() -> None:
    with torch.device("meta"):
        tokenizer = ResidualVQ()
    state = tokenizer.to_official()
    assert len(state) == 324
    assert sum(v.numel() for v in state.values()) - 10 * 4096 == pytest.approx(108.95e6, rel=1e-3)
    for key, shape in {
        "encoder.down.4.attn.1.qkv.weight": (1920, 640, 1, 1),
        "encoder.down.2.block.0.nin_shortcut.weight": (320, 160, 1, 1),
        "decoder.up.4.attn.2.proj_out.bias": (640,),
        "decoder.up.1.upsample.conv.weight": (160, 160, 3, 3),
        "encoder.mid.block_2.conv1.weight": (640, 640, 3, 3),
        "quantize.ema_vocab_hit_SV": (10, 4096),
    }.items():
        assert tuple(state[key].shape) == shape


def test_own_files_round_trip(tiny: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(unit_norm=True, beta=0.5)
    assert same(ResidualVQ.load(tokenizer.save(tmp_path)), tokenizer)
    save_folder(tmp_path, {}, {"system": "other"})
    with pytest.raises(CheckpointError, match="saved 'other', expected 'residual-vq'"):
        ResidualVQ.load(tmp_path)


def test_images_and_tokens(tokenizer: ResidualVQ) -> None:
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    tokens = tokenizer.encode(images)
    assert (tokens.shape, tokens.dtype) == ((2, 21), torch.int64)
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == images.shape
    assert decoded.abs().max() <= 1
    wide = ScaleSchedule.parse("1 2x3 4x6")
    tokens = tokenizer.encode(torch.zeros(1, 3, 8, 12), wide)
    assert tokens.shape == (1, wide.length)
    assert tokenizer.decode(tokens, wide).shape == tokenizer.decode_ragged(tokens, wide).shape == (1, 3, 8, 12)


def test_drawing_images_leaves_the_weights_to_be_trained_and_saved(tiny: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    features = torch.randn(3, 4, 4, 4)
    with torch.inference_mode():
        images = tokenizer.decode_features(features)
        assert torch.allclose(images[1:2], tokenizer.decode_features(features[1:2]), atol=1e-5)
    tokenizer.loss({"image": images.clone()})[0].backward()
    assert all(p.grad is not None for p in tokenizer.decoder.parameters())
    assert same(ResidualVQ.load(tokenizer.save(tmp_path)), tokenizer)


def test_codes_stay_float32_in_a_model_of_another_precision(tiny: SimpleNamespace) -> None:
    tokenizer = tiny.tokenizer().to(torch.bfloat16)
    assert {p.dtype for p in tokenizer.quantizer.parameters()} == {torch.float32}
    assert tokenizer.decoder.conv_in.weight.dtype == torch.bfloat16
    with torch.inference_mode():
        image = tokenizer.decode(tokenizer.encode(torch.rand(1, 3, 8, 8) * 2 - 1))
    assert image.dtype == torch.float32


def test_training_pass_reaches_every_weight(tiny: SimpleNamespace) -> None:
    tokenizer = tiny.tokenizer(smoothers=3)
    output = tokenizer(torch.rand(2, 3, 8, 8))
    (output.reconstruction.square().mean() + output.quantizer.loss).backward()
    assert [n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_errors(tokenizer: ResidualVQ) -> None:
    with pytest.raises(ValueError, match="images are 8 x 9 pixels; both sides must be multiples of 2"):
        tokenizer.encode(torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match=r"grid is \(5, 5\), the schedule '1 2 4' ends at \(4, 4\)"):
        tokenizer.encode(torch.zeros(1, 3, 10, 10))
    with pytest.raises(ValueError, match="32 latent channels, the codes have 8; make them equal"):
        ResidualVQ(ResidualVQConfig(quantizer=QuantizerConfig(channels=8)))
    with pytest.raises(ValueError, match="16 channels does not divide into 32 groups"):
        AutoencoderConfig(channels=16)
    state = tokenizer.to_official()
    without = {k: v for k, v in state.items() if k != "decoder.mid.attn_1.norm.bias"}
    with pytest.raises(CheckpointError, match=r"missing decoder\.middle\.attention\.norm\.bias"):
        ResidualVQ.from_official(without, schedule="1 2 4")
    without = {k: v for k, v in state.items() if not k.startswith("encoder.")}
    with pytest.raises(CheckpointError, match="lacks an entry of the VAR tokenizer"):
        ResidualVQ.from_official(without)
    assert not is_official(without)
    with pytest.raises(CheckpointError, match=r"no entry 'quantize\.embedding\.weight' was found"):
        ResidualVQ.from_official({"model": {"x": torch.zeros(1)}})


def test_other_norm_groups_are_named_when_an_official_file_is_read() -> None:
    config = ResidualVQConfig(
        AutoencoderConfig(8, (1, 2), 1, 4, attention=False, norm_groups=4),
        QuantizerConfig(16, 4),
        ScaleSchedule.squares(1, 2),
    )
    tokenizer = ResidualVQ(config)
    back = ResidualVQ.from_official(tokenizer.to_official(), schedule="1 2", norm_groups=4)
    images = torch.rand(1, 3, 4, 4) * 2 - 1
    torch.testing.assert_close(back.features(images), tokenizer.features(images))
