"""What is kept of a set of images to compare it with others: moments and features in one network, as .npz files.

The field's reference batches are read as well (of ADM, Dhariwal and Nichol 2021: ``arr_0``, ``mu``, ``sigma``,
``mu_s``, ``sigma_s``).
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.evaluation.moments import Moments
from nextscale.evaluation.networks import Network
from nextscale.evaluation.npz_images import IMAGES, NpzImages, names_in

ADM_ARRAYS = ("mu", "sigma", "mu_s", "sigma_s")


@dataclass(frozen=True)
class FeatureStatistics:
    """Of a set of images.

    network: its identity. moments, spatial: of features and spatial features (None: the network has none, or the file
    did not hold them). features (N, D) float32: None where only moments are known. logits (N, classes): None where the
    network has none or they were not kept.
    """

    network: str
    moments: Moments
    spatial: Moments | None = None
    features: Tensor | None = None
    logits: Tensor | None = None

    @property
    def count(self) -> int | None:
        """How many images; None where a file did not say it."""
        return len(self.features) if self.moments.count is None and self.features is not None else self.moments.count

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a .npz file, atomically; `read_statistics` reads it. Logits are not kept."""
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"{path}: statistics are written as .npz; name the file so")
        arrays: dict[str, Any] = {"mu": self.moments.mean, "sigma": self.moments.covariance}
        arrays["network"] = np.array(self.network)
        if self.moments.count is not None:
            arrays["count"] = np.array(self.moments.count, dtype=np.int64)
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path


class Rows:
    """A matrix that grows in place.

    A tensor kept of every batch would cost far more than its own size: each lands in the room that the batch's images
    leave when they are freed, and the next batch's no longer fit there.
    """

    def __init__(self) -> None:
        self._rows: np.ndarray | None = None
        self._count = 0
        self._given = False

    def add(self, rows: Tensor) -> None:
        """Append (B, D)."""
        values = rows.cpu().numpy()
        needed = self._count + len(values)
        if self._rows is None:
            self._rows = np.empty((max(1024, needed), values.shape[1]), values.dtype)
        if self._given:  # what was given away must not move
            self._rows, self._given = self._rows.copy(), False
        if needed > len(self._rows):
            self._rows.resize((max(needed, len(self._rows) * 5 // 4), self._rows.shape[1]), refcheck=False)
        self._rows[self._count : needed] = values
        self._count = needed

    def matrix(self) -> Tensor | None:
        """What was added, (N, D); None where nothing was."""
        if self._rows is None:
            return None
        if not self._given:
            self._rows.resize((self._count, self._rows.shape[1]), refcheck=False)
            self._given = True
        return torch.from_numpy(self._rows)


class Gathering:
    """Statistics of images that come in batches and are not kept: 50,000 images in Inception's features take 0.6 GB."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._features, self._logits = Rows(), Rows()
        self._moments: Moments | None = None
        self._spatial: Moments | None = None

    def add(self, images: Tensor) -> None:
        """Take in images (B, 3, H, W) in [0, 1]."""
        made = self.network(images)
        features = made.features.cpu()
        self._moments = self._moments or Moments.empty(features.shape[1])
        self._moments.update(features)
        self._features.add(features)
        if made.spatial is not None:
            self._spatial = self._spatial or Moments.empty(made.spatial.shape[1])
            self._spatial.update(made.spatial.cpu())
        if made.logits is not None:
            self._logits.add(made.logits)

    def statistics(self) -> FeatureStatistics:
        """Raises ValueError before the first image."""
        if self._moments is None:
            raise ValueError("no images were given; expected at least one batch (B, 3, H, W)")
        features, logits = self._features.matrix(), self._logits.matrix()
        return FeatureStatistics(self.network.identity, self._moments, self._spatial, features, logits)


def statistics_of(
    batches: Iterable[Tensor], network: Network, progress: Callable[[int], None] | None = None
) -> FeatureStatistics:
    """Of images (B, 3, H, W) in [0, 1], read once. `progress` is called with the number of images done."""
    gathering, done = Gathering(network), 0
    for images in batches:
        gathering.add(images)
        done += len(images)
        if progress is not None:
            progress(done)
    return gathering.statistics()


def holds_statistics(path: str | os.PathLike[str]) -> bool:
    """Whether a .npz file has moments of features."""
    return {"mu", "sigma"} <= names_in(path)


def read_statistics(path: str | os.PathLike[str], network: Network) -> FeatureStatistics:
    """The statistics in a .npz file; nothing in it is executed.

    A file that names no network is taken for one of the field's, made with the Inception network of FID.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or was made with another network.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            if not {"mu", "sigma"} <= names:
                raise ValueError(f"it holds {', '.join(sorted(names))}; expected mu and sigma")
            _check_network(str(file["network"]) if "network" in names else None, network)
            count = int(file["count"]) if "count" in names else None
            spatial = Moments(file["mu_s"], file["sigma_s"], count) if {"mu_s", "sigma_s"} <= names else None
            features = torch.from_numpy(file["features"].astype(np.float32)) if "features" in names else None
            moments = Moments(file["mu"], file["sigma"], count)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file of statistics") from None
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as statistics: {error}") from error
    return FeatureStatistics(network.identity, moments, spatial, features)


def _check_network(made_with: str | None, network: Network) -> None:
    if made_with is None and not network.inception:
        raise ValueError(
            "it names no network, so it is taken for one of the Inception network of FID; with another network "
            "give the images themselves"
        )
    if made_with is not None and made_with != network.identity:
        raise ValueError(f"it was made with {made_with}, here is {network.identity}: figures cannot be compared")


def with_features(
    statistics: FeatureStatistics,
    path: str | os.PathLike[str],
    network: Network,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> FeatureStatistics:
    """The file's moments, with features of the images it also holds (ADM's batches: moments of the whole data set, and
    10,000 of its images for precision and recall)."""
    if statistics.features is not None or IMAGES not in names_in(path):
        return statistics
    made = statistics_of(NpzImages(path).batches(batch_size), network, progress)
    return FeatureStatistics(network.identity, statistics.moments, statistics.spatial, made.features)
