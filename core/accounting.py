"""What a computation takes, counted instead of measured: operations, and bytes that are alive at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def count_operations(call: Callable[[], object]) -> int:
    """Floating-point operations of the products and convolutions of a call; free on the meta device."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


class FusedAttention:
    """Within, attention is held as a fused kernel holds it, by tensors whose values do not matter: its result and a
    number a row.

    Attributes:
        operations: of its products so far, two forward and four backward, as PyTorch counts them on the meta device. (A
            kernel that makes the scores anew on the way back does a fifth.)
    """

    def __init__(self) -> None:
        self.operations = 0

    def __enter__(self) -> Self:
        # Not a mode of functions: those are left within the backward pass, where checkpoints compute again.
        self._kept = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self._attend  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        F.scaled_dot_product_attention = self._kept

    def _attend(self, *tensors: Tensor, **_: Any) -> Tensor:
        if torch.is_autocast_enabled(tensors[0].device.type):
            tensors = tuple(t.to(torch.get_autocast_dtype(t.device.type)) for t in tensors)
        out: Tensor = _Fused.apply(self, *tensors[:3])
        return out


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, counter: FusedAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        ctx.counter = counter
        ctx.products = 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        counter.operations += ctx.products
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        ctx.counter.operations += 2 * ctx.products
        return None, *(torch.empty_like(given) for given in ctx.saved_tensors[:3])


def nbytes(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.nbytes for m in modules for t in (*m.parameters(), *m.buffers()))


class Alive(TorchDispatchMode):
    """Bytes of the tensors made under it that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._known = 0, dict[int, tuple[StorageWeakRef, int]]()
        self._most = 0  # of the tensors known, were they all alive still

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # What an operation took in is alive together with what it makes.
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                key = storage._cdata
                if key not in self._known or self._known[key][0].expired():
                    self._known[key] = (StorageWeakRef(storage), storage.nbytes())
                    self._most += storage.nbytes()
        if self._most > self.peak:
            self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self) -> int:
        """Of what is alive now."""
        self._known = {key: entry for key, entry in self._known.items() if not entry[0].expired()}
        self._most = sum(size for _, size in self._known.values())
        return self._most

    def forget_peak(self) -> None:
        """The most counts anew from what is alive now."""
        self.peak = self.bytes()
