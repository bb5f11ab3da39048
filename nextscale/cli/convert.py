"""``nextscale convert``"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def add_arguments(parser: Any) -> None:
    from typing import Literal

    from nextscale.cli.parsing import add_needs

    parser.add_argument("source", type=str, help="name, file (also a training checkpoint) or folder")
    parser.add_argument("out", type=str, help="new folder; or a .pth file where one official file is written")
    parser.add_argument(
        "--to",
        type=Literal["official", "nextscale"] | None,
        default=None,
        help="layout to write; the other one than the source's, unless given",
    )
    parser.add_argument(
        "--part",
        type=str,
        default="all",
        help="one of the models the source holds, such as transformer or tokenizer",
    )
    parser.add_argument(
        "--scales",
        type=str | None,
        default=None,
        help="the scale list, where an official file does not tell it",
    )
    parser.add_argument(
        "--dtype",
        type=str | None,
        default=None,
        help="of the weights that are written: float32, bfloat16 or float16; as stored, unless named",
    )
    add_needs(parser)


def run(arguments: Any) -> None:
    from nextscale.cli.console import note, say
    from nextscale.cli.parsing import needed
    from nextscale.loading import build, cast, choose_dtype, combining, open_source

    opened = open_source(arguments.source, combining(needed(arguments)))
    target = arguments.to or ("nextscale" if opened.config is None else "official")
    out = Path(arguments.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; nothing is overwritten: name a new one")
    model = build(opened, schedule=arguments.scales, **needed(arguments))
    if (dtype := choose_dtype(arguments.dtype)) is not None:
        cast(model, dtype)
    roles = dict(model.parts)
    if arguments.part != "all" and arguments.part not in roles:
        raise ValueError(f"{arguments.source} has no {arguments.part}; --part is all, {' or '.join(roles)}")
    if target == "nextscale":
        if out.suffix in (".pth", ".pt", ".safetensors"):
            raise ValueError(f"{out}: this library writes a folder (model.safetensors and config.json); name a folder")
        if roles.get(arguments.part) is model and len(roles) > 1:
            raise ValueError(
                f"a folder of this library holds the {arguments.part} together with the rest: use --part all"
            )
        roles.get(arguments.part, model).save(out)
        say(f"written: {out}")
        return
    if hasattr(model, "save_official") and roles.get(arguments.part, model) is model:
        if out.suffix:
            raise ValueError(f"{out}: the official code reads a folder of such a model; name a folder")
        say(f"written: {model.save_official(out)}")
        return
    chosen = roles if arguments.part == "all" else {arguments.part: roles[arguments.part]}
    names = getattr(model, "official_names", {})
    files = {names.get(role, part.official_name): part for role, part in chosen.items()}
    if out.suffix and len(files) > 1:
        raise ValueError(f"{out}: {' and '.join(files)} are two files; name a folder, or choose one by --part")
    for name, part in files.items():
        path = out if out.suffix else out / name
        _save_official(part, path)
        say(f"written: {path}")
    for remark in roles["tokenizer"].official_differences():
        note(f"the official code needs a change to compute the same: {remark}")


def _save_official(model: Any, path: Path) -> None:
    import torch

    from nextscale.core.checkpoint import write_atomically

    state = {}
    for name, value in model.to_official().items():
        # A tensor that is a part of a larger one would be written with all of it.
        whole = value.untyped_storage().nbytes() == value.nbytes
        state[name] = value.detach().contiguous() if whole else value.detach().clone()
    entry = getattr(model, "official_entry", None)
    write_atomically(path, lambda temporary: torch.save(state if entry is None else {entry: state}, temporary))
