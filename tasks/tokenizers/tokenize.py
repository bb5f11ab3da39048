"""Computing tokens once, so that a transformer trains without running the encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from nextscale.core.schedule import ScaleSchedule
from nextscale.datasets.images import ImageDataset
from nextscale.datasets.tokens import TokenWriter
from nextscale.tasks.tokenizers.image_tokenizer import ImageTokenizer


def fingerprint(tokenizer: ImageTokenizer) -> str:
    """A short digest of the weights that decide tokens: tokens of another tokenizer are not mixed in."""
    digest = hashlib.sha256()
    for name, value in sorted(tokenizer.state_dict().items()):
        if not name.startswith(("decoder.", "post_quant_conv.")):
            digest.update(name.encode())
            digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def write_tokens(
    tokenizer: ImageTokenizer,
    dataset: ImageDataset,
    folder: str | Path,
    *,
    schedule: ScaleSchedule | None = None,
    views: int = 1,
    mirrored: bool = True,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Encode every image and keep the tokens as shards; an interrupted run continues where it was.

    Args:
        dataset: opened without flipping.
        views: crops per image.
        mirrored: keep each crop's mirror image too.
        progress: called with (samples written, samples in all).

    Raises:
        ValueError: the folder holds tokens of another tokenizer, schedule or number of views.
    """
    schedule = schedule or tokenizer.config.schedule
    per_image = views * (2 if mirrored else 1)
    metadata = {
        **tokenizer.stored_as(),
        "schedule": str(schedule),
        "tokenizer": fingerprint(tokenizer),
        "views": per_image,
        "classes": list(dataset.classes) if dataset.classes else None,
        "num_classes": dataset.num_classes,
        "images": len(dataset),
        "size": dataset.size,
    }
    device = next(tokenizer.parameters()).device
    total = len(dataset) * per_image
    with TokenWriter(folder, metadata=metadata) as writer:
        safe = writer.written  # shards end at any sample, also between the views of an image
        for start in range(0, len(dataset), batch_size):
            stop = min(start + batch_size, len(dataset))
            done = safe - start * per_image
            if done >= (stop - start) * per_image:
                continue
            tokens = []
            for view in range(views):
                images = dataset.fetch([(view, index) for index in range(start, stop)])
                for pixels in (images["image"], images["image"].flip(-1)) if mirrored else (images["image"],):
                    tokens.append(tokenizer.stored(pixels.to(device), schedule).cpu())
            stacked = torch.stack(tokens, dim=1).flatten(0, 1)
            labels = images["label"].repeat_interleave(per_image)
            indices = torch.arange(start, stop).repeat_interleave(per_image)
            skip = max(done, 0)
            writer.write(stacked[skip:], labels[skip:], indices[skip:])
            if progress is not None:
                progress(min(stop * per_image, total), total)
    return Path(folder)
