"""The Inception network that published FID, sFID and Inception scores are measured with.

It is Inception v3 as TensorFlow published it on 2015-12-05, trained on 1008 outputs (Szegedy et al. 2015, arXiv
1512.00567). It differs from torchvision's: average pooling leaves the padding out of its mean, the last block pools by
maximum, and images are resized as TensorFlow 1 did. Weights are the user's: the file ``pt_inception-2015-12-05`` (also
``weights-inception-2015-12-05``), the TensorFlow weights in PyTorch's layout, as pytorch-fid and torch-fidelity use.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.evaluation.weights import read_weights

SIDE = 299
"""Pixels to which images are resized."""
FEATURES, CLASSES = 2048, 1008
SPATIAL_CHANNELS = 7
"""First channels of ``mixed_6/conv`` (17 x 17 cells) whose values are the spatial features (Nash et al. 2021)."""


class InceptionOutputs(NamedTuple):
    """features (B, 2048): the average over the last map, for FID. spatial (B, 2023): seven channels of a map of 17 x 17
    in the middle, for sFID, the channel running fastest. logits (B, 1008): without bias, as Inception scores take them.
    """

    features: Tensor
    spatial: Tensor
    logits: Tensor


class ConvNorm(nn.Module):
    """Convolution, batch normalisation with its running figures, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding: bool = True
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        around = (sides[0] // 2, sides[1] // 2) if padding else (0, 0)
        self.conv = nn.utils.skip_init(nn.Conv2d, inputs, outputs, sides, stride, around, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


Step = tuple[Any, ...]
"""(name, outputs, kernel), with stride 2 and no padding where a fourth entry says so; or the name of a pooling."""
Fork = list[Step]
"""Two convolutions of the same input, concatenated: the end of a branch."""


class Block(nn.Module):
    """Branches of one input, concatenated; the parts have the names of the weight file.

    Args:
        branches: each a list of steps. ``("mean",)`` and ``("max",)`` pool 3 x 3 at every place, ``("halve",)`` takes
            maxima at every second.
    """

    def __init__(self, inputs: int, branches: list[list[Step | Fork]]) -> None:
        super().__init__()
        self.branches = branches
        self.outputs = 0
        for branch in branches:
            channels = inputs
            for step in branch:
                fork = step if isinstance(step, list) else [step]
                made = [self._add(channels, each) for each in fork]
                channels = sum(made)
            self.outputs += channels

    def _add(self, inputs: int, step: Step) -> int:
        if len(step) == 1:
            return inputs
        name, outputs, kernel, *halves = step
        self.add_module(name, ConvNorm(inputs, outputs, kernel, stride=2 if halves else 1, padding=not halves))
        return int(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._branch(branch, x) for branch in self.branches], dim=1)

    def _branch(self, branch: list[Step | Fork], x: Tensor) -> Tensor:
        for step in branch:
            x = torch.cat([self._step(s, x) for s in step], dim=1) if isinstance(step, list) else self._step(step, x)
        return x

    def _step(self, step: Step, x: Tensor) -> Tensor:
        if step == ("mean",):
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        if step == ("max",):
            return F.max_pool2d(x, 3, stride=1, padding=1)
        if step == ("halve",):
            return F.max_pool2d(x, 3, stride=2)
        return self.part(str(step[0]), x)

    def part(self, name: str, x: Tensor) -> Tensor:
        """One convolution of the block."""
        module: nn.Module = getattr(self, name)
        y: Tensor = module(x)
        return y


def _block_35(inputs: int, pooled: int) -> Block:
    return Block(
        inputs,
        [
            [("branch1x1", 64, 1)],
            [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
            [("mean",), ("branch_pool", pooled, 1)],
        ],
    )


def _to_17(inputs: int) -> Block:
    return Block(
        inputs,
        [
            [("branch3x3", 384, 3, "halve")],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, "halve")],
            [("halve",)],
        ],
    )


def _block_17(inputs: int, inner: int) -> Block:
    wide, tall = (1, 7), (7, 1)
    double = [("branch7x7dbl_1", inner, 1), ("branch7x7dbl_2", inner, tall), ("branch7x7dbl_3", inner, wide)]
    return Block(
        inputs,
        [
            [("branch1x1", 192, 1)],
            [("branch7x7_1", inner, 1), ("branch7x7_2", inner, wide), ("branch7x7_3", 192, tall)],
            [*double, ("branch7x7dbl_4", inner, tall), ("branch7x7dbl_5", 192, wide)],
            [("mean",), ("branch_pool", 192, 1)],
        ],
    )


