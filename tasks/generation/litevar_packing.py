"""Linear layers of packed weights: 8 or 4 bits each in memory and on disk, and nothing else kept beside them.

8 bits: a step per output channel. 4 bits: two weights a byte, with a step and a lowest value for each group of inputs.
Weights are restored layer by layer as they are needed, or, where activations take 8 bits too, multiplied as integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

BITS = (4, 8)
GROUP = 64
"""Inputs that share a step and a lowest value, in 4 bits."""

SMALLEST = 1e-8
"""Least step: of weights that are all equal, or inputs that are all zero."""

MULTIPLE = 16
"""Rows and channels that integer products need on an NVIDIA GPU, or a multiple (8 channels; 17 rows at least)."""


class PackedLinear(nn.Module):
    """A linear layer whose weights are packed.

    Args:
        activation_bits: 8 rounds each row of inputs to 8 bits as it comes and multiplies integers; for weights of 8
            bits. 16 leaves inputs as they are.

    Raises:
        ValueError: there is no layer of so many bits, or a row of 4-bit weights does not fill whole bytes.
    """

    packed: Tensor
    packed_step: Tensor
    packed_low: Tensor
    bias: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, bits: int, *, bias: bool = True, activation_bits: int = 16) -> None:
        super().__init__()
        if bits not in BITS or activation_bits not in (8, 16):
            raise ValueError(
                f"weights of {bits} bits with inputs of {activation_bits} were asked for; weights take 4 or 8, inputs "
                "8 or 16"
            )
        if bits == 4 and inputs % 2:
            raise ValueError(f"weights of {inputs} inputs do not fill whole bytes with 4 bits each")
        self.in_features, self.out_features, self.bits = inputs, outputs, bits
        self.activation_bits = activation_bits if bits == 8 else 16
        self.group = GROUP if inputs % GROUP == 0 else inputs
        if bits == 8:
            self.register_buffer("packed", torch.empty(outputs, inputs, dtype=torch.int8))
            self.register_buffer("packed_step", torch.empty(outputs, dtype=torch.bfloat16))
        else:
            groups = (outputs, inputs // self.group)
            self.register_buffer("packed", torch.empty(outputs, inputs // 2, dtype=torch.uint8))
            self.register_buffer("packed_step", torch.empty(groups, dtype=torch.bfloat16))
            self.register_buffer("packed_low", torch.empty(groups, dtype=torch.bfloat16))
        self.register_parameter("bias", nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None)

    @classmethod
    def of(cls, layer: nn.Linear, bits: int, activation_bits: int = 16) -> PackedLinear:
        """The weights of a linear layer, rounded."""
        with torch.device("meta"):
            packed = cls(
                layer.in_features, layer.out_features, bits,
                bias=layer.bias is not None, activation_bits=activation_bits,
            )  # fmt: skip
        for name, value in pack(layer.weight.detach(), bits, packed.group).items():
            setattr(packed, name, value)
        if layer.bias is not None:
            packed.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        return packed

    def restored(self, dtype: torch.dtype) -> Float[Tensor, "outputs inputs"]:
        """The weights that are computed with."""
        if self.bits == 8:
            return self.packed.to(dtype).mul_(self.packed_step.to(dtype)[:, None])
        levels = torch.stack((self.packed & 15, self.packed >> 4), dim=-1).view(self.out_features, -1, self.group)
        step, low = self.packed_step.to(dtype)[..., None], self.packed_low.to(dtype)[..., None]
        return torch.addcmul(low, levels.to(dtype), step).flatten(1)

    @property
    def weight(self) -> Float[Tensor, "outputs inputs"]:
        """As a usual layer's, in the precision of what is not packed; made anew each time."""
        return self.restored(torch.float32 if self.bias is None else self.bias.dtype)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        rows = x.numel() // self.in_features
        if self.activation_bits == 8 and _multiplies_integers(x, rows, self.in_features, self.out_features):
            return self._integer_product(x)
        if self.bits == 8 and rows < self.in_features:
            # Fewer numbers to multiply with the steps than the weights are.
            y = F.linear(x, self.packed.to(x.dtype)).mul_(self.packed_step.to(x.dtype))
            return y if self.bias is None else y.add_(self.bias)
        return F.linear(x, self.restored(x.dtype), self.bias)

    def _integer_product(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features).float()
        step = flat.abs().amax(1, keepdim=True).div_(127).clamp_min_(SMALLEST)
        levels = (flat / step).round_().to(torch.int8)
        y = torch._int_mm(levels, self.packed.t()).float().mul_(step).mul_(self.packed_step.float())
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, activation_bits={self.activation_bits}"


