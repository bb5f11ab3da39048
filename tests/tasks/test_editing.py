"""Editing: what is kept stays, the rest is drawn."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nextscale.core.random import ImageDraws
from nextscale.tasks.generation.editing import KeptTokens, box_mask, edit
from nextscale.tasks.generation.var import VAR


@pytest.fixture
def image() -> Tensor:
    return torch.rand(3, 8, 8)


def test_boxes() -> None:
    mask = box_mask((4, 4), (0.25, 0.0, 0.75, 0.6), keep_inside=True)
    assert mask.tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert torch.equal(box_mask((4, 4), (0.25, 0.0, 0.75, 0.6), keep_inside=False), 1 - mask)
    assert box_mask((4, 4), (0, 0, 1, 1), keep_inside=False).sum() == 0
    for box in ((0.5, 0, 0.4, 1), (0, -0.1, 1, 1), (0, 0, 1, 1.1)):
        with pytest.raises(ValueError, match=r"the box \(.*top, left, bottom, right"):
            box_mask((4, 4), box, keep_inside=True)


def test_kept_cells_carry_the_images_codes_and_others_do_not(var: VAR, image: Tensor) -> None:
    schedule, quantizer = var.config.schedule, var.tokenizer.quantizer
    codes = quantizer.lookup(var.tokenizer.encode(image[None] * 2 - 1))
    mask = box_mask((4, 4), (0, 0, 0.5, 1), keep_inside=True)
    control = KeptTokens(codes, mask, schedule)
    steps = list(var.steps(torch.tensor([1, 2]), draws=ImageDraws([0, 1]), controls=[control]))
    kept = [control.kept(k) for k in range(3)]
    assert [k.tolist() for k in kept[:2]] == [[True], [True, True, False, False]]
    assert torch.equal(kept[2].view(4, 4), mask.bool())
    for k, step in enumerate(steps):
        start, stop = schedule.ranges[k]
        own = codes[:, start:stop].expand(2, -1, -1)
        drawn = quantizer.lookup(step.tokens)
        assert torch.equal(step.codes[:, kept[k]], own[:, kept[k]])
        assert torch.equal(step.codes[:, ~kept[k]], drawn[:, ~kept[k]])


def test_all_kept_is_the_reconstruction_and_nothing_kept_is_not(var: VAR, image: Tensor) -> None:
    rebuilt = (var.tokenizer.decode(var.tokenizer.encode(image[None] * 2 - 1)) + 1) / 2
    kept = edit(var, image, torch.ones(4, 4), n=2)
    torch.testing.assert_close(kept, rebuilt.expand(2, -1, -1, -1), rtol=0, atol=1e-5)
    drawn = edit(var, image, torch.zeros(4, 4), n=2)
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-2)
    torch.testing.assert_close(edit(var, image, torch.zeros(4, 4), seed=1), drawn[1:], rtol=0, atol=1e-5)


def test_class_and_no_class(var: VAR, image: Tensor) -> None:
    mask = torch.zeros(4, 4)
    none = edit(var, image, mask, seed=2)
    assert torch.equal(edit(var, image, mask, [None], seed=2), none)
    assert torch.equal(edit(var, image, mask, 5, seed=2), none)
    assert not torch.equal(edit(var, image, mask, "owl", seed=2), none)


def test_errors(var: VAR, image: Tensor, tiny: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"the image is \(3, 6, 8\), the scales"):
        edit(var, image[:, :6], torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"the mask is \(8, 8\), expected the finest grid, \(4, 4\)"):
        edit(var, image, torch.zeros(8, 8))
    with pytest.raises(ValueError, match="1 seeds were given for 2 images"):
        edit(var, image, torch.zeros(4, 4), n=2, seed=[1])
