"""Blocks: the whole sequence at once is the same as scale by scale; options of training."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from nextscale.core.random import sample_draws
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import NextScaleTransformer, TransformerConfig, draw_paths, drop_path

SCHEDULE = ScaleSchedule.squares(1, 2, 3)
CONFIG = TransformerConfig(width=16, depth=3, heads=2)


def randomised(config: TransformerConfig, condition_width: int | None = None) -> NextScaleTransformer:
    model = NextScaleTransformer(config, condition_width)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("conditioning", ["block", "shared", "none"])
@pytest.mark.parametrize("attention", ["cosine", "dot"])
def test_stepping_with_a_cache_is_teacher_forcing(conditioning: Any, attention: Any) -> None:
    model = randomised(replace(CONFIG, conditioning=conditioning, attention=attention), 5).eval()
    x = torch.randn(2, SCHEDULE.length, 16)
    modulations = None if conditioning == "none" else model.modulate(torch.randn(2, 5))
    at_once = model(x, modulations, SCHEDULE.segments)
    cache = model.allocate_cache(2, SCHEDULE.length, torch.float32)
    steps = [model(part, modulations, cache=cache) for part in SCHEDULE.split(x)]
    torch.testing.assert_close(torch.cat(steps, 1), at_once, rtol=1e-5, atol=1e-5)


def test_a_scale_depends_on_itself_and_the_earlier_ones_only() -> None:
    model = randomised(CONFIG).eval()
    x, modulations = torch.randn(1, SCHEDULE.length, 16), model.modulate(torch.randn(1, 16))
    before = model(x, modulations, SCHEDULE.segments)
    x[:, 5:] += 1
    after = model(x, modulations, SCHEDULE.segments)
    assert torch.equal(before[:, :5], after[:, :5])
    x[:, 4] += 1  # the last cell of the second scale reaches the first cell of its own scale
    assert not torch.equal(model(x, modulations, SCHEDULE.segments)[:, 1], after[:, 1])


def test_one_block_by_its_formula() -> None:
    config = TransformerConfig(width=8, depth=1, heads=2, attention="dot")
    block = randomised(config).blocks[0]
    x, modulation = torch.randn(2, 3, 8), torch.randn(2, 1, 6, 8)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)

    def norm(h: torch.Tensor) -> torch.Tensor:
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    h = norm(x) * (1 + scale1) + shift1
    parts = (h @ block.attention.qkv.weight.T).split(8, -1)
    biases = (block.attention.query_bias, 0, block.attention.value_bias)
    q, k, v = ((p + b).view(2, 3, 2, 4).transpose(1, 2) for p, b in zip(parts, biases, strict=True))
    mixed = ((q @ k.mT) * 0.25 / math.sqrt(4)).softmax(-1) @ v
    y = x + block.attention.projection(mixed.transpose(1, 2).reshape(2, 3, 8)) * gamma1
    hidden = block.feed_forward.expand(norm(y) * (1 + scale2) + shift2)
    gelu = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    expected = y + block.feed_forward.contract(gelu) * gamma2
    torch.testing.assert_close(block(x, modulation), expected, rtol=1e-4, atol=1e-5)


def test_blocks_without_modulation_are_those_of_a_neutral_one() -> None:
    modulated, plain = randomised(CONFIG), randomised(replace(CONFIG, conditioning="none"))
    state = {name: value for name, value in modulated.state_dict().items() if "modulation" not in name}
    assert set(state) == set(plain.state_dict())
    plain.load_state_dict(state)
    neutral = torch.zeros(1, 1, 6, 16)
    neutral[:, :, :2] = 1
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(plain(x, None), modulated(x, [neutral] * 3))
    with pytest.raises(ValueError, match="have no modulation"):
        plain.modulate(torch.randn(2, 16))


def test_cosine_scale_is_clamped_at_one_hundred() -> None:
    attention = randomised(CONFIG).blocks[0].attention
    with torch.no_grad():
        attention.log_scale.fill_(50.0)
    q, k, _ = attention.project(torch.randn(1, 4, 16))
    torch.testing.assert_close(q.norm(dim=-1), torch.full((1, 4, 2), 100.0))
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(1, 4, 2))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = randomised(replace(CONFIG, drop_path=0.5))  # the same branches must be dropped again
    x, condition = torch.randn(4, SCHEDULE.length, 16), torch.randn(4, 16)
    gradients = []
    for model.gradient_checkpointing in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        model(x, model.modulate(condition), SCHEDULE.segments).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_is_skipped_is_the_samples_own_draw(checkpointed: bool) -> None:
    """A batch of four gives what its halves give, in any order, whatever the global generator does."""
    model = randomised(replace(CONFIG, drop_path=0.5))
    x, condition, seeds = torch.randn(4, SCHEDULE.length, 16), torch.randn(4, 16), [7, 8, 9, 10]
    model.gradient_checkpointing = checkpointed

    def run(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        own = x[rows].requires_grad_()
        draws = sample_draws({"seeds": [seeds[row] for row in rows]}, "paths")
        with draw_paths(model.blocks, draws, len(rows)):
            out = model(own, model.modulate(condition[rows]), SCHEDULE.segments)
            return out.detach(), torch.autograd.grad(out.square().sum(), own)[0]

    whole, gradient = run([0, 1, 2, 3])
    for rows in ([3, 2], [1, 0]):
        part, part_gradient = run(rows)
        torch.testing.assert_close(part, whole[rows], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part_gradient, gradient[rows], rtol=1e-4, atol=1e-4)
    assert all(block.path_draws is None for block in model.blocks)
    with draw_paths(model.blocks, None, 4):
        assert not torch.equal(model(x, model.modulate(condition), SCHEDULE.segments), whole)


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    x = torch.ones(20_000, 2, 3)
    out = drop_path(x, 0.3, training=True)
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert torch.equal(out.amin((1, 2)), out.amax((1, 2)))
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    assert drop_path(x, 0.3, training=False) is x
    rates = [b.drop_probability for b in NextScaleTransformer(replace(CONFIG, drop_path=0.2)).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 15}, "width 15 is not a multiple of the 2 heads"),
        ({"heads": 0}, "must be at least 1"),
        ({"drop_path": 1.0}, r"drop_path is 1.0, a probability in \[0, 1\)"),
        ({"conditioning": "film"}, "conditioning is 'film', expected one of"),
        ({"attention": "linear"}, "attention is 'linear'"),
    ],
)
def test_wrong_configurations_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)
