"""Attention of latent-diffusion autoencoders: official files keep queries, keys and values in layers of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


def fused(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Entries with each attention's q, k and v in one."""
    for name, value in state.items():
        start, _, end = name.rpartition(".")
        if start.endswith((".k", ".v")) and f"{start[:-1]}q.{end}" in state:
            continue
        if start.endswith(".q"):
            parts = [state.get(f"{start[:-1]}{key}.{end}") for key in "qkv"]
            present = [part for part in parts if part is not None]
            yield f"{start[:-1]}qkv.{end}", torch.cat(present)
        else:
            yield name, value


def separated(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The reverse of :func:`fused`."""
    for name, value in state.items():
        if ".qkv." in name:
            parts = value.chunk(3)
            yield from ((name.replace(".qkv.", f".{key}."), part) for key, part in zip("qkv", parts, strict=True))
        else:
            yield name, value
