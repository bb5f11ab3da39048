"""``nextscale convert``"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def add_arguments(parser: Any) -> None:
    from typing import Literal

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
        type=Literal["all", "transformer", "tokenizer"],
        default="all",
        help="of a transformer with its tokenizer",
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
    parser.add_argument(
        "--tokenizer",
        type=str | None,
        default=None,
        help="file, folder or name, where it is not beside an official file",
    )


def run(arguments: Any) -> None:
    from nextscale.cli.console import note, say
    from nextscale.loading import build, cast, choose_dtype, open_source

    opened = open_source(arguments.source)
    target = arguments.to or ("nextscale" if opened.config is None else "official")
    out = Path(arguments.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; nothing is overwritten: name a new one")
    model = build(opened, schedule=arguments.scales, tokenizer=arguments.tokenizer)
    if (dtype := choose_dtype(arguments.dtype)) is not None:
        cast(model, dtype)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None and arguments.part == "transformer":
        raise ValueError(f"{arguments.source} is a tokenizer: it has no transformer")
    if target == "nextscale":
        if out.suffix in (".pth", ".pt", ".safetensors"):
            raise ValueError(f"{out}: this library writes a folder (model.safetensors and config.json); name a folder")
        if arguments.part == "transformer":
            raise ValueError("a folder of this library holds a transformer together with its tokenizer: use --part all")
        (tokenizer if tokenizer is not None and arguments.part == "tokenizer" else model).save(out)
        say(f"written: {out}")
        return
    parts = _official_parts(model, arguments.part)
    if out.suffix and len(parts) > 1:
        raise ValueError(f"{out}: {' and '.join(parts)} are two files; name a folder, or choose one by --part")
    for name, part in parts.items():
        path = out if out.suffix else out / name
        _save_official(part, path)
        say(f"written: {path}")
    for remark in official_differences(tokenizer or model):
        note(remark)


def _official_parts(model: Any, part: str) -> dict[str, Any]:
    """File names as the official repository has them, and what goes into them."""
    tokenizer = getattr(model, "tokenizer", None) or model
    parts = {}
    if tokenizer is not model and part != "tokenizer":
        parts[f"var_d{model.config.transformer.depth}.pth"] = model
    if part != "transformer":
        channels, codes = tokenizer.config.autoencoder.channels, tokenizer.config.quantizer
        parts[f"vae_ch{channels}v{codes.vocabulary}z{codes.channels}.pth"] = tokenizer
    return parts


def _save_official(model: Any, path: Path) -> None:
    import torch

    from nextscale.core.checkpoint import write_atomically

    state = {}
    for name, value in model.to_official().items():
        # A tensor that is a part of a larger one would be written with all of it.
        whole = value.untyped_storage().nbytes() == value.nbytes
        state[name] = value.detach().contiguous() if whole else value.detach().clone()
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def official_differences(tokenizer: Any) -> list[str]:
    """What the official tokenizer code must be changed in to compute the same, as its files cannot say it."""
    config = tokenizer.config
    found = []
    if config.autoencoder.norm_groups != 32:
        found.append(f"norms of {config.autoencoder.norm_groups} groups, where it has 32")
    if not config.autoencoder.attention:
        found.append("no attention in the autoencoder, where it has some")
    if config.quantizer.unit_norm:
        found.append("a search by angle (its option using_znorm)")
    if config.quantizer.smoothers != 4 or config.quantizer.smoothing != 0.5:
        found.append(f"{config.quantizer.smoothers} smoothing convolutions of share {config.quantizer.smoothing}")
    return [f"the official code needs a change to compute the same: {text}" for text in found]
