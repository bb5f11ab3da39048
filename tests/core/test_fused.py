"""Fused layers give what their parts give, and stand aside where they would lose something."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nextscale.core.fused import linear_gelu


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_linear_gelu_is_the_layer_then_the_activation(dtype: torch.dtype, tolerance: float) -> None:
    linear, x = nn.Linear(24, 40), torch.randn(2, 5, 24)
    expected = F.gelu(linear(x), approximate="tanh")
    with torch.inference_mode():
        found = linear_gelu(x.to(dtype), linear.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


def test_gradients_and_autocast_pass_through_linear_gelu() -> None:
    linear, x = nn.Linear(8, 8), torch.randn(3, 8, requires_grad=True)
    linear_gelu(x, linear).sum().backward()
    assert x.grad is not None and linear.weight.grad is not None
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert linear_gelu(x, linear).dtype == torch.bfloat16


def test_what_wraps_a_layer_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    linear, x = Doubled(8, 8), torch.randn(3, 8)
    with torch.inference_mode():
        torch.testing.assert_close(
            linear_gelu(x, linear), F.gelu(2 * F.linear(x, linear.weight, linear.bias), approximate="tanh")
        )
