"""Evaluation networks as TorchScript files: images to features and class logits."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Classifier = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images (B, 3, H, W) in [0, 1] -> (features (B, D), logits (B, classes))."""

_FILE_OPERATORS = re.compile(r"\b(?:save|from_file)\b")


class ImageClassifier:
    """A `Classifier` on its device: it checks what goes in and what comes out, and keeps no gradients."""

    def __init__(self, network: Classifier, device: str | torch.device = "cpu", name: str = "classifier") -> None:
        self.network = network
        self.device = torch.device(device)
        self.name = name

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1], on any device -> float32 (features (B, D), logits (B, classes)) on
        its own.

        Raises ValueError for another layout or range, and where the network does not take or give what it
        should.
        """
        check_images(images)
        try:
            features, logits = self.network(images.to(self.device, torch.float32))
        except (RuntimeError, TypeError, ValueError) as error:
            last = str(error).strip().splitlines()[-1]
            raise ValueError(f"{self.name} did not take images of shape {tuple(images.shape)}: {last}") from error
        shapes = tuple(features.shape), tuple(logits.shape)
        if features.ndim != 2 or logits.ndim != 2 or {len(features), len(logits)} != {len(images)}:
            raise ValueError(
                f"{self.name} gave shapes {shapes} for {len(images)} images; expected (B, D) and (B, classes)"
            )
        return features.float(), logits.float()


def check_images(images: Tensor) -> None:
    """Raise ValueError unless `images` are floats (B, 3, H, W) in [0, 1], with some slack for rounding."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (batch, 3, height, width)")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; expected floats in [0, 1] (divide bytes by 255)")
    if images.numel() == 0:
        return
    low, high = (float(bound) for bound in torch.aminmax(images))
    # Written so that NaN fails as well.
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(
            f"images have values from {low:.3g} to {high:.3g}; expected [0, 1] (map [-1, 1] by (x + 1) / 2)"
        )


def load_torchscript(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Any:
    """A TorchScript file as a module.

    TorchScript is read by torch.jit.load, which runs TorchScript only and never Python's pickle: a file
    cannot import or call Python code. It is still a program. Two of its operators read and write files; a
    file that names one is refused before anything in it runs. Raises FileNotFoundError, or ValueError for a
    file that is not TorchScript.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such evaluation network; expected a TorchScript file")
    try:
        with zipfile.ZipFile(path) as archive:
            sources = [n for n in archive.namelist() if "/code/" in n and n.endswith(".py")]
            if not sources:
                raise ValueError("it holds no TorchScript code")
            for source in sources:
                match = _FILE_OPERATORS.search(archive.read(source).decode("utf-8"))
                if match:
                    raise ValueError(f"its code names the operator {match.group()!r}, which touches files: refused")
        with warnings.catch_warnings():
            # torch 2.13 announces TorchScript's end; the supported range of torch still reads it.
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.jit")
            warnings.filterwarnings("ignore", message=r".*torch\.jit\.load.*deprecated", category=DeprecationWarning)
            return torch.jit.load(str(path), map_location=device).eval()
    except (ValueError, RuntimeError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        last = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} cannot be read as a TorchScript evaluation network: {last}") from error


def load_classifier(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> ImageClassifier:
    """Load a TorchScript file that maps images (B, 3, H, W) in [0, 1] to (features (B, D), logits (B,
    classes)), as `load_torchscript` does.
    """
    return ImageClassifier(load_torchscript(path, device), device, name=str(path))


def extract(classifier: Classifier, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Features (N, D) and logits (N, classes) of all images of an iterable of batches, on the CPU.

    The images are read once and not kept. Raises ValueError where no batch comes.
    """
    features, logits = [], []
    for images in batches:
        batch_features, batch_logits = classifier(images)
        features.append(batch_features.cpu())
        logits.append(batch_logits.cpu())
    if not features:
        raise ValueError("no images were given; expected at least one batch (B, 3, H, W)")
    return torch.cat(features), torch.cat(logits)