def _multiplies_integers(x: Tensor, rows: int, inputs: int, outputs: int) -> bool:
    if x.device.type == "cuda":
        return rows > MULTIPLE and inputs % MULTIPLE == 0 and outputs % MULTIPLE == 0
    return x.device.type == "cpu"


def pack(weight: Float[Tensor, "outputs inputs"], bits: int, group: int = GROUP) -> dict[str, Tensor]:
    """Rounded weights and what restores them.

    Returns:
        8 bits: ``packed`` int8 and ``packed_step``, the row's largest weight / 127. 4 bits: ``packed`` uint8, the even
        inputs in the low half of a byte, with ``packed_step`` and ``packed_low`` of each group. Steps and lowest values
        are bfloat16, so that weights are restored alike in every precision.
    """
    weight = weight.float()
    if bits == 8:
        step = (weight.abs().amax(1) / 127).clamp_min(SMALLEST).bfloat16()
        packed = (weight / step.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        return {"packed": packed, "packed_step": step}
    groups = weight.unflatten(1, (-1, group))
    low, high = groups.amin(-1), groups.amax(-1)
    step, low = ((high - low) / 15).clamp_min(SMALLEST).bfloat16(), low.bfloat16()
    levels = ((groups - low.float()[..., None]) / step.float()[..., None]).round_().clamp_(0, 15)
    levels = levels.to(torch.uint8).flatten(1)
    return {"packed": levels[:, ::2] | (levels[:, 1::2] << 4), "packed_step": step, "packed_low": low}


Packing = Callable[[nn.Linear, int, int], nn.Module]
"""Layer, bits of its weights, bits of its inputs -> the layer that takes its place."""


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear layer of a generator's network, by name; its tokenizer is left alone."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and "tokenizer" not in name.split("."):
            yield name, module


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in another's place."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def pack_layers(
    model: nn.Module,
    precision: Mapping[str, int],
    activation_bits: int = 16,
    packing: Packing = PackedLinear.of,
    freed: Callable[[Tensor], None] | None = None,
) -> None:
    """Pack the linear layers that are named, each to its number of bits; 16 leaves one as it is.

    Each layer's own weights are given up before the next is packed.

    Args:
        packing: makes the layer that takes another's place.
        freed: called with each of them.

    Raises:
        ValueError: a name is no linear layer of the model.
    """
    known = dict(linears(model))
    if unknown := sorted(set(precision) - set(known)):
        raise ValueError(f"{unknown[0]} is no linear layer of this {type(model).__name__}, or is packed already")
    del known
    for name, bits in precision.items():
        if bits != 16:
            layer: Any = model.get_submodule(name)
            replace(model, name, packing(layer, bits, activation_bits))
            if freed is not None:
                freed(layer.weight.detach())


def unpacked_placeholders(state: Mapping[str, Tensor], precision: Mapping[str, int]) -> dict[str, Tensor]:
    """A saved state with weights without values in place of packed ones, so that the plain model can be built of it."""
    names = {name for name, bits in precision.items() if bits != 16}
    parts = {f"{name}.{part}" for name in names for part in ("packed", "packed_step", "packed_low")}
    plain = {key: value for key, value in state.items() if key not in parts}
    for name in names:
        packed = state.get(f"{name}.packed")
        if packed is None:
            raise ValueError(f"the saved model has no packed weights of {name}, which its plan says are packed")
        outputs, inputs = packed.shape
        shape = (outputs, inputs * (2 if precision[name] == 4 else 1))
        plain[f"{name}.weight"] = torch.empty(shape, device="meta")
    return plain


def restore_packed(
    model: nn.Module, state: Mapping[str, Tensor], precision: Mapping[str, int], activation_bits: int = 16
) -> None:
    """Put packed layers with a saved state's tensors in the place of those without values.

    Raises:
        ValueError: a tensor is missing or of another shape or type.
    """
    for name, bits in precision.items():
        if bits == 16:
            continue
        layer: Any = model.get_submodule(name)
        with torch.device("meta"):
            packed = PackedLinear(
                layer.in_features, layer.out_features, bits,
                bias=layer.bias is not None, activation_bits=activation_bits,
            )  # fmt: skip
        for part, empty in packed.named_buffers():
            value = state.get(f"{name}.{part}")
            if value is None or value.shape != empty.shape or value.dtype != empty.dtype:
                raise ValueError(f"{name}.{part} of the saved model is missing or not as {bits}-bit weights have it")
            setattr(packed, part, value)
        packed.bias = layer.bias
        replace(model, name, packed)
