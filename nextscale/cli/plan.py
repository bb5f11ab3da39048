"""``nextscale plan``"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHARD = 256e6
"""Bytes of one shard of tokens or images, about what streams well."""


def add_arguments(parser: Any) -> None:
    from typing import Literal

    parser.add_argument(
        "config", type=str, help="YAML file of a training run, as `nextscale train KIND --config` takes, or var-d16, …"
    )
    parser.add_argument("--recipe", type=str | None, default=None, help="the KIND of a file, where its name says none")
    parser.add_argument("--gpus", type=int, default=1, help="over how many the batch is divided")
    parser.add_argument("--gpu", type=str, default="h200", help="which: h200, h100, a100, a100-40gb, l40s, rtx4090")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the GPUs' peak that a step reaches")
    parser.add_argument(
        "--sharded",
        action="store_true",
        help="as with training.sharding full: weights and states are divided over the GPUs (FSDP)",
    )
    parser.add_argument("--samples", type=int | None, default=None, help="images of an epoch; ImageNet's, unless given")
    group = parser.add_argument_group("in place of what the file says")
    group.add_argument("--batch-size", type=int | None, default=None)
    group.add_argument("--accumulation", type=int | None, default=None)
    group.add_argument("--precision", type=Literal["no", "bf16", "fp16"] | None, default=None)
    group.add_argument("--gradient-checkpointing", type=bool | None, default=None)
    group.add_argument(
        "--tokenizer", type=str | None, default=None, help="folder or name, where the file's is not here"
    )
    parser.add_argument("--json", type=str | None, default=None, help="write the figures to this file too")


def run(arguments: Any) -> None:
    from dataclasses import replace

    from nextscale.cli.console import say
    from nextscale.planning import GPUS, plan, valueless
    from nextscale.planning_subjects import preset_subject, subject_of

    if arguments.gpu not in GPUS:
        raise ValueError(f"--gpu is {arguments.gpu!r}; known are {', '.join(GPUS)}")
    for name in ("gpus", "samples"):
        if arguments[name] is not None and arguments[name] < 1:
            raise ValueError(f"--{name} is {arguments[name]}; expected 1 or more")
    if not 0 < arguments.utilisation <= 1:
        raise ValueError(f"--utilisation is {arguments.utilisation}; expected a share above 0, at most 1")
    file = Path(arguments.config)
    if file.suffix in (".yaml", ".yml"):
        options = [] if arguments.tokenizer is None else ["--tokenizer", arguments.tokenizer]
        kind, recipe = read_recipe(file, arguments.recipe, options)
    with valueless():
        if file.suffix in (".yaml", ".yml"):
            subject = subject_of(kind, recipe, arguments.samples)
        else:
            subject = preset_subject(arguments.config, samples=arguments.samples)
        names = ("batch_size", "accumulation", "precision", "gradient_checkpointing")
        changed = {name: arguments[name] for name in names if arguments[name] is not None}
        subject = replace(subject, training=replace(subject.training, **changed))
        sharded = arguments.sharded or subject.training.sharding == "full"
        made = plan(subject, arguments.gpus, sharded)
    content = figures(made, subject, GPUS[arguments.gpu], arguments)
    say(report(content))
    if arguments.json is not None:
        from nextscale.core.checkpoint import write_json

        say(f"written: {write_json(arguments.json, content)}")


def read_recipe(file: Path, kind: str | None, options: Sequence[str] = ()) -> tuple[str, Any]:
    """The kind and the recipe of a configuration file.

    Args:
        kind: None: told by the file's name.
        options: typed after it, as for ``nextscale train``.

    Raises:
        OSError: there is no such file.
        ValueError: its kind cannot be told, or it does not fit its kind.
    """
    from dataclasses import fields

    from nextscale.cli.parsing import read
    from nextscale.cli.train import recipe_parser
    from nextscale.systems import RECIPES

    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such configuration")
    if kind is None:
        said = sorted((k for k in RECIPES if file.stem.startswith(k)), key=len)
        if not said:
            raise ValueError(f"{file} does not say what it trains: give --recipe, one of {', '.join(RECIPES)}")
        kind = said[-1]
    if kind not in RECIPES:
        raise ValueError(f"--recipe is {kind!r}; expected one of {', '.join(RECIPES)}")
    parser, recipe_class = recipe_parser(kind), RECIPES[kind].recipe_class
    made = parser.instantiate(read(parser, ["--config", str(file), *options]))
    return kind, recipe_class(**{f.name: made[f.name] for f in fields(recipe_class)})


def figures(made: Any, subject: Any, gpu: Any, arguments: Any) -> dict[str, Any]:
    """All that the report says, as numbers."""
    from dataclasses import asdict

    config, gpus = subject.training, arguments.gpus
    seconds = made.seconds(gpu, gpus, config.precision, arguments.utilisation)
    tokens = subject.tokens * subject.samples
    content: dict[str, Any] = {
        "config": arguments.config,
        "gpus": gpus,
        "gpu": asdict(gpu),
        "sharded": arguments.sharded or config.sharding == "full",
        "precision": config.precision,
        "batch_size": config.batch_size,
        "micro_batch": made.micro_batch,
        "parameters": {"trained": made.parameters, "frozen": made.frozen},
        "memory": {**asdict(made.memory), "total": made.memory.total},
        "flops": {"forward": made.forward, "step": made.flops},
        "utilisation": arguments.utilisation,
        "seconds_per_step": seconds,
        "steps": made.steps,
        "hours": made.steps * seconds / 3600,
        "dataset": {"samples": subject.samples, "tokens_per_sample": subject.tokens, "tokens": tokens},
    }
    if subject.stored is not None:
        stored = subject.stored * subject.samples
        content["dataset"] |= {"stored_bytes": stored, "shards": max(round(stored / SHARD), 1)}
    return content


def report(content: dict[str, Any]) -> str:
    """The figures as lines."""
    from nextscale.cli.console import pairs, size_text

    memory, data, gpu = content["memory"], content["dataset"], content["gpu"]
    room = f"of {size_text(gpu['memory'])} on an {gpu['name']}"
    names = {"average": "averaged weights", "buckets": "buckets of gradients"}
    parts = [(f"  {names.get(k, k)}", size_text(v)) for k, v in memory.items() if k != "total" and v]
    rows = [
        ("parameters", f"{content['parameters']['trained']:,} trained, {content['parameters']['frozen']:,} frozen"),
        ("memory per GPU", f"{size_text(memory['total'])} {room}: {memory['total'] / gpu['memory']:.0%}"),
        *parts,
        ("batch", f"{content['batch_size']}, {content['micro_batch']} at once on each of {content['gpus']}"),
        ("FLOPs per step", f"{content['flops']['step']:.4g}, forward {content['flops']['forward']:.4g}"),
        ("time per step", f"{content['seconds_per_step']:.3g} s at {content['utilisation']:.0%} of the peak"),
        ("run", f"{content['steps']:,} steps, {content['hours']:.3g} hours"),
        ("data", f"{data['samples']:,} images of {data['tokens_per_sample']:,} tokens: {data['tokens']:,} tokens"),
    ]
    if "shards" in data:
        rows.append(("", f"kept as tokens {size_text(data['stored_bytes'])} in {data['shards']} shards"))
    if memory["total"] > gpu["memory"]:
        rows.append(("", "does not fit: more GPUs, accumulation, gradient checkpointing, or training.sharding full"))
    return pairs(rows)
