"""Residual quantisation: one invariant in several forms, and the published tables."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nextscale.core.quantizer import QuantizerConfig, ResidualQuantizer, smoother_index
from nextscale.core.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule.grids([(1, 1), (2, 3), (4, 5)])
CONFIG = QuantizerConfig(vocabulary=12, channels=4, smoothers=2)


def randomised(**changes: Any) -> ResidualQuantizer:
    quantizer = ResidualQuantizer(replace(CONFIG, **changes))
    torch.nn.init.normal_(quantizer.codebook.weight)
    return quantizer


VARIANTS = [{}, {"smoothers": 3}, {"smoothers": 1}, {"smoothing": 0.0}, {"unit_norm": True}]


@pytest.mark.parametrize("changes", VARIANTS)
def test_stepping_is_teacher_forcing_and_decoding_is_encoding(changes: dict[str, Any]) -> None:
    quantizer = randomised(**changes)
    with torch.inference_mode():
        tokens, totals = quantizer.encode(torch.randn(2, 4, 4, 5), SCHEDULE)
        flat = torch.cat(tokens, 1)
        for mine, theirs in zip(quantizer.decode(flat, SCHEDULE), totals, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
        total, inputs = quantizer.begin(2, SCHEDULE), []
        for k in range(len(SCHEDULE)):
            total = total + quantizer.contribution(quantizer.lookup(tokens[k]), SCHEDULE, k)
            if k + 1 < len(SCHEDULE):
                inputs.append(quantizer.next_input(total, SCHEDULE, k + 1))
    teacher = quantizer.teacher_inputs(flat, SCHEDULE)
    torch.testing.assert_close(torch.cat(inputs, 1), teacher, rtol=0, atol=1e-6)
    torch.testing.assert_close(total, totals[-1], rtol=0, atol=1e-6)
    # A prefix in use gives the prefix, also where the last scale's tokens are missing.
    torch.testing.assert_close(quantizer.teacher_inputs(flat[:, :1], SCHEDULE, 2), teacher[:, :6])


def test_encode_by_the_papers_algorithm() -> None:
    quantizer = randomised()
    features = torch.randn(1, 4, 4, 5)
    rest, expected = features.clone(), []
    with torch.no_grad():
        for k, scale in enumerate(SCHEDULE.scales):
            z = F.adaptive_avg_pool2d(rest, scale.grid)
            cells = z[0].flatten(1).T
            found = torch.cdist(cells.double(), quantizer.codebook.weight.double()).argmin(1)
            h = quantizer.codebook(found).T.reshape(1, 4, *scale.grid)
            h = h if scale.grid == (4, 5) else F.interpolate(h, size=(4, 5), mode="bicubic")
            conv = quantizer.smoothers[smoother_index(2, 3)[k]].conv
            rest = rest - (0.5 * h + 0.5 * F.conv2d(h, conv.weight, conv.bias, padding=1))
            expected.append(found[None])
    tokens, totals = quantizer.encode(features, SCHEDULE)
    assert torch.equal(torch.cat(tokens, 1), torch.cat(expected, 1))
    torch.testing.assert_close(features - totals[-1], rest, rtol=0, atol=1e-5)


def test_search_takes_the_first_of_equal_codes_and_can_go_by_angle() -> None:
    quantizer = randomised(vocabulary=3)
    codes = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [9.0, 9.0, 0, 0]])
    z = torch.tensor([[1.0, 0.2, 0, 0], [2.0, 2.0, 0, 0]])
    quantizer.codebook.weight.data = codes
    assert quantizer.nearest(z).tolist() == [0, 0]
    by_angle = randomised(vocabulary=3, unit_norm=True)
    by_angle.codebook.weight.data = codes
    assert by_angle.nearest(z).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("count", "scales", "expected"),
    [
        (4, 10, "0 0 1 1 1 2 2 3 3 3"),
        (4, 14, "0 0 0 1 1 1 1 2 2 2 2 3 3 3"),
        (4, 5, "0 1 2 2 3"),
        (1, 10, "0 0 0 0 0 0 0 0 0 0"),
        (4, 1, "0"),
    ],
)
def test_smoothers_are_spread_as_published(count: int, scales: int, expected: str) -> None:
    assert " ".join(map(str, smoother_index(count, scales))) == expected


def test_training_pass_matches_encoding_and_its_loss_is_the_papers() -> None:
    quantizer = randomised()
    features = torch.randn(2, 4, 4, 5, requires_grad=True)
    output = quantizer(features, SCHEDULE)
    tokens, totals = quantizer.encode(features, SCHEDULE)
    assert all(torch.equal(a, b) for a, b in zip(output.tokens, tokens, strict=True))
    torch.testing.assert_close(output.features, totals[-1], rtol=0, atol=1e-5)
    loss = sum((1.25 * F.mse_loss(t, features) for t in totals), torch.zeros(())) / 3
    torch.testing.assert_close(output.loss, loss)
    weights = torch.randn_like(output.features)
    gradient = torch.autograd.grad((output.features * weights).sum(), features, retain_graph=True)[0]
    assert torch.equal(gradient, weights)  # straight through
    # Commitment alone reaches the features; the codebook term reaches codes and smoothers.
    expected = sum((0.25 * 2 * (features - t) / features.numel() for t in totals), torch.zeros(())) / 3
    gradients = torch.autograd.grad(output.loss, [features, quantizer.codebook.weight])
    torch.testing.assert_close(gradients[0], expected)
    assert gradients[1].abs().sum() > 0


def test_float32_whatever_surrounds_it() -> None:
    quantizer = randomised()
    features = torch.randn(1, 4, 4, 5)
    plain = quantizer(features, SCHEDULE)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(features, SCHEDULE)
    assert torch.equal(plain.features, mixed.features)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"grid is \(3, 3\), the schedule '1 2x3 4x5' ends at \(4, 5\)"):
        randomised().encode(torch.zeros(1, 4, 3, 3), SCHEDULE)
    with pytest.raises(ValueError, match="5 positions, the schedule"):
        randomised().decode(torch.zeros(1, 5, dtype=torch.int64), SCHEDULE)
    with pytest.raises(ValueError, match="0 x 4"):
        QuantizerConfig(vocabulary=0, channels=4)
