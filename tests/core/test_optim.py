"""The schedule's shapes, the groups that decay, the average."""

import math

import pytest
import torch
from torch import nn

from nextscale.core.optim import ExponentialAverage, Schedule, parameter_groups
from nextscale.core.transformer import NextScaleTransformer, TransformerConfig

TOTAL, WARMUP, END = 1001, 100, 0.1


def by_hand(kind: str, p: float) -> float:
    """The rate after the warm-up at a share p of the rest, as the official trainer defines it."""
    match kind:
        case "lin0":
            return 1 if p < 0.05 else END + (1 - END) * (1 - p) / 0.95
        case "lin":
            return 1 if p < 0.15 else END + (1 - END) * (1 - p) / 0.85
        case "lin00":
            return END + (1 - END) * (1 - p)
        case "cos":
            return END + (1 - END) * (0.5 + 0.5 * math.cos(math.pi * p))
        case "exp":
            return 1 if p < 0.15 else END ** ((p - 0.15) / 0.85)
        case "lin0.4":
            middle = (1 + END + (1 - END) * 0.6) / 2
            return 1 + (middle - 1) * p / 0.4 if p < 0.4 else END + (middle - END) * (1 - p) / 0.6
    return 1


@pytest.mark.parametrize("kind", ["lin0", "lin", "lin00", "cos", "exp", "lin0.4", "constant"])
def test_rate(kind: str) -> None:
    schedule = Schedule(kind, WARMUP, TOTAL, start=0.005, end=END)
    assert schedule.rate(0) == 0.005
    assert schedule.rate(50) == pytest.approx(0.005 + 0.995 / 2)
    for step in range(WARMUP, TOTAL, 25):
        assert schedule.rate(step) == pytest.approx(by_hand(kind, (step - WARMUP) / 900)), step
    assert schedule.rate(TOTAL - 1) == pytest.approx(1 if kind == "constant" else END)


def test_weight_decay_goes_by_half_a_cosine() -> None:
    schedule = Schedule(total=101, decay=0.05, decay_end=0.08)
    assert [schedule.weight_decay(s) for s in (0, 50, 100)] == pytest.approx([0.05, 0.065, 0.08])
    assert Schedule(total=1).rate(0) == 1


@pytest.mark.parametrize("kind", ["linear", "lin1.5", "linx", "step", ""])
def test_unknown_kinds_are_named(kind: str) -> None:
    with pytest.raises(ValueError, match=f"schedule '{kind}' is unknown; there are lin0"):
        Schedule(kind)


def test_biases_scales_and_offsets_do_not_decay() -> None:
    model = NextScaleTransformer(TransformerConfig(8, 1, 2, conditioning="shared"))
    model.blocks[0].feed_forward.requires_grad_(False)
    decays, rest = parameter_groups(model, 0.05)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in decays["params"]} == {
        "shared_modulation.linear.weight",
        "blocks.0.attention.qkv.weight",
        "blocks.0.attention.projection.weight",
    }
    assert {names[id(p)] for p in rest["params"]} == {
        "shared_modulation.linear.bias",
        "blocks.0.modulation_offset",
        "blocks.0.attention.query_bias",
        "blocks.0.attention.value_bias",
        "blocks.0.attention.projection.bias",
        "blocks.0.attention.log_scale",
    }
    optimizer = torch.optim.AdamW([decays, rest], lr=1.0)
    rate = Schedule("constant", total=3, decay=0.0, decay_end=0.1).apply(optimizer, 0.5, 2)
    assert rate == 0.5
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.1), (0.5, 0.0)]


def test_average_follows_its_formula_and_resumes() -> None:
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    average, expected = ExponentialAverage(module, 0.5), 0.0
    for n in range(1, 12):
        module.weight.data.fill_(float(n))
        average.update(module)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        if n == 6:
            again = ExponentialAverage(nn.Linear(1, 1, bias=False), 0.5)
            again.load_state_dict(average.state_dict())
            average = again
    assert average.shadow["weight"].item() == pytest.approx(expected, rel=1e-5)
    average.copy_to(module)
    assert module.weight.item() == pytest.approx(expected, rel=1e-5)


def test_factors_of_the_learning_rate():
    model = nn.ModuleDict({"slow": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    model.rates = {"slow.": 0.1, "low.": 9.0}
    groups = parameter_groups(model, 0.5)
    assert [(g["rate"], g["decays"], len(g["params"])) for g in groups] == [
        (1.0, True, 1),
        (1.0, False, 1),
        (0.1, True, 1),
        (0.1, False, 1),
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    assert Schedule("constant", total=3).apply(optimizer, 0.5, 1) == 0.5
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.5, 0.05, 0.05]
