"""Mean and covariance of a stream of feature vectors, in float64, and their exchange as .npz files."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def as_features(features: Tensor | np.ndarray, name: str = "features") -> Tensor:
    """`features` as a finite float64 matrix (samples, dimensions); it stays on its device where that knows
    float64.

    Raises ValueError for another number of axes, for no dimension at all, and for NaN or infinite entries.
    """
    matrix = features if isinstance(features, Tensor) else torch.from_numpy(np.array(features, dtype=np.float64))
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise ValueError(f"{name} have shape {tuple(matrix.shape)}; expected (samples, dimensions)")
    # MPS has no float64, and the distances below subtract nearly equal numbers.
    if matrix.device.type == "mps":
        matrix = matrix.cpu()
    matrix = matrix.detach().to(torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        bad = int((~torch.isfinite(matrix)).any(dim=1).sum())
        raise ValueError(f"{name}: {bad} of {len(matrix)} samples hold NaN or infinite values; expected finite ones")
    return matrix


@dataclass
class Moments:
    """Mean (D,) and unbiased covariance (D, D) of `count` feature vectors, both float64 arrays.

    `count` is None where a file did not say it; such moments can be compared but not updated.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None

    def __post_init__(self) -> None:
        self.mean = np.asarray(self.mean, dtype=np.float64)
        self.covariance = np.asarray(self.covariance, dtype=np.float64)
        if self.mean.ndim != 1 or self.covariance.shape != (len(self.mean), len(self.mean)):
            raise ValueError(
                f"mean of shape {self.mean.shape} and covariance of shape {self.covariance.shape} do not go "
                "together; expected (D,) and (D, D)"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("mean or covariance hold NaN or infinite values; expected finite ones")
        if self.count is not None and self.count < 0:
            raise ValueError(f"count is {self.count}; expected 0 or more")

    @classmethod
    def empty(cls, dimensions: int) -> Moments:
        """Moments of no vector yet, to be updated."""
        return cls(np.zeros(dimensions), np.zeros((dimensions, dimensions)), 0)

    @classmethod
    def of(cls, features: Tensor | np.ndarray | Iterable[Tensor | np.ndarray]) -> Moments:
        """Moments of one matrix (samples, D), or of an iterable of such matrices that is read once."""
        if isinstance(features, (Tensor, np.ndarray)):
            batches: Iterable[Tensor | np.ndarray] = [features]
        else:
            batches = features
        moments: Moments | None = None
        for batch in batches:
            matrix = as_features(batch)
            moments = cls.empty(matrix.shape[1]) if moments is None else moments
            moments.update(matrix)
        if moments is None:
            raise ValueError("no features were given; expected at least one batch (samples, dimensions)")
        return moments

    def update(self, features: Tensor | np.ndarray) -> None:
        """Take in a batch (samples, D), by the pairwise update of Chan, Golub and LeVeque (1979).

        The result depends on the split into batches only by rounding.
        """
        if self.count is None:
            raise ValueError("these moments do not say of how many vectors they are, so they cannot be updated")
        batch = as_features(features).cpu().numpy()
        if batch.shape[1] != len(self.mean):
            raise ValueError(f"features have {batch.shape[1]} dimensions; the moments so far have {len(self.mean)}")
        if len(batch) == 0:
            return
        old, new = self.count, len(batch)
        mean = batch.mean(axis=0)
        centred = batch - mean
        shift = mean - self.mean
        scatter = self.covariance * max(old - 1, 0) + centred.T @ centred
        scatter += np.outer(shift, shift) * (old * new / (old + new))
        self.mean = self.mean + shift * (new / (old + new))
        self.covariance = scatter / max(old + new - 1, 1)
        self.count = old + new

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `mu`, `sigma` (the names of ADM's reference files) and `count` to a .npz file, atomically."""
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"{path}: moments are written as .npz; name the file so")
        count = {} if self.count is None else {"count": np.asarray(self.count, dtype=np.int64)}
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, allow_pickle=False, mu=self.mean, sigma=self.covariance, **count)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Read `mu` and `sigma` from a .npz file, as ADM's reference batches hold them; nothing in it is
        executed.

        Raises FileNotFoundError, or ValueError for a damaged file or one without those arrays.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                names = set(file.files)
                if not {"mu", "sigma"} <= names:
                    raise ValueError(f"it holds {sorted(names)}; expected the arrays mu and sigma")
                count = int(file["count"]) if "count" in names else None
                return cls(file["mu"], file["sigma"], count)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: there is no such file of feature moments") from None
        except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} cannot be read as feature moments: {error}") from error
