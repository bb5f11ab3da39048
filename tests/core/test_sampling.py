"""The loop over scales: guidance branches, early stops, controls."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from nextscale.core.heads import CategoricalEmitter
from nextscale.core.quantizer import QuantizerConfig, ResidualQuantizer
from nextscale.core.random import ImageDraws
from nextscale.core.sampling import Accepted, Branch, ScaleStep, classifier_free, sample
from nextscale.core.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule.squares(1, 2, 4)
CODES = 6


@dataclass
class Network:
    """Hidden states carry the sum of what was seen so far, so that a missing cache write shows."""

    weight: Tensor
    heads: list[tuple[int, int]] = field(default_factory=list)
    scales: list[int] = field(default_factory=list)

    def start(self, conditions: Tensor, schedule: ScaleSchedule) -> "Running":
        return Running(self, conditions, schedule)


class Running:
    def __init__(self, network: Network, conditions: Tensor, schedule: ScaleSchedule) -> None:
        self.network, self.schedule, self.memory = network, schedule, conditions.float()[:, None, None]
        self.index = 0

    def step(self, index: int, inputs: Tensor | None, first: int | None = None) -> Tensor:
        if first is not None and first < index:
            parts = [] if inputs is None else list(inputs.split(self.schedule.lengths[max(first, 1) : index + 1], 1))
            given = [None, *parts] if first == 0 else parts
            return torch.cat([self.step(first + i, part) for i, part in enumerate(given)], 1)
        self.index = index
        self.network.scales.append(index)
        tokens = self.schedule[index].tokens
        x = torch.zeros(1, tokens, 4) if inputs is None else inputs
        x = x.repeat(len(self.memory) // len(x), 1, 1)
        self.memory = self.memory + x.sum((1, 2), keepdim=True) + 0.1
        return torch.cat((x, self.memory.expand(-1, tokens, 1)), -1)

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        self.network.heads.append((self.index, len(hidden[rows])))
        return torch.sin(hidden[rows]) @ self.network.weight


def pyramid() -> ResidualQuantizer:
    quantizer = ResidualQuantizer(QuantizerConfig(CODES, 4))
    torch.nn.init.normal_(quantizer.codebook.weight)
    return quantizer


def run(branches: list[Branch], network: Network, quantizer: ResidualQuantizer, **options: object) -> list[ScaleStep]:
    draws = ImageDraws([1, 2])
    return list(sample(network, quantizer, SCHEDULE, branches, CategoricalEmitter(), draws, **options))  # type: ignore[arg-type]


@torch.no_grad()
@torch.inference_mode()
def test_a_branch_of_weight_0_is_cached_but_has_no_head() -> None:
    quantizer, weight = pyramid(), torch.randn(5, CODES)
    labels, other = torch.tensor([1, 2]), torch.tensor([7, 7])
    network = Network(weight)
    steps = run(classifier_free(labels, other, 2.0, SCHEDULE), network, quantizer)
    assert network.heads == [(0, 2), (1, 4), (2, 4)]
    # By hand: both branches run alone on the drawn tokens, and all logits computed.
    alone = [Network(weight).start(part, SCHEDULE) for part in (labels, other)]
    total, inputs = quantizer.begin(2, SCHEDULE), None
    for k, step in enumerate(steps):
        first, second = (session.logits(session.step(k, inputs), slice(None)) for session in alone)
        t = 2.0 * k / 2
        torch.testing.assert_close(step.logits, (1 + t) * first - t * second)
        total = total + quantizer.contribution(quantizer.lookup(step.tokens), SCHEDULE, k)
        torch.testing.assert_close(step.total, total)
        inputs = quantizer.next_input(total, SCHEDULE, k + 1) if k < 2 else None


def test_no_guidance_is_one_branch() -> None:
    labels = torch.tensor([1, 2])
    branches = classifier_free(labels, labels, 0.0, SCHEDULE)
    assert len(branches) == 1
    network = Network(torch.randn(5, CODES))
    run(branches, network, pyramid())
    assert network.heads == [(0, 2), (1, 2), (2, 2)]


def test_guidance_may_be_given_per_scale() -> None:
    labels = torch.tensor([1, 2])
    conditional, unconditional = classifier_free(labels, labels, [3.0, 2.0, 0.5], SCHEDULE)
    assert (conditional.weights, unconditional.weights) == ((1.0, 2.0, 1.5), (0.0, -1.0, -0.5))
    assert len(classifier_free(labels, labels, [0.0, 0.0, 0.0], SCHEDULE)) == 1
    with pytest.raises(ValueError, match="2 guidance strengths were given for 3 scales"):
        classifier_free(labels, labels, [1.0, 2.0], SCHEDULE)


@torch.inference_mode()
def test_three_branches_add_up() -> None:
    weight, quantizer = torch.randn(5, CODES), pyramid()
    conditions = [torch.tensor([i, i + 1]) for i in range(3)]
    weights = [(1.0, 2.0, 0.5), (0.0, -1.0, 0.0), (0.0, 0.5, 0.25)]
    network = Network(weight)
    branches = [Branch(c, w) for c, w in zip(conditions, weights, strict=True)]
    first = run(branches, network, quantizer)[0]
    assert network.heads == [(0, 2), (1, 6), (2, 2), (2, 2)]
    session = Network(weight).start(conditions[0], SCHEDULE)
    torch.testing.assert_close(first.logits, session.logits(session.step(0, None), slice(None)))


def test_the_caller_may_stop_at_any_scale() -> None:
    network, quantizer = Network(torch.randn(5, CODES)), pyramid()
    branches = [Branch(torch.tensor([1]), (1.0,) * 3)]
    steps = sample(network, quantizer, SCHEDULE, branches, CategoricalEmitter(), ImageDraws([0]))
    assert [next(steps).index, next(steps).index] == [0, 1]
    steps.close()
    assert network.scales == [0, 1]
    assert not torch.is_inference_mode_enabled()


def test_a_control_decides_what_enters_the_sum() -> None:
    class Zero:
        def adjust(self, codes: Tensor, index: int) -> Tensor:
            return torch.zeros_like(codes) if index == 1 else codes

    quantizer = ResidualQuantizer(QuantizerConfig(CODES, 4, smoothing=0.0))
    steps = run(
        [Branch(torch.tensor([1, 2]), (1.0,) * 3)], Network(torch.randn(5, CODES)), quantizer, controls=[Zero()]
    )
    assert torch.equal(steps[1].total, steps[0].total)
    assert steps[1].codes.count_nonzero() == 0


def test_a_scale_without_any_branch_is_refused() -> None:
    with pytest.raises(ValueError, match="weight 0 at scale 1"):
        run([Branch(torch.tensor([1, 2]), (1.0, 0.0, 1.0))], Network(torch.randn(5, CODES)), pyramid())


@pytest.mark.parametrize("scales", [1, 2])
def test_two_networks_share_the_scales(scales: int) -> None:
    """One that stops and one that goes on give what one alone gives."""
    quantizer, weight = pyramid(), torch.randn(5, CODES)
    labels, other = torch.tensor([1, 2]), torch.tensor([7, 7])
    branches = classifier_free(labels, other, 2.0, SCHEDULE)
    whole = run(branches, Network(weight), quantizer)
    draws, emitter = ImageDraws([1, 2]), CategoricalEmitter()
    drafter, refiner = Network(weight), Network(weight)
    steps = list(sample(drafter, quantizer, SCHEDULE, branches, emitter, draws, stop=scales))
    inputs = [quantizer.next_input(step.total, SCHEDULE, step.index + 1) for step in steps]
    accepted = Accepted(scales, steps[-1].total, torch.cat(inputs, 1))
    steps += sample(refiner, quantizer, SCHEDULE, branches, emitter, draws, accepted=accepted)
    assert drafter.scales == list(range(scales))
    assert refiner.scales == [0, 1, 2]
    assert [step.index for step in steps] == [0, 1, 2]
    for ours, expected in zip(steps, whole, strict=True):
        assert torch.equal(ours.tokens, expected.tokens)
        torch.testing.assert_close(ours.total, expected.total)


def test_an_empty_share_of_the_scales_is_refused() -> None:
    branches = [Branch(torch.tensor([1]), (1.0,) * 3)]
    with pytest.raises(ValueError, match="nothing to draw from scale 0 to 0"):
        list(
            sample(
                Network(torch.randn(5, CODES)),
                pyramid(),
                SCHEDULE,
                branches,
                CategoricalEmitter(),
                ImageDraws([0]),
                stop=0,
            )
        )
