"""Objects in images, by an instance segmentation model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .geneval import Detection

OTHER_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
"""GenEval's names of COCO classes, where they are others."""


class Mask2Former:
    """Instances by a Mask2Former, such as ``facebook/mask2former-swin-small-coco-instance``.

    An instance's confidence is its class's probability times its mask's mean probability, as in the model's own code.

    Args:
        source: folder or hub name.

    Raises:
        ValueError: the source holds another kind of model.
        OSError: it is not here and cannot be fetched.
    """

    def __init__(self, source: str | Path, device: str | torch.device = "cpu") -> None:
        from transformers import AutoConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

        kind = AutoConfig.from_pretrained(source).model_type
        if kind != "mask2former":
            raise ValueError(f"{source} is a {kind!r} model of transformers, expected a Mask2Former")
        self.device = torch.device(device)
        self.model: Any = Mask2FormerForUniversalSegmentation.from_pretrained(source).to(self.device).eval()
        self._processor: Any = Mask2FormerImageProcessorPil.from_pretrained(source)

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> Sequence[Detection]:
        """The objects in an image, the most confident first."""
        given = self._processor(image.convert("RGB"), return_tensors="pt")
        output = self.model(pixel_values=given["pixel_values"].to(self.device))
        (found,) = self._processor.post_process_instance_segmentation(
            output, threshold=0.0, target_sizes=[image.size[::-1]], return_binary_maps=True
        )
        names = self.model.config.id2label
        maps = found["segmentation"]
        detections = []
        for place, segment in enumerate(found["segments_info"]):
            mask = np.asarray(maps[place]).astype(bool)
            if not mask.any():
                continue
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            name = str(names[segment["label_id"]])
            detections.append(
                Detection(
                    OTHER_NAMES.get(name, name),
                    float(segment["score"]),
                    (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)),
                    mask,
                )
            )
        return sorted(detections, key=lambda each: -each.confidence)
