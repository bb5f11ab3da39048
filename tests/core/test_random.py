"""Draws: the same alone and in a batch, never of what cannot be, and in the right proportions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextscale.core.random import BatchDraws, ImageDraws, sample_draws, step_draws


@given(st.integers(0, 2**40), st.integers(0, 63), st.integers(1, 40), st.integers(1, 5))
def test_an_image_gets_the_same_draws_alone_and_in_a_batch_of_64(
    seed: int, place: int, choices: int, tokens: int
) -> None:
    probabilities = torch.rand(64, tokens, choices, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    batch, alone = ImageDraws(range(seed, seed + 64)), ImageDraws([seed + place])
    for _ in range(2):
        assert batch.integers(1000, 64)[place] == alone.integers(1000, 1)[0]
        own = probabilities[place : place + 1]
        assert torch.equal(batch.categorical(probabilities)[place], alone.categorical(own)[0])
        assert torch.equal(batch.several(probabilities, 3)[place], alone.several(own, 3)[0])
        shape, device = (tokens, choices), torch.device("cpu")
        assert torch.equal(batch.exponential((64, *shape), device)[place], alone.exponential((1, *shape), device)[0])
        assert torch.equal(batch.uniform((64, *shape), device)[place], alone.uniform((1, *shape), device)[0])


@given(
    st.lists(st.sampled_from([0.0, 1e-30, 1e-7, 0.1, 1.0]), min_size=1, max_size=8).filter(any),
    st.sampled_from([0.0, 1e-8, 0.5, 1 - 2**-24]),
)
def test_what_has_no_probability_is_never_drawn(weights: list[float], uniform: float) -> None:
    probabilities = torch.tensor(weights, dtype=torch.float32)
    probabilities = (probabilities / probabilities.sum())[None, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *size, generator: torch.full(size, uniform))
        drawn = ImageDraws([0]).categorical(probabilities)
    assert drawn.shape == (1, 1)
    assert probabilities[0, 0, drawn.item()] > 0


@pytest.mark.parametrize("draws", [ImageDraws([3]), BatchDraws(torch.Generator().manual_seed(3))])
def test_proportions(draws: ImageDraws | BatchDraws) -> None:
    count, p = 20_000, torch.tensor([0.5, 0.0, 0.2, 0.05, 0.25])
    drawn = draws.categorical(p.expand(1, count, 5).contiguous())
    observed, expected = torch.bincount(drawn[0], minlength=5)[p > 0], (p * count)[p > 0]
    assert observed.sum() == count
    assert ((observed - expected).square() / expected).sum() < 16.3  # chi-square, 3 degrees, 0.1 %
    several = torch.bincount(draws.several(p.expand(1, count // 4, 5).contiguous(), 4).flatten(), minlength=5)[p > 0]
    assert several.sum() == count and ((several - expected).square() / expected).sum() < 16.3
    variates = draws.exponential((1, count), torch.device("cpu"))
    assert variates.mean().item() == pytest.approx(1, abs=0.03)
    assert variates.var().item() == pytest.approx(1, abs=0.1)
    shares = torch.histc(draws.uniform((1, count), torch.device("cpu")), 4, 0, 1) / count
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.02, rtol=0)


def test_integers_cover_their_range() -> None:
    drawn = ImageDraws(range(400)).integers(10, 400)
    assert drawn.unique().tolist() == list(range(10))
    drawn = BatchDraws(torch.Generator().manual_seed(0)).integers(10, 400)
    assert drawn.unique().tolist() == list(range(10))


def test_draws_of_training_belong_to_sample_and_step() -> None:
    cpu = torch.device("cpu")

    def drawn(seeds: list[int], purpose: str = "noise") -> torch.Tensor:
        return sample_draws({"seeds": seeds}, purpose).normal((len(seeds), 3), cpu)

    largest = 2**53 - 1
    assert torch.equal(drawn([4, 5, largest])[1:], drawn([5, largest]))
    assert not torch.equal(drawn([4]), drawn([4], "times"))
    torch.manual_seed(1)
    first = sample_draws({}, "noise").uniform((2, 3), cpu)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(2, 3), first)
    common = [float(torch.rand((), generator=step_draws(step, purpose))) for step, purpose in [(3, "a"), (3, "a")]]
    others = [float(torch.rand((), generator=step_draws(step, purpose))) for step, purpose in [(4, "a"), (3, "b")]]
    assert len({*common, *others}) == 3
