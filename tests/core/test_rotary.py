"""Rotary positions: what two tokens make of each other depends on how far apart they stand, along each axis."""

import pytest
import torch

from nextscale.core.rotary import grid_rotation, rotate


def test_scores_depend_on_the_difference_of_positions() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8)

    def score(query: tuple[float, float], key: tuple[float, float]) -> torch.Tensor:
        turned = [
            rotate(x, grid_rotation(torch.tensor([at[0]]), torch.tensor([at[1]]), 8))
            for x, at in ((q, query), (k, key))
        ]
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(score((5, 2), (3, 7)), score((12, 0), (10, 5)))
    assert not torch.allclose(score((5, 2), (3, 7)), score((5, 2), (4, 7)))
    assert not torch.allclose(score((5, 2), (3, 7)), score((2, 5), (7, 3)))


def test_first_half_turns_by_the_first_axis_and_lengths_stay() -> None:
    x = torch.randn(2, 3, 1, 16)
    turned = rotate(x, grid_rotation(torch.arange(3.0), torch.zeros(3), 16))
    assert torch.equal(turned[:, 0], x[:, 0])
    assert torch.equal(turned[..., 8:], x[..., 8:])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), grid_rotation(torch.arange(3.0), torch.zeros(3), 16)).dtype == torch.bfloat16


def test_head_size_must_divide() -> None:
    with pytest.raises(ValueError, match="multiple of 4 channels, got 6"):
        grid_rotation(torch.zeros(1), torch.zeros(1), 6)
