"""Training a tokenizer: the terms of its loss, its codebook, the discriminator."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import Trainer, TrainingConfig
from nextscale.tasks.tokenizers.training import TokenizerLossConfig, TokenizerTraining, structural_loss


def pictures(count: int, side: int, seed: int = 0) -> Tensor:
    coarse = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=side, mode="bilinear")


def run_of(task: TokenizerTraining, folder: Path, steps: int, side: int, **changes: Any) -> Trainer:
    images = pictures(8, side)

    def batches(start: int, size: int) -> Any:
        while True:
            rows = torch.arange(start * size, (start + 1) * size) % len(images)
            yield {"image": images[rows]}
            start += 1

    usual: dict[str, Any] = {"learning_rate": 0.2, "schedule": "constant", "warmup_epochs": 0, "save_every": 0}
    config = TrainingConfig(str(folder), epochs=steps, batch_size=8, log_every=1, **(usual | changes))
    return Trainer(config, task, batches, 8)


def log(folder: Path) -> list[dict[str, float]]:
    import json

    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_structural_loss() -> None:
    images = pictures(2, 16)
    assert structural_loss(images, images).item() == pytest.approx(0, abs=1e-5)
    near, far = (structural_loss(images + noise * torch.randn_like(images), images) for noise in (0.05, 0.5))
    assert 0 < near < far < 2
    with pytest.raises(ValueError, match=r"images of \(6, 6\) pixels are too small for SSIM"):
        structural_loss(pictures(1, 6), pictures(1, 6))


def test_loss_falls_and_usage_is_logged(tiny: SimpleNamespace, tmp_path: Path) -> None:
    task = TokenizerTraining(tiny.tokenizer(), TokenizerLossConfig(absolute=1.0, dead_after=8))
    run_of(task, tmp_path, 12, 8).run()
    rows = log(tmp_path)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["psnr"] > rows[0]["psnr"]
    first = rows[0]
    assert {"perceptual", "quantizer", "usage/scale0", "usage/scale2", "usage/all"} <= first.keys()
    assert 0 < first["usage/scale0"] <= first["usage/all"] <= 1
    assert "usage/all" in rows[10] and "usage/all" not in rows[9]


def test_dead_codes_move_onto_features(tiny: SimpleNamespace) -> None:
    tokenizer = tiny.tokenizer()
    with torch.no_grad():
        tokenizer.quantizer.codebook.weight[4:] += 1000  # nothing comes near
    task = TokenizerTraining(tokenizer, TokenizerLossConfig(dead_after=4, perceptual=0.0))
    task.loss("tokenizer", tokenizer, {"image": pictures(8, 8)}, 0)
    alive = task._in_use().any(0)
    kept = tokenizer.quantizer.codebook.weight[alive].clone()
    assert task.after_step(0)["usage/revived"] == int((~alive).sum()) == 16 - len(kept)
    codes = tokenizer.quantizer.codebook.weight
    assert torch.equal(codes[alive], kept)
    assert codes.abs().max() < 500
    assert (torch.cdist(codes[~alive], torch.cat(task._rests)).amin(1) < 1e-3).all()
    assert task.after_step(1) == {"usage/revived": 0.0}
    assert TokenizerTraining(tokenizer, TokenizerLossConfig(dead_after=40)).after_step(3) == {}


def test_the_discriminator_starts_late_and_sees_each_micro_batch(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TokenizerTraining, "_revive", lambda task, step: 0)  # draws from the last micro-batch
    schedule = ScaleSchedule.squares(1, 2, 12)
    weights = []
    for accumulation in (1, 2):
        config = TokenizerLossConfig(perceptual=0.0, adversarial=0.5, adversarial_start=1, dead_after=1000)
        torch.manual_seed(0)
        task = TokenizerTraining(tiny.tokenizer(schedule=schedule), config)
        assert task.discriminator is not None
        tiny.scattered(task.discriminator, 1, std=0.02)
        before = [p.clone() for p in task.discriminator.parameters()]
        run_of(task, tmp_path / str(accumulation), 2, 24, accumulation=accumulation, learning_rate=1e-3).run()
        assert not all(torch.equal(a, b) for a, b in zip(before, task.discriminator.parameters(), strict=True))
        first, second = log(tmp_path / str(accumulation))
        assert "discriminator/loss" not in first and "adversarial" not in first
        assert {"discriminator/loss", "discriminator/grad_norm", "adversarial_weight"} <= second.keys()
        assert second["discriminator/loss"] == pytest.approx(1, abs=0.3)
        weights.append(second["discriminator/real"] - second["discriminator/fake"])
    assert weights[0] == pytest.approx(weights[1], rel=1e-2)


def test_small_images_have_no_discriminator(tiny: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="images of 8 pixels are too small for the discriminator, which needs 24"):
        TokenizerTraining(tiny.tokenizer(), TokenizerLossConfig(adversarial=1.0))


def test_perceptual_weights_come_in_pairs(tiny: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="LPIPS needs both vgg_weights and lpips_weights"):
        TokenizerTraining(tiny.tokenizer(), TokenizerLossConfig(vgg_weights="vgg.pth"))
    with pytest.raises(OSError, match=r"none\.pth: no such file"):
        TokenizerTraining(tiny.tokenizer(), TokenizerLossConfig(vgg_weights="none.pth", lpips_weights="none.pth"))


def test_usage_is_resumed(tiny: SimpleNamespace, tmp_path: Path) -> None:
    def task() -> TokenizerTraining:
        return TokenizerTraining(tiny.tokenizer(), TokenizerLossConfig(perceptual=0.0, dead_after=4))

    whole, parts = task(), task()
    run_of(whole, tmp_path / "whole", 4, 8).run()
    first = run_of(parts, tmp_path / "parts", 4, 8, save_every=2)
    first.hooks.progress = lambda step, *_: (_ for _ in ()).throw(KeyboardInterrupt) if step == 3 else None
    with pytest.raises(KeyboardInterrupt):
        first.run()
    again = task()
    run_of(again, tmp_path / "parts", 4, 8).run()
    assert torch.equal(again._usage, whole._usage)
    for mine, theirs in zip(again.tokenizer.parameters(), whole.tokenizer.parameters(), strict=True):
        assert torch.equal(mine, theirs)
