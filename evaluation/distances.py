"""Distances between two sets of feature vectors: Fréchet, kernel, precision and recall, Inception score.

Pure functions of features or logits. Which network made the features decides what the numbers mean: only
those of one network may stand side by side, and only at like numbers of samples (the Fréchet distance grows
as a set shrinks).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nextscale.evaluation.moments import Moments, as_features

__all__ = [
    "Moments",
    "PrecisionRecall",
    "Score",
    "frechet_distance",
    "inception_score",
    "kid",
    "nearest",
    "precision_recall",
]

_BLOCK_ENTRIES = 1 << 24
"""Distances held at a time (128 MiB of float64): 50,000 x 50,000 would be 20 GB."""


class Score(NamedTuple):
    """A figure averaged over subsets, with its standard deviation over them (divisor: their number)."""

    mean: float
    std: float


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: of generated samples inside the real manifold, of real ones inside the generated."""

    precision: float
    recall: float


def frechet_distance(features_a: Tensor | np.ndarray | Moments, features_b: Tensor | np.ndarray | Moments) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two sets of features (Heusel et al. 2017, equation
    6).

    |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)), in float64. The last trace is the sum of the
    square roots of the eigenvalues of the symmetric C_a^(1/2) C_b C_a^(1/2), which unlike a general matrix
    square root stays real and exact for covariances without full rank (fewer samples than dimensions, a
    constant dimension).

    features_*: matrices (samples, D) with at least two samples, or their `Moments`. Returns a number >= 0.
    """
    a = features_a if isinstance(features_a, Moments) else Moments.of(features_a)
    b = features_b if isinstance(features_b, Moments) else Moments.of(features_b)
    if len(a.mean) != len(b.mean):
        raise ValueError(
            f"the two sets have {len(a.mean)} and {len(b.mean)} dimensions; expected features of one network"
        )
    for name, moments in (("first", a), ("second", b)):
        if moments.count is not None and moments.count < 2:
            raise ValueError(f"the {name} set has {moments.count} samples; a covariance takes at least 2")
    values, vectors = np.linalg.eigh(a.covariance)
    # Rounding leaves +-1e-16 of the largest eigenvalue where zero belongs, and a square root would make that
    # 1e-8.
    floor = np.finfo(np.float64).eps * len(values)
    values = np.where(values > floor * max(values[-1], 0.0), values, 0.0)
    root = vectors * np.sqrt(values)
    inner = np.linalg.eigvalsh(root.T @ b.covariance @ root)
    inner = np.where(inner > floor * max(inner[-1], 0.0), inner, 0.0)
    shift = a.mean - b.mean
    distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(inner).sum()
    return max(float(distance), 0.0)


def kid(
    features_a: Tensor | np.ndarray,
    features_b: Tensor | np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 0,
) -> Score:
    """Kernel distance (Bińkowski et al. 2018): the unbiased squared MMD under the kernel (x . y / D + 1)^3.

    Mean and standard deviation over `subsets` random draws of `subset_size` samples from each set (None:
    1000, or the smaller set's size if that is less), drawn without replacement from a generator seeded with
    `seed`. Unbiased, so it may be negative for sets of one distribution.
    """
    a = as_features(features_a)
    b = as_features(features_b).to(a.device)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"the two sets have {a.shape[1]} and {b.shape[1]} dimensions; expected features of one network"
        )
    least = min(len(a), len(b))
    size = min(1000, least) if subset_size is None else subset_size
    if not 2 <= size <= least:
        raise ValueError(f"subsets of {size} cannot be drawn from {len(a)} and {len(b)} samples; expected 2 to {least}")
    if subsets < 1:
        raise ValueError(f"subsets is {subsets}; expected 1 or more")
    generator = torch.Generator().manual_seed(seed)
    estimates = []
    for _ in range(subsets):
        x = a[torch.randperm(len(a), generator=generator)[:size].to(a.device)]
        y = b[torch.randperm(len(b), generator=generator)[:size].to(b.device)]
        within = 0.0
        for z in (x, y):
            kernel = (z @ z.T / z.shape[1] + 1) ** 3
            within += float(kernel.sum() - kernel.diagonal().sum()) / (size * (size - 1))
        estimates.append(within - 2 * float(((x @ y.T / x.shape[1] + 1) ** 3).mean()))
    return Score(float(np.mean(estimates)), float(np.std(estimates)))


def squared_distance_blocks(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared Euclidean distances, some rows at a time: (row slice, (rows in it, len(columns))) in float64.

    Pairs that agree to rounding have distance exactly 0, so that copies are found as such.
    """
    step = max(1, _BLOCK_ENTRIES // max(len(columns), 1))
    column_norms = columns.square().sum(dim=1)
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        norms = block.square().sum(dim=1, keepdim=True) + column_norms
        squared = torch.addmm(norms, block, columns.T, alpha=-2)
        squared[squared <= norms * 1e-12] = 0.0
        yield slice(start, start + len(block)), squared


def nearest(queries: Tensor | np.ndarray, references: Tensor | np.ndarray, k: int = 1) -> tuple[Tensor, Tensor]:
    """Indices (N, k) and Euclidean distances (N, k) of each query's k nearest references, nearest first."""
    rows, columns = as_features(queries, "queries"), as_features(references, "references")
    if rows.shape[1] != columns.shape[1]:
        raise ValueError(f"queries have {rows.shape[1]} dimensions, references {columns.shape[1]}; expected the same")
    if not 1 <= k <= len(columns):
        raise ValueError(f"k is {k}; expected 1 to the number of references, {len(columns)}")
    found = [
        squared.topk(k, dim=1, largest=False) for _, squared in squared_distance_blocks(rows, columns.to(rows.device))
    ]
    if not found:
        return torch.empty(0, k, dtype=torch.int64), torch.empty(0, k, dtype=torch.float64)
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found]).sqrt()


