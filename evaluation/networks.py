"""The networks in whose features sets of images are compared, named as text.

- ``inception:FILE``: the Inception network of FID with the weights of a file (:mod:`nextscale.evaluation.inception`);
- ``FILE.pt``: any TorchScript file: images in [0, 1] to features, or to (features, logits);
- ``transformers:NAME``: a vision model of transformers, a folder or a name on the hub.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.evaluation.classifier import check_images, load_torchscript
from nextscale.evaluation.inception import FIDInception

INCEPTION, TRANSFORMERS = "inception:", "transformers:"


@dataclass(frozen=True)
class Responses:
    """What a network makes of images, float32 on its device.

    features (B, D). spatial (B, S): features that know where things are, of sFID. logits (B, classes). The last two are
    None where the network has none.
    """

    features: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class Network:
    """Images (B, 3, H, W) in [0, 1] -> `Responses`.

    Attributes:
        identity: the same for the same weights, wherever they lie: figures of two networks may not be compared.
        inception: whether it is the network that the field's statistics were made with.
    """

    def __init__(
        self,
        call: Callable[[Tensor], Responses],
        identity: str,
        device: str | torch.device = "cpu",
        inception: bool = False,
    ) -> None:
        self._call, self.identity, self.device, self.inception = call, identity, torch.device(device), inception

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Responses:
        """Raises ValueError for images of another layout or range, and where the network does not take or give
        what it should."""
        check_images(images)
        try:
            made = self._call(images.to(self.device, torch.float32))
        except (RuntimeError, TypeError) as error:
            last = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise ValueError(f"{self.identity} did not take images of shape {tuple(images.shape)}: {last}") from error
        parts = {"features": made.features, "spatial features": made.spatial, "logits": made.logits}
        for name, value in parts.items():
            if value is not None and (value.ndim != 2 or len(value) != len(images)):
                raise ValueError(
                    f"{self.identity} gave {name} of shape {tuple(value.shape)} for {len(images)} images; expected "
                    f"({len(images)}, dimensions)"
                )
        return made


def open_network(text: str, device: str | torch.device = "cpu") -> Network:
    """The network a text names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of none of the kinds, or damaged.
    """
    if text.startswith(INCEPTION):
        return _inception(text.removeprefix(INCEPTION), device)
    if text.startswith(TRANSFORMERS):
        return _transformers(text.removeprefix(TRANSFORMERS), device)
    if Path(text).suffix in (".pth", ".safetensors"):
        raise ValueError(f"{text} is a file of weights: of the Inception network of FID say {INCEPTION}{text}")
    return _torchscript(text, device)


def _inception(path: str, device: str | torch.device) -> Network:
    model = FIDInception.from_file(Path(path).expanduser()).to(device)

    def call(images: Tensor) -> Responses:
        # Published figures are of images of 8 bits.
        made = model((images.clamp(0, 1) * 255).round())
        return Responses(made.features, made.spatial, made.logits)

    return Network(call, model.identity, device, inception=True)


def _torchscript(text: str, device: str | torch.device) -> Network:
    path = Path(text).expanduser()
    model = load_torchscript(path, device)

    def call(images: Tensor) -> Responses:
        made = model(images)
        if isinstance(made, Tensor):
            return Responses(made.float())
        if not (isinstance(made, tuple) and len(made) == 2 and all(isinstance(part, Tensor) for part in made)):
            raise ValueError(f"{path} gave a {type(made).__name__}; expected features, or (features, logits)")
        return Responses(made[0].float(), logits=made[1].float())

    return Network(call, f"torchscript:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}", device)


def _transformers(source: str, device: str | torch.device) -> Network:
    """Images are resized to the model's square by antialiased bicubic interpolation, then normalised by its figures.

    Features are its pooled output, else the first token's state.
    """
    from transformers import AutoModel

    whole: Any = AutoModel.from_pretrained(source)
    model: Any = getattr(whole, "vision_model", whole).to(device).eval().requires_grad_(False)
    side, mean, std = _preparation(source, model.config)
    shift, scale = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))

    def call(images: Tensor) -> Responses:
        sized = F.interpolate(images, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
        made = model(pixel_values=(sized - shift) / scale)
        pooled = getattr(made, "pooler_output", None)
        return Responses((made.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)).float())

    digest = hashlib.sha256()
    for _, value in sorted(model.state_dict().items()):
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return Network(call, f"transformers:{model.config.model_type}:{digest.hexdigest()[:16]}", device)


def _preparation(source: str, config: Any) -> tuple[int, list[float], list[float]]:
    """Side, mean and deviation of the images a model takes.

    Raises:
        ValueError: its files do not say them.
    """
    from transformers.utils import cached_file

    found = cached_file(source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    said = json.loads(Path(found).read_text(encoding="utf-8")) if found else {}
    size = said.get("crop_size") if said.get("do_center_crop") else said.get("size")
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    side = getattr(config, "image_size", None) or size
    if not isinstance(side, int) or len(said.get("image_mean", ())) != 3 or len(said.get("image_std", ())) != 3:
        raise ValueError(
            f"{source} does not say the size, mean and deviation of the images it takes "
            "(preprocessor_config.json, image_size of config.json)"
        )
    return side, said["image_mean"], said["image_std"]
