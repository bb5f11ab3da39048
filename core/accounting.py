"""What a computation takes, counted instead of measured: operations, and bytes that are alive at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


# PyTorch's table has the kernels of GPUs only; the CPU's does the same products.
_CPU_ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def operation_counter() -> FlopCounterMode:
    """Counts the floating-point operations of products, convolutions and attention made under it."""
    return FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)


def count_operations(call: Callable[[], object]) -> int:
    """Floating-point operations of the products and convolutions of a call; free on the meta device."""
    with operation_counter() as counter:
        call()
    return int(counter.get_total_flops())


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
