"""Packed linear layers by torchao: its kernels, on GPUs above all, in place of this library's own.

torchao is an optional dependency: ``pip install nextscale[lite]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TorchaoLinear(nn.Module):
    """A linear layer that torchao has packed."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def torchao_linear(layer: nn.Linear, bits: int, activation_bits: int = 16) -> TorchaoLinear:
    """A layer's weights packed by torchao: a ``packing`` for :func:`nextscale.tasks.generation.litevar.compress`.

    Raises:
        ValueError: torchao is missing, or cannot pack this layer so on its device.
    """
    try:
        from torchao import quantization
    except ImportError as error:
        raise ValueError(f"torchao is needed for this ({error}): pip install nextscale[lite]") from None
    config: Any
    if bits == 4:
        config = quantization.Int4WeightOnlyConfig(group_size=64)
    elif activation_bits == 8:
        config = quantization.Int8DynamicActivationInt8WeightConfig()
    else:
        config = quantization.Int8WeightOnlyConfig()
    copy = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    copy.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
    if layer.bias is not None:
        copy.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    holder = nn.Sequential(copy)
    try:
        with torch.inference_mode(False):
            quantization.quantize_(holder, config)
    except (ImportError, NotImplementedError, RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"torchao packs no layer of {bits} bits on {layer.weight.device.type} here ({reason}); compress without it"
        ) from None
    return TorchaoLinear(holder[0])  # type: ignore[arg-type]
