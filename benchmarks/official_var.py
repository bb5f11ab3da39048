"""The official VAR code (FoundationVision/VAR), run from a checkout that the user names, on this library's weights."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.tasks.generation.var import VARConfig
from nextscale.tasks.tokenizers.residual_vq import ResidualVQConfig


class OfficialVAR:
    """Its tokenizer and transformer with random weights, in float32; precision is a matter of autocast there.

    Raises:
        FileNotFoundError: the folder is no such checkout.
    """

    def __init__(
        self, checkout: str | Path, config: VARConfig, tokenizer: ResidualVQConfig, device: torch.device
    ) -> None:
        if not (Path(checkout) / "models" / "basic_var.py").is_file():
            raise FileNotFoundError(
                f"{checkout} holds no models/basic_var.py: give a checkout of https://github.com/FoundationVision/VAR"
            )
        with _imported(Path(checkout), device) as models, contextlib.redirect_stdout(io.StringIO()):
            self.tokenizer, self.transformer = models.build_vae_var(
                device,
                patch_nums=tuple(scale.height for scale in config.schedule.scales),
                ch=tokenizer.autoencoder.channels,
                num_classes=config.classes,
                depth=config.transformer.depth,
                shared_aln=config.transformer.conditioning == "shared",
            )
        for parameter in self.tokenizer.parameters():  # left as the memory was found
            torch.nn.init.normal_(parameter, std=0.02)
        self.transformer.eval().rng = torch.Generator(device)

    def load(self, transformer: dict[str, Tensor], tokenizer: dict[str, Tensor]) -> None:
        """Take over weights in the official layout, strictly."""
        self.transformer.load_state_dict(transformer, strict=True)
        self.tokenizer.load_state_dict(tokenizer, strict=True)

    def generate(self, labels: Tensor, guidance: float, decode: bool, precision: torch.dtype) -> Tensor:
        """Images in [0, 1], or the features to decode, under autocast to ``precision``.

        Not in inference mode, as its demo is: there autocast would convert all weights again at every scale.
        """
        if not decode:
            self.tokenizer.fhat_to_img = lambda features: features
        with torch.autocast(labels.device.type, precision, enabled=precision != torch.float32):
            images = self.transformer.autoregressive_infer_cfg(
                len(labels), labels, g_seed=0, cfg=guidance, top_k=900, top_p=0.96
            )
        return images.float().cpu()

    def teacher_forced(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Logits of all scales at once, with dropped labels as in training."""
        lengths = [stop - start for start, stop in self.transformer.begin_ends]
        inputs = self.tokenizer.quantize.idxBl_to_var_input(list(tokens.split(lengths, dim=1)))
        return self.transformer(labels, inputs)


@contextlib.contextmanager
def _imported(checkout: Path, device: torch.device) -> Iterator[Any]:
    """Its module ``models``, without what importing and building does to the rest of the process."""
    # Its attention takes xFormers wherever that can be imported, and then fails at the first call without CUDA.
    hidden = [] if device.type == "cuda" else ["xformers", "xformers.ops", "flash_attn"]
    before = {name: sys.modules.get(name) for name in hidden}
    layers = [cls for cls in vars(torch.nn).values() if isinstance(cls, type) and "reset_parameters" in vars(cls)]
    resets = {cls: cls.reset_parameters for cls in layers}
    sys.path.insert(0, str(checkout))
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield importlib.import_module("models")
    finally:
        sys.path.remove(str(checkout))
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
        # It turns the layers' initialisation off for good.
        for cls, reset in resets.items():
            cls.reset_parameters = reset  # type: ignore[assignment]
