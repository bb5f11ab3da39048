"""VAR's loss and its stages, against the official trainer's formulas."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.var import VAR
from nextscale.tasks.generation.var_training import (
    ProgressiveConfig,
    Stage,
    VARTraining,
    newest_scale,
    newest_weight,
    next_scale_loss,
    stage_at,
)

SCALES, WARMUP, TOTAL = 10, 100, 2000


def stages_by_hand(config: ProgressiveConfig) -> list[Stage]:
    """The official trainer's bookkeeping, step by step."""
    stages, before, first, count = [], -1, True, 0
    for step in range(TOTAL):
        if step <= WARMUP:
            newest = config.first
        elif step >= config.share * TOTAL:
            newest = SCALES - 1
        else:
            progress = (step - WARMUP) / (config.share * TOTAL - WARMUP)
            newest = config.first + round(progress * (SCALES - 1 - config.first))
        if newest != before:
            first = first and before == -1
            before, count = newest, 0
        count += 1
        weight = max(min(count / (config.warmup * TOTAL), 1), 0.01)
        stages.append(Stage(newest + 1, 1.0 if first or newest == SCALES - 1 else weight))
    return stages


@pytest.mark.parametrize("config", [ProgressiveConfig(0.8), ProgressiveConfig(0.5, 0, 1 / 20), ProgressiveConfig(0.03)])
def test_stages(config: ProgressiveConfig) -> None:
    expected = stages_by_hand(config)
    for step in (*range(0, TOTAL, 7), *range(90, 110), TOTAL - 1):
        stage = stage_at(config, SCALES, step, WARMUP, TOTAL)
        assert stage.scales == expected[step].scales, step
        assert stage.newest_weight == pytest.approx(expected[step].newest_weight), step


def test_all_scales_at_once_unless_asked_for() -> None:
    assert stage_at(ProgressiveConfig(), SCALES, 0, WARMUP, TOTAL) == Stage(SCALES, 1.0)
    assert newest_scale(ProgressiveConfig(0.5, first=20), SCALES, 0, WARMUP, TOTAL) == SCALES - 1
    assert [newest_weight(n, 200) for n in (1, 100, 500)] == [0.01, 0.5, 1.0]


@pytest.mark.parametrize(("smoothing", "weight"), [(0.0, 1.0), (0.2, 0.25)])
def test_loss_by_hand(smoothing: float, weight: float) -> None:
    schedule = ScaleSchedule.squares(1, 2)
    logits, tokens = torch.randn(3, 5, 6), torch.randint(6, (3, 5))
    loss, metrics = next_scale_loss(logits, tokens, schedule, 20, label_smoothing=smoothing, newest_weight=weight)
    log = logits.double().log_softmax(-1)
    plain = -log.gather(2, tokens[..., None])[..., 0]
    smoothed = (1 - smoothing) * plain - smoothing * log.mean(-1)
    weights = torch.tensor([1.0] + [weight] * 4, dtype=torch.float64) / 20
    assert loss.item() == pytest.approx((smoothed * weights).sum(1).mean().item(), rel=1e-5)
    right = (logits.argmax(-1) == tokens).double() * 100
    expected = {"cross_entropy": plain.mean(), "cross_entropy_last": plain[:, 1:].mean()}
    expected |= {"accuracy": right.mean(), "accuracy_last": right[:, 1:].mean()}
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, rel=1e-5
    )


@pytest.fixture
def batch(var: VAR) -> dict[str, Tensor]:
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    tokens = var.tokenizer.encode(images)
    return {"image": images, "tokens": tokens, "label": torch.arange(4), "uniform": torch.tensor([0.05, 0.5, 0.5, 0.5])}


def test_images_and_their_tokens_train_alike_and_labels_are_dropped(var: VAR, batch: dict[str, Tensor]) -> None:
    task = VARTraining(var)
    from_tokens, _ = task.loss("var", var, {k: v for k, v in batch.items() if k != "image"}, 0)
    from_images, _ = task.loss("var", var, {k: v for k, v in batch.items() if k != "tokens"}, 0)
    assert from_images == from_tokens == var.loss(batch)[0]
    dropped = {**batch, "label": torch.tensor([5, 1, 2, 3]), "uniform": torch.ones(4)}
    assert task.loss("var", var, dropped, 0)[0] == from_tokens
    kept = {**batch, "uniform": torch.ones(4)}
    assert task.loss("var", var, kept, 0)[0] != from_tokens


def test_a_stage_scores_its_scales_only(var: VAR, batch: dict[str, Tensor]) -> None:
    config = ProgressiveConfig(share=0.5, first=1, warmup=0.1)
    task = VARTraining(var, progressive=config, warmup=10, total=100)
    whole, _ = VARTraining(var).loss("var", var, batch, 0)
    part, early = task.loss("var", var, batch, 0)
    assert early["scales"] == 2
    assert "accuracy_last" not in early
    assert part.item() == pytest.approx(early["cross_entropy"].item() * 5 / 21, rel=1e-4)  # type: ignore[union-attr]
    late, _ = task.loss("var", var, batch, 99)
    assert late == whole
    for from_images in (False, True):
        chosen = {k: v for k, v in batch.items() if k != ("tokens" if from_images else "image")}
        assert task.loss("var", var, chosen, 0)[0] == part


def test_the_frozen_tokenizer_takes_no_gradient(tiny: SimpleNamespace, batch: dict[str, Tensor]) -> None:
    model = tiny.var().train()
    task = VARTraining(model)
    before = [p.clone() for p in model.tokenizer.parameters()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        loss, _ = task.loss("var", model, batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert math.isfinite(losses[-1])
    assert all(torch.equal(a, b) for a, b in zip(before, model.tokenizer.parameters(), strict=True))
    assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("tokenizer."))
