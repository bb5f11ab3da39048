"""What a plan says, against models on the meta device, plain arithmetic, and real steps of small models."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nextscale.cli import main
from nextscale.core import attention
from nextscale.core.accounting import Alive
from nextscale.core.training import TrainingConfig
from nextscale.planning import GPUS, Subject, plan, valueless
from nextscale.planning_subjects import (
    PLANNED,
    _task,
    build_preset,
    class_subject,
    preset_subject,
    presets,
    text_subject,
)

CONFIG = TrainingConfig(batch_size=4, epochs=1)
ALL = [(kind, name) for kind in PLANNED for name in presets(kind)]


def tiny_subject(training: TrainingConfig = CONFIG, kept: bool = True) -> Subject:
    from nextscale.core.autoencoder import AutoencoderConfig
    from nextscale.core.quantizer import QuantizerConfig
    from nextscale.core.schedule import ScaleSchedule
    from nextscale.core.transformer import TransformerConfig
    from nextscale.tasks.generation.var import VAR, VARConfig
    from nextscale.tasks.generation.var_training import VARTraining
    from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig

    schedule = ScaleSchedule.squares(1, 2, 4)
    shape = AutoencoderConfig(channels=32, multipliers=(1, 1), blocks=1, latent_channels=8)
    tokenizer = ResidualVQ(ResidualVQConfig(shape, QuantizerConfig(vocabulary=64, channels=8), schedule))
    config = VARConfig(
        TransformerConfig(64, 2, 2), classes=10, vocabulary=64, code_channels=8, schedule=schedule, label_drop=0.1
    )
    return class_subject(VARTraining(VAR(config, tokenizer)), training, 100, kept, schedule)


@pytest.mark.parametrize(("kind", "name"), [each for each in ALL if each[1] not in ("infinity-20b", "infinity-8b")])
def test_parameters_are_those_of_the_meta_device(kind: str, name: str) -> None:
    with torch.device("meta"):
        expected = sum(p.numel() for p in build_preset(kind, name).parameters())
    with valueless():
        task = _task(kind, build_preset(kind, name))
        made = sum(p.numel() for p in task.phases[task.name].parameters())
    assert made == expected


def test_a_var_has_the_published_parameters_and_the_papers_operations() -> None:
    with valueless():
        subject = preset_subject("var-d16", replace(CONFIG, batch_size=2))
        model = subject.task.model  # type: ignore[attr-defined]
        kept = class_subject(subject.task, subject.training, 100, True, model.config.schedule)
        made = plan(kept)
    assert made.parameters == 310_283_520
    width, depth, length, codes = 1024, 16, 680, 4096
    # Blocks' four square matrices and the two of the feed-forward for every token; modulation once for an image.
    linear = 2 * (depth * 12 * width**2 * length + depth * 6 * width**2)
    attention = 4 * depth * width * 286_434
    head = 2 * length * width * codes + 2 * 2 * width**2
    words = 2 * (length - 1) * 32 * width
    assert made.forward == pytest.approx(2 * (linear + attention + head + words), rel=0.01)
    assert made.flops == pytest.approx(3 * made.forward, rel=0.02)


def test_operations_are_those_of_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with valueless():
        made = plan(tiny_subject())
    # PyTorch has no autocast for the meta device; it would change types, not products.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with torch.device("meta"):
        subject = tiny_subject()
        module, batch = next(iter(subject.task.phases.values())).train(), subject.batch(4)
        with FlopCounterMode(display=False) as counter:
            subject.task.loss("var", module, batch, 0)[0].backward()
    assert made.flops == counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_that_of_a_real_step(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "DENSE_LENGTH", 0)  # of CPUs only
    training = replace(CONFIG, gradient_checkpointing=checkpointing)
    with valueless():
        planned = plan(tiny_subject(training))
    subject = tiny_subject(training)
    module = next(iter(subject.task.phases.values())).train()
    if checkpointing:
        module.transformer.gradient_checkpointing = True  # type: ignore[union-attr]
    batch = subject.batch(4)
    with Alive() as alive:
        subject.task.loss("var", module, batch, 0)[0].backward()
    assert planned.memory.activations + planned.memory.gradients == pytest.approx(alive.peak, rel=0.1)


def test_gpus_share_the_work() -> None:
    with valueless():
        one, two = plan(tiny_subject()), plan(tiny_subject(), gpus=2)
        sharded = plan(tiny_subject(), gpus=2, sharded=True)
        with pytest.raises(ValueError, match="does not divide over 3 GPUs"):
            plan(tiny_subject(), gpus=3)
    assert (one.micro_batch, two.micro_batch) == (4, 2)
    assert one.flops == pytest.approx(two.flops, rel=1e-3)
    assert two.memory.buckets == one.memory.gradients
    assert sharded.memory.optimizer == one.memory.optimizer // 2
    assert one.seconds(GPUS["h200"], 2, "bf16", 0.5) == pytest.approx(one.flops / (989e12 * 2 * 0.5))


def test_planning_leaves_nothing_without_values_behind() -> None:
    with valueless():
        plan(tiny_subject())
    subject = tiny_subject()
    levels: torch.Tensor = subject.task.model.config.schedule.levels()  # type: ignore[attr-defined]
    assert levels.tolist() == [0] + [1] * 4 + [2] * 16


FILE = """tokenizer: var-cifar10
tokens: nowhere
class_names: [a, b, c]
depth: 1
conditioning: shared
training: {epochs: 2, batch_size: 8, precision: bf16}
"""


def test_the_command_plans_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "var-tiny.yaml"
    file.write_text(FILE)
    command = ["plan", str(file), "--samples", "1000", "--json", str(tmp_path / "plan.json")]
    assert main([*command, "--gpus", "4", "--gpu", "a100"]) == 0
    printed, content = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert "memory per GPU" in printed
    assert content["steps"] == 250
    assert content["micro_batch"] == 2
    memory = content["memory"]
    assert memory["total"] == sum(value for name, value in memory.items() if name != "total")
    assert content["dataset"]["tokens"] == 1000 * content["dataset"]["tokens_per_sample"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: ["plan", str(f), "--gpu", "h300"], "known are h200"),
        (lambda f: ["plan", str(f), "--recipe", "dar"], "is not"),
        (lambda f: ["plan", str(f), "--utilisation", "2"], "at most 1"),
        (lambda f: ["plan", "var-d17"], "no configuration file and none of var-d16"),
        (lambda f: ["plan", str(f), "--tokenizer", "absent"], "the tokenizer absent is not here"),
    ],
)
def test_mistakes_are_told(
    change: Callable[[Path], list[str]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "var-tiny.yaml"
    file.write_text(FILE)
    assert main(change(file)) == 2
    error: Any = capsys.readouterr().err
    assert message in error


def test_recipes_without_a_next_scale_transformer_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tokenizer.yaml"
    file.write_text("data: {source: nowhere}\n")
    assert main(["plan", str(file)]) == 2
    assert "cannot be planned" in capsys.readouterr().err


def test_texts_count_as_many_tokens_as_they_are_given() -> None:
    with valueless():
        model = build_preset("infinity", "infinity-125m")
        batch = text_subject(_task("infinity", model), CONFIG, 10, length=7).batch(3)
    assert batch["text"].lengths == (7, 7, 7)
