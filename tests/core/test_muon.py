"""Muon: PyTorch's own on matrices, AdamW on everything else, and what counts as a matrix."""

import pytest
import torch
from torch import nn

from nextscale.core.muon import Muon, hidden_matrices, muon_groups, orthogonalized
from nextscale.core.optim import parameter_groups
from nextscale.core.training import Interrupted

from .test_training import Noisy, rows, same, stop_at, trainer, weights


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 4)
    )


def test_singular_values_come_close_to_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 12, 40), (2, 40, 12), (1, 16, 16)):
        found = orthogonalized(torch.randn(shape) * 100)
        low, high = torch.linalg.svdvals(found.float()).aminmax()
        assert found.shape == shape and low > 0.3 and high < 1.3
    assert torch.equal(orthogonalized(torch.zeros(1, 9, 9)), torch.zeros(1, 9, 9, dtype=torch.bfloat16))


def test_matrices_are_the_weights_of_layers_inside() -> None:
    model = nn.ModuleDict({"body": network(), "head": nn.Linear(16, 16), "embedding": nn.Embedding(9, 9)})
    model["body"].register_parameter("scale", nn.Parameter(torch.ones(9, 9)))
    assert hidden_matrices(model) == {"body.0.weight", "body.3.weight"}  # the last has four rows


def test_it_is_pytorchs_on_matrices_and_adamw_on_the_rest() -> None:
    ours, theirs = network(), network()
    mine = Muon(muon_groups(ours, parameter_groups(ours, 0.1)), lr=0.01, betas=(0.9, 0.95))
    assert [group["matrices"] for group in mine.param_groups] == [True, False, False]
    named = dict(theirs.named_parameters())
    matrix = named.pop("3.weight")
    others = [torch.optim.Muon([matrix], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    kernel, last = named.pop("0.weight"), named.pop("4.weight")
    others.append(torch.optim.AdamW([last], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1))
    others.append(torch.optim.AdamW(list(named.values()), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0))
    flat = nn.Parameter(kernel.detach().flatten(1).clone())  # PyTorch's takes no other than two dimensions
    others.append(torch.optim.Muon([flat], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    x = torch.randn(64, 3, 4, 4)
    for _ in range(4):
        for model in (ours, theirs):
            model.zero_grad()
            (model(x) - x[:, 0, 0]).square().mean().backward()
        assert kernel.grad is not None
        flat.grad = kernel.grad.flatten(1).clone()
        mine.step()
        for other in others:
            other.step()
        with torch.no_grad():
            kernel.copy_(flat.view_as(kernel))
    for name, value in theirs.named_parameters():
        # Matrices are made orthogonal in bfloat16, here in stacks.
        torch.testing.assert_close(ours.get_parameter(name), value, rtol=0, atol=1e-3)
    assert (ours[3].weight - network()[3].weight).abs().mean() > 1e-3


class Deep(Noisy):
    """With a matrix inside."""

    def __init__(self) -> None:
        super().__init__()
        self.phases = {"net": nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 1))}


def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path) -> None:
    whole = trainer(tmp_path / "whole", Deep(), optimizer="muon", average=0.0)
    whole.run()
    with pytest.raises(Interrupted):
        trainer(tmp_path / "parts", Deep(), stop_at(6), optimizer="muon", average=0.0).run()
    again = trainer(tmp_path / "parts", Deep(), optimizer="muon", average=0.0)
    again.run()
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole") and same(weights(again), weights(whole))
    plain = trainer(tmp_path / "adamw", Deep(), average=0.0)
    plain.run()
    assert not same(weights(plain), weights(whole))
