"""Keys and values of earlier scales, with and without gradients."""

import torch

from nextscale.core.cache import GradientCache, KeyValueCache


def test_gradient_cache_gives_the_same_and_lets_gradients_through():
    torch.manual_seed(0)
    plain = KeyValueCache(2, 1, 5, 2, 4, dtype=torch.float32, device="cpu")
    kept = GradientCache(2)
    assert kept.length == kept.nbytes == 0
    weight = torch.ones((), requires_grad=True)
    total = torch.zeros(())
    for count in (1, 4):
        key, value = torch.randn(2, 1, count, 2, 4)
        expected = plain.append(1, key, value)
        found = kept.append(1, key * weight, value * weight)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        total = total + found[0].square().sum() + found[1].sum()
    total.backward()  # the first scale's keys are still what they were
    assert weight.grad is not None and weight.grad != 0
    assert (kept.filled(0), kept.filled(1), kept.length) == (0, 5, 5) and kept.nbytes == 2 * 5 * 2 * 4 * 4
