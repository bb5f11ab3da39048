"""Linear layers by the fastest call there is, with the same result up to rounding."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

FEW_ROWS = 512
"""Up to so many rows oneDNN multiplies faster in float32, by up to a third, than the library taken by default (MKL)."""


def linear(
    layer: nn.Linear, x: Float[Tensor, "*batch inputs"], bias: Float[Tensor, " outputs"] | None = None
) -> Float[Tensor, "*batch outputs"]:
    """A linear layer's output; ``bias`` is given for a layer that has none of its own."""
    # What wraps a layer, such as an adapter, computes more than its weight tells.
    plain = type(layer) is nn.Linear
    if plain and x.numel() <= FEW_ROWS * x.shape[-1] and _onednn_computes(x, layer.weight):
        bias = layer.bias if bias is None else bias
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, bias, "none", [], "")
    if bias is None:
        return layer(x)
    return F.linear(x, layer.weight, bias) if plain else layer(x) + bias


def linear_gelu(layer: nn.Linear, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
    """GELU (tanh form) of a linear layer's output."""
    if type(layer) is nn.Linear and _onednn_computes(x, layer.weight):
        # The separate GELU costs a third of the layer's time in bfloat16 on a CPU with matrix units.
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], "tanh")
    return F.gelu(layer(x), approximate="tanh")


def _onednn_computes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's own layers may be called: they know neither gradients nor autocast, and the CPU alone."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and x.dtype in _onednn_dtypes()
    )


@cache
def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    """What this build and this processor compute in fused layers."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)