def _radii(samples: Tensor, k: int) -> Tensor:
    """Squared distance of every sample to its k-th nearest other sample."""
    # The nearest of all is the sample itself, hence k + 1.
    return torch.cat(
        [squared.kthvalue(k + 1, dim=1).values for _, squared in squared_distance_blocks(samples, samples)]
    )


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of the points that lie in at least one ball."""
    inside = 0
    for _, squared in squared_distance_blocks(points, centres):
        inside += int((squared <= radii).any(dim=1).sum())
    return inside / len(points)


def precision_recall(real: Tensor | np.ndarray, fake: Tensor | np.ndarray, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1 and 2) with k nearest neighbours.

    A set's manifold is the union of balls around its samples that reach to their k-th nearest other sample.
    Precision is the share of `fake` (M, D) inside the manifold of `real` (N, D), recall the reverse.
    Distances are made some rows at a time, so memory grows with N + M. Both sets need more than k samples;
    the paper takes equally many of each, and recall falls as `fake` becomes the smaller set.
    """
    real_features, fake_features = as_features(real, "real features"), as_features(fake, "generated features")
    if real_features.shape[1] != fake_features.shape[1]:
        raise ValueError(
            f"real features have {real_features.shape[1]} dimensions, generated ones "
            f"{fake_features.shape[1]}; expected features of one network"
        )
    fewest = min(len(real_features), len(fake_features))
    if not 1 <= k < fewest:
        raise ValueError(f"k is {k} with {fewest} samples in the smaller set; expected 1 <= k < {fewest}")
    fake_features = fake_features.to(real_features.device)
    # Centring keeps the matrix form of the distances accurate where all features share a large offset.
    centre = real_features.mean(dim=0)
    real_features, fake_features = real_features - centre, fake_features - centre
    return PrecisionRecall(
        precision=_covered(fake_features, real_features, _radii(real_features, k)),
        recall=_covered(real_features, fake_features, _radii(fake_features, k)),
    )


def inception_score(logits: Tensor | np.ndarray, *, splits: int = 1, seed: int | None = 0) -> Score:
    """exp of the mean Kullback-Leibler divergence from p(y) to p(y | x) (Salimans et al. 2016), logits (N,
    classes).

    Mean and standard deviation over `splits` parts of nearly equal size. Samples are first shuffled with
    `seed`, because the score of a part that holds one class only is 1; None keeps their order. It lies
    between 1 and the number of classes.
    """
    matrix = as_features(logits, "logits")
    if matrix.shape[1] < 2:
        raise ValueError("logits are of one class only; the score takes at least 2 classes")
    if not 1 <= splits <= len(matrix):
        raise ValueError(f"{len(matrix)} samples cannot be split into {splits}; expected 1 to the number of samples")
    if seed is not None:
        order = torch.randperm(len(matrix), generator=torch.Generator().manual_seed(seed))
        matrix = matrix[order.to(matrix.device)]
    scores = []
    for part in matrix.tensor_split(splits):
        log_conditional = part.log_softmax(dim=1)
        log_marginal = log_conditional.logsumexp(dim=0) - np.log(len(part))
        divergence = (log_conditional.exp() * (log_conditional - log_marginal)).sum(dim=1)
        scores.append(float(divergence.mean().exp()))
    return Score(float(np.mean(scores)), float(np.std(scores)))
