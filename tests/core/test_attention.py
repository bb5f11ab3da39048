"""Attention by segments against a dense float64 mask; kernels by capability; the cache."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nextscale.core.attention import KERNELS, attend, attend_segments, select_kernel, visibility_bias
from nextscale.core.cache import KeyValueCache
from nextscale.core.schedule import ScaleSchedule


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("kernel", [None, "sdpa"])
@pytest.mark.parametrize("sides", [(1, 2, 3), (1, 2, 4, 8, 14)])  # shorter and longer than the dense limit
def test_segments_are_the_masked_product_and_its_gradients(kernel: str | None, sides: tuple[int, ...]) -> None:
    schedule = ScaleSchedule.squares(*sides)
    tensors = [torch.randn(2, schedule.length, 2, 8, requires_grad=True) for _ in range(3)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    weights = torch.randn(2, schedule.length, 2, 8)
    out = attend_segments(*tensors, 0.7, schedule.segments, kernel)
    expected = dense(*exact, 0.7, schedule.mask())
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    for mine, theirs in zip(tensors, exact, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=1e-5)
    with torch.no_grad():
        again = attend_segments(*tensors, 0.7, schedule.segments, kernel)
    torch.testing.assert_close(again, out, rtol=0, atol=2e-6)


def test_attend_sees_all_keys() -> None:
    q, k, v = torch.randn(2, 3, 2, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    expected = dense(q, k, v, 0.3, torch.ones(3, 5, dtype=torch.bool))
    torch.testing.assert_close(attend(q, k, v, 0.3).double(), expected, rtol=0, atol=2e-6)


def test_kernels_are_chosen_by_capability_not_by_import() -> None:
    query = torch.zeros(1, 4, 2, 8)
    assert next(iter(KERNELS)) == "xformers"
    assert select_kernel(query).name == "sdpa"
    assert not KERNELS["xformers"].supports(query)
    with pytest.raises(ValueError, match=r"'xformers' cannot run on cpu in torch\.float32 with head size 8"):
        select_kernel(query, "xformers")
    with pytest.raises(ValueError, match="unknown attention kernel 'flash'; there are xformers, sdpa"):
        attend(query, query, query, 1.0, "flash")


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 2))
def test_cache_is_concatenation(lengths: list[int], layers: int) -> None:
    cache = KeyValueCache(layers, 2, sum(lengths), 3, 4, dtype=torch.float32, device="cpu")
    for layer in range(layers):
        keys, values = ([torch.randn(2, n, 3, 4) for n in lengths] for _ in range(2))
        for i in range(len(lengths)):
            k, v = cache.append(layer, keys[i], values[i])
            assert torch.equal(k, torch.cat(keys[: i + 1], 1))
            assert torch.equal(v, torch.cat(values[: i + 1], 1))
            assert cache.filled(layer) == sum(lengths[: i + 1])
    assert cache.nbytes == 2 * layers * 2 * sum(lengths) * 3 * 4 * 4
    with pytest.raises(ValueError, match=f"room for {sum(lengths)} positions, {sum(lengths) + 1} were"):
        cache.append(0, torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))


@pytest.mark.parametrize("length", ["short", "long"])
def test_a_bias_stands_for_segments(length: str) -> None:
    """Both of its forms, values and gradients."""
    sides = (1, 2, 4) if length == "short" else (1, 2, 16)
    segments = ScaleSchedule.squares(*sides).segments
    torch.manual_seed(0)
    tensors = [torch.randn(2, segments[-1].visible, 2, 4, requires_grad=True) for _ in range(3)]
    results = []
    for visible in (segments, visibility_bias(segments)):
        out = attend_segments(*tensors, 0.7, visible, None)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for ours, other in zip(*results, strict=True):
        assert torch.allclose(ours, other, atol=1e-4)