def _to_8(inputs: int) -> Block:
    cross = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1))]
    return Block(
        inputs,
        [
            [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, "halve")],
            [*cross, ("branch7x7x3_4", 192, 3, "halve")],
            [("halve",)],
        ],
    )


def _block_8(inputs: int, pooling: str) -> Block:
    wide, tall = (1, 3), (3, 1)
    return Block(
        inputs,
        [
            [("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, wide), ("branch3x3_2b", 384, tall)]],
            [
                ("branch3x3dbl_1", 448, 1),
                ("branch3x3dbl_2", 384, 3),
                [("branch3x3dbl_3a", 384, wide), ("branch3x3dbl_3b", 384, tall)],
            ],
            [(pooling,), ("branch_pool", 192, 1)],
        ],
    )


class FIDInception(nn.Module):
    """Made by :meth:`from_file`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2, padding=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padding=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padding=False)
        self.Mixed_5b = _block_35(192, 32)
        self.Mixed_5c = _block_35(256, 64)
        self.Mixed_5d = _block_35(288, 64)
        self.Mixed_6a = _to_17(288)
        self.Mixed_6b = _block_17(768, 128)
        self.Mixed_6c = _block_17(768, 160)
        self.Mixed_6d = _block_17(768, 160)
        self.Mixed_6e = _block_17(768, 192)
        self.Mixed_7a = _to_8(768)
        self.Mixed_7b = _block_8(1280, "mean")
        self.Mixed_7c = _block_8(2048, "max")
        self.fc = nn.utils.skip_init(nn.Linear, FEATURES, CLASSES)
        self.identity = ""

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> FIDInception:
        """With the weights of a file, read without running code.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or holds other weights.
        """
        content = read_weights(path)
        model = cls()
        own = model.state_dict()
        given = {name: value for name, value in content.items() if not name.startswith("AuxLogits.")}
        missing = [name for name in own if name not in given and not name.endswith("num_batches_tracked")]
        other = [name for name, value in given.items() if name not in own or own[name].shape != value.shape]
        if missing or other:
            raise ValueError(
                f"{path} is not the Inception network of FID: {len(missing)} entries are missing and {len(other)} are "
                f"others, such as {(missing + other)[0]}; expected pt_inception-2015-12-05 (fc of {CLASSES} outputs)"
            )
        model.load_state_dict(given, strict=False)
        model.identity = f"fid-inception:{_digest(given)}"
        return model.requires_grad_(False).eval()

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> InceptionOutputs:
        """Images of whole values 0 to 255, of any size."""
        x = (resize_like_tensorflow(images.float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        # TensorFlow counts the blocks from 0: its mixed_6 is Mixed_6d, and "conv" the block's 1 x 1 branch.
        middle = self.Mixed_6d.part("branch1x1", x)[:, :SPATIAL_CHANNELS]
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features = x.mean((2, 3))
        return InceptionOutputs(features, middle.permute(0, 2, 3, 1).flatten(1), F.linear(features, self.fc.weight))


def resize_like_tensorflow(images: Float[Tensor, "batch 3 height width"], side: int) -> Tensor:
    """Bilinear to a square of ``side`` pixels as TensorFlow 1 does it: output pixel i lies at i * size / side of the
    input, without half-pixel centres and without smoothing where the image shrinks."""

    def along(size: int) -> tuple[Tensor, Tensor, Tensor]:
        # float32, as TensorFlow's kernel computes it.
        place = torch.arange(side, dtype=torch.float32) * torch.tensor(size / side, dtype=torch.float32)
        low = place.long()
        return low.to(images.device), (low + 1).clamp(max=size - 1).to(images.device), (place - low).to(images)

    rows, columns = along(images.shape[2]), along(images.shape[3])
    left, right = images[..., columns[0]], images[..., columns[1]]
    across = left + (right - left) * columns[2]
    top, bottom = across[..., rows[0], :], across[..., rows[1], :]
    return top + (bottom - top) * rows[2][:, None]


def _digest(weights: Mapping[str, Tensor]) -> str:
    """Of three layers' weights, whatever file they lie in: only features of the same network may be compared."""
    digest = hashlib.sha256()
    for name in ("Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.conv.weight", "fc.weight"):
        digest.update(weights[name].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
