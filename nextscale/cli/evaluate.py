"""``nextscale evaluate``

Each benchmark is a module with ``add_arguments(parser)`` and ``run(arguments)``, as commands are.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

EVALUATIONS: dict[str, str] = {
    "depth": "a depth model, or a folder of predictions, on KITTI, NYU and others by their protocols",
    "generation": "FID, sFID, Inception score, KID, precision, recall and CLIP score of a model or of images",
    "tokenizer": "rFID, PSNR, SSIM, LPIPS and use of the codebook of what a tokenizer makes of images",
    "understanding": "questions about images: POPE, MME, MMBench, SEED-Bench in their own files, and captions",
    "text-to-image": "draw the prompts of GenEval, DPG or HPS in their layouts; CLIP score, GenEval's score",
    "restoration": "PSNR, SSIM and LPIPS of a model, a classical method or a folder of restored images",
    "shapes": "Chamfer distances, F-score and IoU of rebuilt shapes; COV, MMD, 1-NN, FID and KID of generated ones",
}
"""What can be evaluated, ``nextscale.cli.evaluate_<name>``, and its summary."""


def add_arguments(parser: Any) -> None:
    from nextscale.cli.parsing import new_parser

    tasks = parser.add_subcommands(title="what to evaluate", metavar="TASK")
    for name, summary in EVALUATIONS.items():
        task = new_parser(f"nextscale evaluate {name}", summary[0].upper() + summary[1:] + ".")
        module(name).add_arguments(task)
        tasks.add_subcommand(name, task, help=summary)


def run(arguments: Any) -> None:
    task = arguments.subcommand
    module(task).run(arguments[task])


def module(name: str) -> Any:
    """The module of a benchmark."""
    return import_module(f"nextscale.cli.evaluate_{name.replace('-', '_')}")
