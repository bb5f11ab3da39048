"""``nextscale calibrate``"""

from __future__ import annotations

from typing import Any


def add_arguments(parser: Any) -> None:
    from typing import Literal

    from nextscale.cli.parsing import add_loading

    parser.add_argument("model", type=str, help="name, file or folder; `nextscale list` shows names")
    parser.add_argument("--out", type=str, default="out/lite", help="folder of the plan, for --lite of other commands")
    parser.add_argument("--num", type=int, default=32, help="pictures to draw, of random classes")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures drawn at once: memory and speed")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture")
    group = parser.add_argument_group("attention")
    group.add_argument(
        "--windows",
        type=Literal["work", "mass", "none"],
        default="work",
        help="work: change least for the work that --saving leaves; mass: the published rule, the narrowest windows "
        "that keep --threshold of each scale's attention; none: look at everything",
    )
    group.add_argument(
        "--saving", type=float, default=0.75, help="share of attention's multiplications, sharing included"
    )
    group.add_argument("--threshold", type=float, default=0.95, help="of --windows mass")
    group.add_argument(
        "--share", type=bool, default=False, help="all guidance branches use the attention of the first, in late scales"
    )
    group.add_argument(
        "--tile",
        type=int | None,
        default=None,
        help="neighbouring queries that share their keys: fewer lose less, more are multiplied faster; half a row of a "
        "map, unless given",
    )
    group = parser.add_argument_group("precision")
    group.add_argument(
        "--weight-bits",
        type=Literal[4, 8, 16],
        default=8,
        help="of linear layers; one that bears it worse than --tolerance takes more",
    )
    group.add_argument(
        "--tolerance", type=float, default=0.01, help="change of what is drawn from, by one layer, in nats per token"
    )
    group.add_argument(
        "--keep",
        nargs="*",
        type=str,
        default=["feed_forward.contract"],
        help="layers whose name contains one of these keep their precision",
    )
    group.add_argument(
        "--activation-bits", type=Literal[8, 16], default=16, help="8: multiply integers where weights have 8 bits"
    )
    group.add_argument("--cache-bits", type=Literal[8, 16], default=8, help="of a stored key or value")
    add_loading(parser, compress=False)


def run(arguments: Any) -> None:
    import nextscale
    from nextscale.cli.console import note, pairs, progress, say
    from nextscale.cli.parsing import needed
    from nextscale.tasks.generation.litevar_calibration import Calibration, calibrate

    settings = Calibration(
        images=arguments.num,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        rule=arguments.windows,
        saving=arguments.saving,
        threshold=arguments.threshold,
        share=arguments.share,
        tile=arguments.tile,
        weight_bits=arguments.weight_bits,
        keep=tuple(arguments.keep),
        tolerance=arguments.tolerance,
        cache_bits=arguments.cache_bits,
        activation_bits=arguments.activation_bits,
    )
    model = nextscale.load(arguments.model, device=arguments.device, dtype=arguments.dtype, **needed(arguments))
    if not hasattr(model, "steps"):
        raise ValueError(f"{arguments.model} is a {type(model).__name__}, which draws no images by itself")
    with progress("calibrating", "parts") as report:
        plan = calibrate(model, settings, report)
    folder = plan.save(arguments.out)
    bits = list(plan.config.precision.values())
    measured = plan.config.measured
    rows: list[tuple[str, object]] = [
        ("linear layers", ", ".join(f"{bits.count(b)} of {b} bits" for b in (4, 8, 16))),
        ("attention saved", f"{measured['attention_saved']:.1%} of its multiplications"),
    ]
    if "attention_kept" in measured:
        rows.append(("attention kept", f"{measured['attention_kept']:.1%} of what late scales look at"))
    change = measured["attention_divergence"]
    rows.append(("change by that", f"{change:.2g} nats per token of what is drawn from"))
    say(pairs([*rows, ("plan", folder)]))
    note(f"use it: nextscale generate {arguments.model} --lite {folder}")
