"""Infinity's tokenizer: bits and maps, the official layout in both directions, published sizes, training terms."""

from pathlib import Path

import pytest
import torch
from torch import nn

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.checkpoint import CheckpointError
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizer, BitwiseQuantizerConfig
from nextscale.tasks.tokenizers.bitwise_schedules import (
    SIZES,
    for_features,
    nearest_ratio,
    parse_ratio,
    published,
    reference_grid,
    schedule_of,
    size_of,
)
from nextscale.tasks.tokenizers.bitwise_vq import BitwiseVQ, BitwiseVQConfig, config_from_official, is_official

SCHEDULE = ScaleSchedule.parse("1 2 3x2 4x3")


def tokenizer(bits: int = 6, patch: int = 1, schedule: ScaleSchedule = SCHEDULE, **options: int | None) -> BitwiseVQ:
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(32, (1, 1), blocks=1, latent_channels=bits, attention=False)
    return BitwiseVQ(BitwiseVQConfig(autoencoder, BitwiseQuantizerConfig(bits, patch), schedule, **options)).eval()


@pytest.mark.parametrize("patch", [1, 2])
def test_stepping_gives_what_teacher_forcing_gives_at_once(patch: int) -> None:
    quantizer = BitwiseQuantizer(BitwiseQuantizerConfig(5, patch))
    features = torch.randn(2, 5, 4 * patch, 3 * patch)
    bits, totals = quantizer.encode(features, SCHEDULE)
    tokens = torch.cat(bits, dim=1)
    assert tokens.shape == (2, SCHEDULE.length, 5 * patch**2)
    assert tokens.dtype == torch.bool
    total, inputs = quantizer.begin(2, SCHEDULE), []
    for index, part in enumerate(SCHEDULE.split(tokens)):
        total = quantizer.advance(total, quantizer.codes(part), SCHEDULE, index)
        if index + 1 < len(SCHEDULE):
            inputs.append(quantizer.next_input(total, SCHEDULE, index + 1))
    torch.testing.assert_close(total, totals[-1])
    torch.testing.assert_close(quantizer.decode(tokens, SCHEDULE)[-1], totals[-1])
    torch.testing.assert_close(torch.cat(inputs, dim=1), quantizer.teacher_inputs(tokens, SCHEDULE))
    torch.testing.assert_close(quantizer.inputs(totals, SCHEDULE), quantizer.teacher_inputs(tokens, SCHEDULE))
    for scales in (1, 3):
        part = quantizer.teacher_inputs(tokens, SCHEDULE, scales)
        torch.testing.assert_close(part, torch.cat([part[:, :0], *inputs[: scales - 1]], dim=1))
    assert torch.equal(quantizer.to_tokens(quantizer.to_cells(tokens[:, -12:].float(), SCHEDULE, -1)), tokens[:, -12:])


def test_flips_change_what_follows_and_are_not_labels() -> None:
    quantizer = BitwiseQuantizer(BitwiseQuantizerConfig(4))
    features = 0.1 * torch.randn(1, 4, 4, 3)
    plain, _ = quantizer.encode(features, SCHEDULE)
    flips = torch.zeros(1, SCHEDULE.length, 4, dtype=torch.bool)
    flips[:, 0] = True
    flipped, totals = quantizer.encode(features, SCHEDULE, flips=quantizer.split_flips(flips, SCHEDULE))
    assert torch.equal(flipped[0], plain[0])
    torch.testing.assert_close(totals[0][:, :, 0, 0], quantizer.codes(~plain[0][:, 0]))
    # The second scale has to take back twice the first code: its bits are the right ones of the first.
    assert torch.equal(flipped[1], plain[0].expand(-1, 4, -1))
    assert torch.equal(quantizer.encode(features, SCHEDULE, flips=[])[0][3], plain[3])


@pytest.mark.parametrize(("patch", "halvings"), [(1, None), (2, None), (1, 0)])
def test_official_round_trip(patch: int, halvings: int | None, tmp_path: Path) -> None:
    model = tokenizer(patch=patch, halvings=halvings)
    state = model.to_official()
    assert "encoder.down.0.block.0.conv1.conv.weight" in state
    assert ("encoder.down.0.downsample.conv.conv.weight" in state) == (halvings is None)
    torch.save({"vae": state, "epoch": 1}, tmp_path / "vae.pth")
    again = BitwiseVQ.load(tmp_path / "vae.pth", schedule=SCHEDULE, patch=patch)
    assert again.config == model.config
    assert is_official(state)
    assert again.to_official().keys() == state.keys()
    height, width = model.image_size()
    image = torch.rand(1, 3, height, width) * 2 - 1
    assert torch.equal(again.encode(image), model.encode(image))
    unwrapped = {k.replace(".conv.weight", ".weight").replace(".conv.bias", ".bias"): v for k, v in state.items()}
    unwrapped = {k.replace("norm.", "").replace("sample.weight", "sample.conv.weight"): v for k, v in unwrapped.items()}
    unwrapped = {k.replace("sample.bias", "sample.conv.bias"): v for k, v in unwrapped.items()}
    plain = BitwiseVQ.from_official(unwrapped, schedule=SCHEDULE, patch=patch)
    assert torch.equal(plain.encode(image), model.encode(image))
    saved = BitwiseVQ.load(model.save(tmp_path / "own"))
    assert saved.config == model.config


