"""Attention for next-scale models, over interchangeable kernels.

Usually no mask is built. While sampling, the cache holds exactly what may be seen; in training, the queries
of each scale see a prefix of the keys, so one unmasked call per scale does the work with fewer score
entries than a dense mask (286,434 of 462,400 for VAR at 256 px).

Tensors are (batch, positions, heads, head size) throughout.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nextscale.core.schedule import Segment

Visibility = Sequence[Segment] | Tensor
"""Which keys each query sees: segments, or the bias that :func:`visibility_bias` makes of them."""


class Kernel(Protocol):
    """One way to compute softmax(scale q k^T) v."""

    @property
    def name(self) -> str: ...

    def supports(self, query: Tensor) -> bool:
        """Whether the kernel computes this query's device, dtype and head size, with gradients if needed."""
        ...

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor: ...


@dataclass(frozen=True)
class ScaledDotProduct:
    """PyTorch's ``scaled_dot_product_attention``: everywhere."""

    name: str = "sdpa"

    def supports(self, query: Tensor) -> bool:
        return True

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


@dataclass(frozen=True)
class XFormers:
    """xFormers' ``memory_efficient_attention``: NVIDIA GPUs.

    Chosen by capability: the package imports on machines without CUDA and fails only at the first call.
    """

    name: str = "xformers"

    def supports(self, query: Tensor) -> bool:
        return (
            query.device.type == "cuda"
            and query.dtype in (torch.float16, torch.bfloat16, torch.float32)
            and query.shape[-1] % 8 == 0
            and query.shape[-1] <= 256
            and _xformers_runs(query.device, query.dtype, query.shape[-1])
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(query, key, value, scale=scale)


@cache
def _xformers_runs(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether forward and backward really run here: found by a small trial, once per device, dtype and size."""
    if importlib.util.find_spec("xformers") is None:
        return False
    try:
        from xformers.ops import memory_efficient_attention

        with torch.inference_mode(False), torch.enable_grad():
            q = torch.zeros(1, 8, 1, head_size, device=device, dtype=dtype, requires_grad=True)
            memory_efficient_attention(q, q, q, scale=1.0).sum().backward()
    except (ImportError, NotImplementedError, RuntimeError, ValueError):
        return False
    return True


KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (XFormers(), ScaledDotProduct())}
"""In order of preference."""


def select_kernel(query: Tensor, name: str | None = None) -> Kernel:
    """The first kernel that supports ``query``, or the one that is named.

    Raises:
        ValueError: the named kernel is unknown or cannot compute this query.
    """
    if name is None:
        return next(kernel for kernel in KERNELS.values() if kernel.supports(query))
    if name not in KERNELS:
        raise ValueError(f"unknown attention kernel {name!r}; there are {', '.join(KERNELS)}")
    if not KERNELS[name].supports(query):
        raise ValueError(
            f"attention kernel {name!r} cannot run on {query.device.type} in {query.dtype} with head size "
            f"{query.shape[-1]}; leave the kernel unnamed to have one chosen"
        )
    return KERNELS[name]


def attend(
    query: Float[Tensor, "batch queries heads size"],
    key: Float[Tensor, "batch keys heads size"],
    value: Float[Tensor, "batch keys heads size"],
    scale: float,
    kernel: str | None = None,
) -> Float[Tensor, "batch queries heads size"]:
    """softmax(``scale`` q k^T) v over all the keys."""
    if kernel is None and _dense_is_faster(query):
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
        weights = torch.bmm(q * scale, k.mT).softmax(-1).to(v.dtype)
        return torch.bmm(weights, v).unflatten(0, (len(query), -1)).transpose(1, 2)
    return select_kernel(query, kernel)(query, key, value, scale)


def attend_visible(
    query: Float[Tensor, "batch queries heads size"],
    key: Float[Tensor, "batch keys heads size"],
    value: Float[Tensor, "batch keys heads size"],
    scale: float,
    visible: Bool[Tensor, "batch keys"] | None,
) -> Float[Tensor, "batch queries heads size"]:
    """The same where only some of each row's keys count, for memories of various length; None: all."""
    if visible is None:
        return attend(query, key, value, scale)
    mask = visible[:, None, None]
    if _dense_is_faster(query):
        bias = torch.where(mask, 0.0, -torch.inf).to(query.dtype)
        return _attend_biased(query, key, value, scale, bias.expand(-1, query.shape[2], -1, -1).flatten(0, 1))
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def attend_segments(
    query: Float[Tensor, "batch positions heads size"],
    key: Float[Tensor, "batch keys heads size"],
    value: Float[Tensor, "batch keys heads size"],
    scale: float,
    segments: Visibility,
    kernel: str | None = None,
) -> Float[Tensor, "batch positions heads size"]:
    """Attention where each segment of the queries sees a prefix of the keys.

    The segments must cover the queries in order. Key prefixes are shared by several calls and their
    gradients accumulate, as autograd does for views.
    """
    if isinstance(segments, Tensor):
        return _attend_biased(query, key, value, scale, segments)
    if kernel is None and _dense_is_faster(query):
        return _attend_biased(query, key, value, scale, _bias(tuple(segments), key.shape[1]))
    run = select_kernel(query, kernel)
    outputs = [run(query[:, s.start : s.stop], key[:, : s.visible], value[:, : s.visible], scale) for s in segments]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


DENSE_LENGTH = 256
"""Longest sequence for which one dense masked product trains faster than one call per scale, on a CPU in float32; in
half precision it is twice as long."""


def _dense_is_faster(query: Tensor) -> bool:
    # The CPU's fused kernel has a slow backward pass: for short sequences the wasted scores cost less than it.
    training = torch.is_grad_enabled() and query.requires_grad
    longest = DENSE_LENGTH if query.dtype == torch.float32 else 2 * DENSE_LENGTH
    return training and query.device.type == "cpu" and query.shape[1] <= longest


def _attend_biased(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor) -> Tensor:
    if not _dense_is_faster(query):
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale).transpose(1, 2)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    weights = torch.baddbmm(bias.to(q.dtype), q, k.mT, alpha=scale).softmax(-1).to(v.dtype)
    return torch.bmm(weights, v).unflatten(0, (len(query), -1)).transpose(1, 2)


def visibility_bias(segments: Sequence[Segment]) -> Float[Tensor, "queries keys"]:
    """What is added to the scores instead of cutting the queries into segments: 0 where a key is seen, else -inf.

    It costs more than the segments, but a compiled graph holds for every list of the same length, and a length need
    not be a constant of the graph: for training with lists that change from step to step.
    """
    return _bias(tuple(segments), segments[-1].visible)


@cache
def _bias(segments: tuple[Segment, ...], keys: int) -> Tensor:
    """float32 (queries, keys): 0 where a query may see a key, else -inf."""
    with torch.inference_mode(False):
        visible = torch.cat([torch.full((s.stop - s.start,), s.visible) for s in segments])
        return torch.where(torch.arange(keys) < visible[:, None], 0.0, -torch.inf)
