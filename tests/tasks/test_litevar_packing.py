"""Packed weights, by this library and by torchao, and the published simulation of low precision."""

import importlib.util

import pytest
import torch
from torch import nn

from nextscale.tasks.generation.litevar_packing import PackedLinear, linears, pack_layers
from nextscale.tasks.generation.litevar_quantizers import PUBLISHED, Quantizer, SimulatedLinear, Simulation
from nextscale.tasks.generation.litevar_torchao import torchao_linear


@pytest.mark.parametrize(("bits", "inputs"), [(8, 48), (8, 7), (4, 128), (4, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_restored_within_half_a_step(bits: int, inputs: int, dtype: torch.dtype) -> None:
    layer = nn.Linear(inputs, 24).to(dtype)
    packed = PackedLinear.of(layer, bits)
    groups = layer.weight.detach().float().unflatten(1, (-1, packed.group if bits == 4 else inputs))
    span = groups.abs().amax(-1) / 127 if bits == 8 else (groups.amax(-1) - groups.amin(-1)) / 15
    error = (packed.restored(torch.float32) - layer.weight.float()).abs().unflatten(1, (-1, groups.shape[-1])).amax(-1)
    # Steps are rounded to eight bits, which moves the ends of a range by a few thousandths of it.
    assert (error <= span * (0.51 + (0.5 if bits == 8 else 0.1))).all()
    for rows in (3, inputs + 1):
        x = torch.randn(2, rows, inputs, dtype=dtype)
        expected = nn.functional.linear(x.float(), packed.restored(torch.float32), layer.bias.float())
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(packed(x).float(), expected, rtol=tolerance, atol=tolerance)
    assert packed.weight.dtype == dtype and packed.weight.shape == layer.weight.shape


def test_packed_bytes() -> None:
    layer = nn.Linear(128, 64)
    eight, four = (sum(b.nbytes for b in PackedLinear.of(layer, bits).buffers()) for bits in (8, 4))
    assert eight == 128 * 64 + 64 * 2 and four == 128 * 64 // 2 + 64 * 2 * 2 * 2


def test_integer_products() -> None:
    layer = nn.Linear(64, 32, bias=False)
    packed = PackedLinear.of(layer, 8, activation_bits=8)
    x = torch.randn(5, 64)
    error = (packed(x) - layer(x)).norm() / layer(x).norm()
    assert error < 0.02 and packed(torch.zeros(2, 64)).abs().max() == 0


def test_layers_without_spread() -> None:
    layer = nn.Linear(64, 2)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, 0.5)
    for bits in (4, 8):
        assert torch.allclose(PackedLinear.of(layer, bits)(torch.ones(1, 64)), torch.full((1, 2), 0.5), atol=1e-4)


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="weights take 4 or 8"):
        PackedLinear(8, 8, 3)
    with pytest.raises(ValueError, match="7 inputs do not fill whole bytes"):
        PackedLinear(7, 8, 4)
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="1 is no linear layer of this Sequential"):
        pack_layers(model, {"1": 8})
    freed: list[torch.Tensor] = []
    pack_layers(model, {"0": 8}, freed=freed.append)
    assert [tuple(t.shape) for t in freed] == [(4, 4)] and not list(linears(model))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is optional")
def test_torchao_packs_the_same_layers() -> None:
    layer = nn.Linear(64, 32)
    x = torch.randn(5, 64)
    for activation_bits in (8, 16):
        packed = torchao_linear(layer, 8, activation_bits)
        assert (packed(x) - layer(x)).norm() / layer(x).norm() < 0.02
        assert packed.weight.dtype == torch.float32
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torchao packs no layer of 4 bits on cpu here"):
            torchao_linear(layer, 4)


# --- the published simulation -------------------------------------------------------------------------


def test_the_published_settings() -> None:
    assert {n: (s.weight, s.activation, s.attention) for n, s in PUBLISHED.items()} == {
        1: (8, 8, 8), 2: (4, 4, 8), 3: (6, 6, 8), 4: (4, 8, 8), 5: (4, 6, 8), 10: (8, 8, None),
    }  # fmt: skip
    assert PUBLISHED[10].keep == () and PUBLISHED[1].keep == ("feed_forward.contract",)
    with pytest.raises(ValueError, match="weight is 0 bits"):
        Simulation(weight=0)


def test_ranges() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0], [10.0, 10.0, 10.0, 10.0]])
    assert Quantizer("group", 2, group=4)(x)[0].tolist() == [0.0, 0.75, 2.25, 2.25]
    assert Quantizer("static", 2)(torch.tensor([0.0, 0.3, 1.0])).tolist() == [0.0, 0.25, 0.75]
    assert torch.allclose(Quantizer("channel", 4)(x)[1], x[1], atol=1e-3)
    assert Quantizer("axis", 2, axis=0)(x)[0, 0] == 0
    assert Quantizer("tensor", 1)(x).unique().tolist() == [0.0, 5.0]
    assert Quantizer("channel_quantile", 2)(x)[0].tolist() == [0.0, 1.0, 1.5, 1.5]
    for wrong, message in (
        (lambda: Quantizer("group", 4), "needs group="),
        (lambda: Quantizer("axis", 0, axis=1), "0 bits"),
        (lambda: Quantizer("group", 4, group=3)(x), "8 numbers do not divide into groups of 3"),
        (lambda: Quantizer("other", 4)(x), "no quantiser of kind 'other'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_a_simulated_layer_keeps_its_size() -> None:
    layer = nn.Linear(8, 4)
    simulated = SimulatedLinear(layer, 8, 8)
    x = torch.randn(2, 3, 8)
    assert (simulated(x) - layer(x)).abs().max() < 0.1 and simulated.weight.nbytes == layer.weight.nbytes
    assert simulated.weight[0].unique().numel() <= 256
