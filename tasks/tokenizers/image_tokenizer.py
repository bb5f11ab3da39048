"""What image tokenizers share: a convolutional autoencoder around a quantiser of scales, and its files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.autoencoder import Decoder, Encoder, lay_out_channels_last
from nextscale.core.checkpoint import CheckpointError, assign, read_folder, read_tensors, save_folder, weightless
from nextscale.core.config import from_json, to_json
from nextscale.core.schedule import ScaleSchedule


class ImageTokenizer(nn.Module, ABC):
    """Image in [-1, 1] <-> token pyramid.

    A subclass sets the two class attributes and, in its constructor, ``config`` (which has ``autoencoder``,
    ``quantizer`` and ``schedule``, the scales used where none are given) and the five parts. Its quantiser has
    ``encode`` and ``decode`` of whole pyramids, as :class:`nextscale.core.quantizer.ResidualQuantizer` has.
    """

    system: ClassVar[str]
    """The name that saved folders carry."""
    config_class: ClassVar[type]

    config: Any
    encoder: Encoder
    quant_conv: nn.Module
    quantizer: Any
    post_quant_conv: nn.Module
    decoder: Decoder

    @property
    def stride(self) -> int:
        """Image pixels per cell of the finest map, along each side."""
        stride: int = self.config.autoencoder.stride
        return stride

    def image_size(self, schedule: ScaleSchedule | None = None) -> tuple[int, int]:
        """(height, width) of the images a schedule stands for."""
        size: tuple[int, int] = (schedule or self.config.schedule).scaled(self.stride)
        return size

    def features(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch codes height/stride width/stride"]:
        """The continuous latent that is quantised, float32.

        Raises:
            ValueError: the image's sides are not multiples of the stride.
        """
        if images.shape[-1] % self.stride or images.shape[-2] % self.stride:
            raise ValueError(
                f"images are {images.shape[-2]} x {images.shape[-1]} pixels; "
                f"both sides must be multiples of {self.stride}"
            )
        dtype = next(self.encoder.parameters()).dtype
        images = images.to(dtype=dtype, memory_format=torch.channels_last)
        return self.quant_conv(self.encoder(images)).float()

    @torch.no_grad()
    def encode(
        self, images: Float[Tensor, "batch 3 height width"], schedule: ScaleSchedule | None = None
    ) -> Int[Tensor, "batch length"]:
        """Tokens of all scales, in one sequence. Images in [-1, 1]."""
        return torch.cat(self.quantizer.encode(self.features(images), schedule or self.config.schedule)[0], dim=1)

    def decode_features(
        self, features: Float[Tensor, "batch codes height width"]
    ) -> Float[Tensor, "batch 3 height*stride width*stride"]:
        """The image of a (quantised) latent, clamped to [-1, 1], float32."""
        self._lay_out_decoder()
        dtype = self.decoder.conv_in.weight.dtype
        latent = self.post_quant_conv(features.to(dtype=dtype, memory_format=torch.channels_last))
        # A CPU gains nothing from a batch of convolutions; one image at a time keeps the memory small.
        parts = latent.split(1 if latent.device.type == "cpu" else len(latent))
        return torch.cat([self.decoder(part).float() for part in parts]).clamp_(-1, 1)

    def _lay_out_decoder(self) -> None:
        """Store the decoder's weights channels last, the layout that convolutions are fastest in.

        At the first use, because files hold the other layout and stay memory-mapped until they are needed.
        """
        if not self.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last):
            # Outside inference mode: weights made inside one could not be trained later.
            with torch.inference_mode(False):
                lay_out_channels_last(self.decoder)

    @torch.no_grad()
    def decode(
        self, tokens: Int[Tensor, "batch length"], schedule: ScaleSchedule | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        """The image of a whole pyramid of tokens."""
        return self.decode_features(self.quantizer.decode(tokens, schedule or self.config.schedule)[-1])

    def stored_as(self) -> dict[str, Any]:
        """The kind of numbers :meth:`stored` gives, for :class:`nextscale.datasets.tokens.TokenWriter`."""
        return {"vocabulary": self.config.quantizer.vocabulary}

    def stored(self, images: Float[Tensor, "batch 3 height width"], schedule: ScaleSchedule | None = None) -> Tensor:
        """What is kept of images so that transformers train without the encoder, (batch, numbers): their tokens."""
        return self.encode(images, schedule)

    # --- files -------------------------------------------------------------------------------------------

    official_entry: ClassVar[str | None] = None
    """Where official files keep the state dict; None: they are it."""

    @property
    def parts(self) -> dict[str, Any]:
        """The models a file may hold, by what they are; each has ``config``, ``official_name``, ``to_official``."""
        return {"tokenizer": self}

    @property
    @abstractmethod
    def official_name(self) -> str:
        """The file name that the official repository gives such a tokenizer."""

    def official_differences(self) -> list[str]:
        """What the official code must be changed in to compute the same, as its files cannot say it."""
        return []

    @classmethod
    @abstractmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[Any, dict[str, Tensor]]:
        """Configuration and flat state dict in an official file's content; overrides as for :meth:`from_official`."""

    def save(self, folder: str | Path) -> Path:
        """Write ``model.safetensors`` and ``config.json``; :meth:`load` reads them back."""
        return save_folder(folder, self.state_dict(), {"system": self.system, "config": to_json(self.config)})

    @classmethod
    def load(cls, source: str | Path, **overrides: Any) -> Self:
        """From a folder written by :meth:`save`, or from an official file.

        Args:
            overrides: as for :meth:`from_official`; for official files only.
        """
        if not Path(source).is_dir():
            return cls.from_official(read_tensors(source), **overrides)
        state, config = read_folder(source)
        return cls.from_saved(state, config)

    @classmethod
    def from_saved(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """From the content of a saved folder."""
        if config.get("system") != cls.system:
            raise CheckpointError(f"this is a saved {config.get('system')!r}, expected {cls.system!r}")
        with weightless():
            model = cls(from_json(cls.config_class, config["config"]))
        assign(model, state, "the saved tokenizer")
        return model.eval()

    @classmethod
    @abstractmethod
    def from_official(cls, content: Mapping[str, Any], **overrides: Any) -> Self:
        """Build from an official file's content; sizes are read from its keys and shapes."""
