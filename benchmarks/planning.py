"""Plans against PyTorch's own counts, and against the memory of a real run.

    python benchmarks/planning.py                      # parameters and operations of every preset, on the meta device
    python benchmarks/planning.py --run --depth 8      # and the peak memory of a VAR's training step, planned and real

The real step is loss, backward, clipping and AdamW. On the CPU its peak is the process's largest resident size over
what it was before the model was built; on a GPU what PyTorch held at most.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from unittest import mock

import torch
from common import peak_memory, reset_peak_memory  # type: ignore[import-not-found,unused-ignore]
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from nextscale.core.optim import parameter_groups
from nextscale.core.training import TrainingConfig
from nextscale.planning import Subject, plan, valueless
from nextscale.planning_subjects import PLANNED, class_subject, preset_subject, presets
from nextscale.tasks.generation.var import VAR, VARConfig
from nextscale.tasks.generation.var_training import VARTraining
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [name for kind in PLANNED for name in presets(kind)]
    parser.add_argument("--presets", nargs="*", choices=every, default=every)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    console = Console()
    if options.presets:
        table = Table("preset", "parameters", "FLOPs of a step", "on the meta device", "equal")
        for name in options.presets:
            parameters, planned = counted(name, fake=True)
            known, counted_there = counted(name, fake=False)
            equal = "yes" if (parameters, planned) == (known, counted_there) else "NO"
            table.add_row(name, f"{parameters:,}", f"{planned:.6g}", f"{counted_there:.6g}", equal)
        console.print(table)
    if options.run:
        with valueless():
            planned_memory = plan(small(options)).memory.total
        real = measured(options)
        console.print(
            f"VAR of depth {options.depth}, batch {options.batch}: planned {planned_memory / 1e9:.3f} GB, "
            f"measured {real / 1e9:.3f} GB, ratio {planned_memory / real:.2f}"
        )


def counted(name: str, fake: bool) -> tuple[int, int]:
    """Parameters and operations of one sample's step, as planned or as PyTorch counts them on the meta device."""
    config = TrainingConfig(batch_size=1, epochs=1)
    if fake:
        with valueless():
            made = plan(preset_subject(name, config))
        return made.parameters + made.frozen, made.flops
    # PyTorch has no autocast for the meta device; it would change types, not products.
    with torch.device("meta"), mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()):
        subject = preset_subject(name, config)
        phase, module = next(iter(subject.task.phases.items()))
        with FlopCounterMode(display=False) as counter:
            subject.task.loss(phase, module.train(), subject.batch(1), 0)[0].backward()
    return sum(p.numel() for p in module.parameters()), int(counter.get_total_flops())


def small(options: argparse.Namespace) -> Subject:
    """A VAR of ImageNet's scales, trained on tokens."""
    tokenizer = ResidualVQ(ResidualVQConfig())
    model = VAR(VARConfig.of_depth(options.depth), tokenizer)
    config = TrainingConfig(batch_size=options.batch, epochs=1)
    return class_subject(VARTraining(model), config, 1000, True, model.config.schedule)


def measured(options: argparse.Namespace) -> int:
    """Bytes at the peak of the second step: the first one makes the optimiser's states."""
    device = torch.device(options.device)
    reset_peak_memory(device)
    before = peak_memory(device)
    subject = small(options)
    phase, module = next(iter(subject.task.phases.items()))
    module.to(device).train()
    optimizer = torch.optim.AdamW(parameter_groups(module, 0.05), fused=True)
    batch = {name: value.to(device) for name, value in subject.batch(options.batch).items()}
    for number in range(2):
        if number:
            reset_peak_memory(device)
        subject.task.loss(phase, module, batch, 0)[0].backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return peak_memory(device) - (before if device.type == "cpu" else 0)


if __name__ == "__main__":
    main()