@pytest.mark.parametrize(
    ("bits", "multipliers", "name"),
    [
        *((bits, (1, 2, 4, 4, 4), f"infinity_vae_d{bits}.pth") for bits in (16, 24, 32, 64)),
        (14, (1, 2, 4, 4), "infinity_vae_d56_f8_14_patchify.pth"),
    ],
)
def test_released_sizes(bits: int, multipliers: tuple[int, ...], name: str) -> None:
    autoencoder = AutoencoderConfig(128, multipliers, 2, bits, attention=False)
    with torch.device("meta"):
        model = BitwiseVQ(BitwiseVQConfig(autoencoder, BitwiseQuantizerConfig(bits, 2 if bits == 14 else 1)))
    state = model.to_official()
    assert config_from_official(BitwiseVQ.read_official({"vae": state})[1]) == model.config
    assert (model.stride, model.official_name) == (16, name)
    assert state["quantizer.lfq.mask"].shape == (bits,)
    assert state["quantizer.lfq.mask"][-1] == 1


def test_norm_groups_of_widths_that_32_does_not_divide() -> None:
    autoencoder = AutoencoderConfig(24, (1, 4), 1, 4, attention=False, norm_groups=24)
    model = BitwiseVQ(BitwiseVQConfig(autoencoder, BitwiseQuantizerConfig(4)))
    groups = {(m.num_channels, m.num_groups) for m in model.modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {(24, 24), (96, 32)}
    assert config_from_official(BitwiseVQ.read_official(model.to_official())[1]).autoencoder == autoencoder


def test_training_pass_reaches_every_weight_and_evens_bits_out() -> None:
    model = tokenizer().train()
    output = model(torch.rand(2, 3, 8, 6) * 2 - 1)
    (output.reconstruction.square().mean() + output.quantizer.loss).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert [t.max() < model.config.quantizer.vocabulary for t in output.quantizer.tokens] == [True] * 4
    quantizer = BitwiseQuantizer(BitwiseQuantizerConfig(4, commitment=0))
    one, flat = ScaleSchedule.parse("2"), torch.ones(8, 4, 2, 2)
    even = flat * (torch.arange(8) % 2 * 2 - 1)[:, None, None, None]
    undecided = flat * torch.tensor([1.0, 1.0, 1e-4, 1e-4])[:, None, None]
    losses = [float(quantizer(features, one)[0].loss) for features in (even, flat, undecided)]
    assert losses[0] < losses[1] <= losses[2] + 1e-6


def test_schedules_by_ratio_and_size() -> None:
    assert len(published()) == 15
    assert len({schedule_of(r, s) for r in published() for s in SIZES}) == 60
    assert schedule_of(parse_ratio("16:9"), 1024).final.grid == (48, 84)
    assert schedule_of(1.0, "256") == schedule_of(1.0, "0.06M")
    assert (nearest_ratio(9 / 16), parse_ratio(2.0), parse_ratio("3:4")) == (0.571, 0.5, 4 / 3)
    for ratio, full in published().items():
        for name, count in SIZES.items():
            part = schedule_of(ratio, name)
            assert (for_features(*part.final.grid), size_of(part), len(part)) == (part, name, count)
            assert reference_grid(part) == full.final.grid
    assert size_of(SCHEDULE) is None
    assert for_features(5, 5) is None
    for text in ("16:0", "wide", "-1:2", ""):
        with pytest.raises(ValueError, match="expected width:height such as 16:9"):
            parse_ratio(text)
    with pytest.raises(ValueError, match=r"size is '2M'; expected 0\.06M"):
        schedule_of(1.0, "2M")


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"grid is .*, the schedule '1 2 3x2 4x3' ends at"):
        tokenizer().quantizer.encode(torch.zeros(1, 6, 5, 5), SCHEDULE)
    with pytest.raises(ValueError, match="no published list of scales ends at 5 x 5 tokens"):
        tokenizer().encode(torch.zeros(1, 3, 10, 10))
    with pytest.raises(ValueError, match="32 latent channels, the quantiser 8 bits"):
        BitwiseVQConfig(quantizer=BitwiseQuantizerConfig(8))
    with pytest.raises(ValueError, match="halvings is 5"):
        BitwiseVQConfig(halvings=5)
    with pytest.raises(CheckpointError, match="was found"):
        BitwiseVQ.from_official({"vae": {"x": torch.zeros(1)}})
    state = tokenizer().to_official()
    with pytest.raises(CheckpointError, match="lacks an entry of the bitwise tokenizer"):
        BitwiseVQ.from_official({k: v for k, v in state.items() if "conv_out" not in k})
