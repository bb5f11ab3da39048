"""Bits drawn from two scores each are what a two-way softmax with its filters would draw."""

import pytest
import torch

from nextscale.core.bitwise import BitwiseEmitter, bit_cross_entropy
from nextscale.core.heads import filter_logits
from nextscale.core.random import BatchDraws, ImageDraws


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (1, 0.0), (2, 0.9), (900, 0.97), (0, 0.7)])
def test_probabilities_are_those_of_the_filtered_softmax(top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    expected = filter_logits(logits.unflatten(-1, (-1, 2)), top_k, top_p).softmax(-1)[..., 1]
    ones = BitwiseEmitter(top_k, top_p).probabilities(logits, 0)
    torch.testing.assert_close(ones, expected)
    bits = BitwiseEmitter(top_k, top_p).draw(logits, BatchDraws(torch.Generator().manual_seed(3)), 0)
    rows = torch.stack((1 - expected, expected), -1).view(-1, 2)
    drawn = torch.multinomial(rows, 1, replacement=True, generator=torch.Generator().manual_seed(3))
    assert torch.equal(bits.flatten(), drawn.flatten().bool())


def test_loss_is_the_two_way_cross_entropy() -> None:
    logits, bits = torch.randn(2, 3, 8), torch.rand(2, 3, 4) < 0.5
    expected = torch.nn.functional.cross_entropy(logits.view(-1, 2), bits.long().flatten(), reduction="none")
    torch.testing.assert_close(bit_cross_entropy(logits, bits).flatten(), expected)


def test_an_image_draws_the_same_bits_in_any_batch() -> None:
    ones = torch.full((3, 40), 0.5)
    together = ImageDraws([4, 5, 6]).bits(ones)
    assert torch.equal(ImageDraws([5]).bits(ones[:1])[0], together[1])
    assert torch.equal(ImageDraws([1]).bits(torch.tensor([[0.0, 1.0]])), torch.tensor([[False, True]]))


@pytest.mark.parametrize("options", [{"top_k": -1}, {"top_p": 1.5}, {"temperature": [1.0, 0.0]}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .*; expected"):
        BitwiseEmitter(**options)
