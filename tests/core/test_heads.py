"""Filters against a plain computation, choice by choice; emission of one scale."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextscale.core.heads import CategoricalEmitter, CategoricalHead, filter_logits
from nextscale.core.random import ImageDraws


def kept_by_hand(logits: list[float], top_k: int, top_p: float) -> set[int]:
    kept = set(range(len(logits)))
    if 0 < top_k < len(logits):
        threshold = sorted(logits, reverse=True)[top_k - 1]
        kept = {i for i in kept if logits[i] >= threshold}
    if top_p:
        total, passed = sum(math.exp(logits[i]) for i in kept), 0.0
        order = sorted(kept, key=lambda i: logits[i])
        for i in order[:-1]:
            passed += math.exp(logits[i]) / total
            if passed <= 1 - top_p:
                kept = kept - {i}
    return kept


# Distinct and spaced, so that neither rounding nor the order of equal choices decides.
LOGITS = st.lists(st.integers(-30, 30), min_size=1, max_size=12, unique=True).map(
    lambda values: [v / 7.3 for v in values]
)


@given(LOGITS, st.integers(0, 14), st.sampled_from([0.0, 0.013, 0.317, 0.751, 0.963, 1.0]))
def test_filter_by_hand(logits: list[float], top_k: int, top_p: float) -> None:
    filtered = filter_logits(torch.tensor([[logits]]), top_k, top_p)[0, 0]
    kept = {i for i, value in enumerate(filtered.tolist()) if value > -math.inf}
    assert kept == kept_by_hand(logits, top_k, top_p)
    assert all(filtered[i] == torch.tensor(logits)[i] for i in kept)


def test_ties_at_the_threshold_stay_and_the_likeliest_always_does() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    assert filter_logits(logits, 2).isinf().tolist() == [True, False, False, False, True]
    assert filter_logits(torch.zeros(4), 1).isinf().tolist() == [False] * 4
    assert filter_logits(torch.tensor([0.0, 50.0]), 0, 1e-6).isinf().tolist() == [True, False]
    assert int(filter_logits(torch.zeros(4), 0, 0.5).isfinite().sum()) == 2
    given = torch.randn(3, 8)
    before = given.clone()
    filter_logits(given, 2, 0.5)
    assert torch.equal(given, before)


@pytest.mark.parametrize("step", [None, 0.25, 1.0])
@pytest.mark.parametrize("top_k", [1, 7, 30])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.96, 1.0])
def test_nucleus_of_what_top_k_left_is_that_of_all(step: float | None, top_k: int, top_p: float) -> None:
    logits = torch.randn(2, 40, 60) * 2
    logits = logits if step is None else (logits / step).round() * step  # with equal choices across both edges
    filtered = filter_logits(logits, top_k, top_p)
    assert torch.equal(filtered, filter_logits(filter_logits(logits, top_k), 0, top_p))


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 0.0), (0, 1.2), (0, -0.1)])
def test_wrong_filters_are_named(top_k: int, top_p: float) -> None:
    with pytest.raises(ValueError, match=f"top_k is {top_k} and top_p {top_p}"):
        filter_logits(torch.zeros(3), top_k, top_p)


def test_options_may_be_given_per_scale() -> None:
    logits = torch.randn(1, 3, 6)
    emitter = CategoricalEmitter(top_k=[1, 6], temperature=[1.0, 2.5])
    assert emitter.probabilities(logits, 0).count_nonzero() == 3
    torch.testing.assert_close(emitter.probabilities(logits, 1), (logits / 2.5).softmax(-1))
    with pytest.raises(ValueError, match="has 2 entries, one is needed for each scale"):
        emitter.probabilities(logits, 2)
    for temperature in (0.0, [1.0, -1.0], math.nan):
        with pytest.raises(ValueError, match="above 0"):
            CategoricalEmitter(temperature=temperature)


@pytest.mark.parametrize("smooth", [False, True])
def test_a_draw_is_made_of_allowed_codes(smooth: bool) -> None:
    logits, codebook = torch.randn(2, 5, 8), torch.eye(8)
    tokens, codes = CategoricalEmitter(top_k=3, smooth=smooth).draw(logits, codebook, ImageDraws([1, 2]), 0, 1.0)
    allowed = filter_logits(logits, 3).isfinite()
    assert allowed.gather(2, tokens[..., None]).all()
    assert (codes[~allowed] == 0).all()
    torch.testing.assert_close(codes.sum(-1), torch.ones(2, 5))
    assert bool((codes == codebook[tokens]).all()) is not smooth


def test_a_mixture_does_not_depend_on_the_temperature_of_the_draw() -> None:
    logits, codebook = torch.randn(2, 5, 8), torch.eye(8)
    cold, hot = (
        CategoricalEmitter(temperature=temperature, smooth=True).draw(logits, codebook, ImageDraws([1, 2]), 0, 0.5)
        for temperature in (0.2, 5.0)
    )
    assert torch.equal(cold[1], hot[1]) and not torch.equal(cold[0], hot[0])


def test_head_normalises_then_modulates() -> None:
    head = CategoricalHead(4, 7, condition_width=3)
    x, condition = torch.randn(2, 5, 4), torch.randn(2, 3)
    scale, shift = head.modulation.linear(torch.nn.functional.silu(condition)).view(2, 1, 2, 4).unbind(2)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    expected = head.linear(normed * (1 + scale) + shift)
    torch.testing.assert_close(head(x, head.modulate(condition)), expected, rtol=1e-4, atol=1e-5)
