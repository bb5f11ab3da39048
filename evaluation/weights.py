"""Weights of evaluation networks, read from files of others without running any code in them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def read_weights(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The tensors of a ``.safetensors`` or PyTorch file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, would need code to be executed, or holds no dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damage surfaces anywhere in the reader
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as a file of tensors ({reason})") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of weights")
    return content
