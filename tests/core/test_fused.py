"""Linear layers by other calls give what the layers give, and stand aside where they would lose something."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.core.fused import linear, linear_gelu


class Doubled(nn.Linear):
    """A layer that is more than its weight, as one with an adapter is."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_same_as_the_layers(dtype: torch.dtype, tolerance: float) -> None:
    layer, bare, x, bias = nn.Linear(24, 40), nn.Linear(24, 40, bias=False), torch.randn(2, 5, 24), torch.randn(40)
    expected = [F.gelu(layer(x), approximate="tanh"), layer(x), bare(x), bare(x) + bias]
    layer, bare, x, bias = layer.to(dtype), bare.to(dtype), x.to(dtype), bias.to(dtype)
    with torch.inference_mode():
        found = [linear_gelu(layer, x), linear(layer, x), linear(bare, x), linear(bare, x, bias)]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, atol=tolerance, rtol=tolerance)


def test_gradients_and_autocast_pass_through() -> None:
    layer, bare, bias = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), torch.randn(8, requires_grad=True)
    linear(bare, linear(layer, linear_gelu(layer, torch.randn(3, 8))), bias).sum().backward()
    assert all(p.grad is not None for p in (layer.weight, layer.bias, bare.weight, bias))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(3, 8)
        assert {f(layer, x).dtype for f in (linear, linear_gelu)} == {torch.bfloat16}


def test_what_wraps_a_layer_is_called() -> None:
    layer, bare, x, bias = Doubled(8, 8), Doubled(8, 8, bias=False), torch.randn(3, 8), torch.randn(8)
    plain = F.linear(x, layer.weight, layer.bias)
    with torch.inference_mode():
        torch.testing.assert_close(linear_gelu(layer, x), F.gelu(2 * plain, approximate="tanh"))
        torch.testing.assert_close(linear(layer, x), 2 * plain)
        torch.testing.assert_close(linear(bare, x, bias), 2 * F.linear(x, bare.weight) + bias)
