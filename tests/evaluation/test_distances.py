"""Feature distances against independent computations, and what they do with odd input."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from nextscale.evaluation import distances
from nextscale.evaluation.distances import (
    Moments,
    frechet_distance,
    inception_score,
    kid,
    nearest,
    precision_recall,
)


def features(count: int, dimensions: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, dimensions)) @ rng.normal(size=(dimensions, dimensions)) + rng.normal(
        size=dimensions
    )


def frechet_by_matrix_square_root(a: np.ndarray, b: np.ndarray) -> float:
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b).real
    shift = a.mean(axis=0) - b.mean(axis=0)
    return float(shift @ shift + np.trace(covariance_a + covariance_b - 2 * root))


def test_frechet_distance_equals_scipys_matrix_square_root() -> None:
    a, b = features(300, 12, 0), features(200, 12, 1)
    assert frechet_distance(a, b) == pytest.approx(frechet_by_matrix_square_root(a, b), rel=1e-9)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-10)


def test_frechet_distance_equals_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flat(nn.Module):
        num_features = 12

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    metric = FrechetInceptionDistance(feature=Flat(), normalize=True, input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    a = torch.rand(60, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    b = a.flip(0)[:50] ** 1.3
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet_distance(a.flatten(1), b.flatten(1)) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_frechet_distance_with_fewer_samples_than_dimensions_is_exact() -> None:
    # Sets in orthogonal subspaces: the cross term is zero, so the distance is the sum of the traces.
    a, b = np.zeros((5, 20)), np.zeros((6, 20))
    a[:, :3], b[:, 10:14] = features(5, 3, 0), features(6, 4, 1)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + a.var(axis=0, ddof=1).sum() + b.var(axis=0, ddof=1).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    few = features(5, 64, 2)
    assert frechet_distance(few, few) < 1e-8 * np.trace(np.cov(few, rowvar=False))


def test_frechet_distance_of_constant_sets_is_that_of_their_means() -> None:
    assert frechet_distance(np.ones((4, 3)), np.ones((7, 3))) == 0
    assert frechet_distance(np.ones((4, 3)), np.full((7, 3), 3.0)) == pytest.approx(12)


def test_frechet_distance_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match="12 and 5 dimensions"):
        frechet_distance(features(9, 12, 0), features(9, 5, 0))
    with pytest.raises(ValueError, match="second set has 1 samples"):
        frechet_distance(features(9, 4, 0), features(1, 4, 0))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(np.full((3, 2), np.nan), features(3, 2, 0))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        frechet_distance(np.zeros(3), features(3, 2, 0))


def test_streamed_moments_do_not_depend_on_the_batches() -> None:
    # A large mean beside a small spread: sums of squares would lose the covariance.
    all_at_once = features(101, 6, 3) * 1e-3 + 1e4
    streamed = Moments.of(iter([all_at_once[:1], all_at_once[1:1], all_at_once[1:40], all_at_once[40:]]))
    assert streamed.count == 101
    np.testing.assert_allclose(streamed.mean, all_at_once.mean(0), rtol=1e-14)
    np.testing.assert_allclose(streamed.covariance, np.cov(all_at_once, rowvar=False), rtol=1e-7, atol=1e-14)


def test_moments_are_exchanged_under_adms_names(tmp_path: Path) -> None:
    moments = Moments.of(features(30, 5, 0))
    moments.save(tmp_path / "reference.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["reference.npz"]
    loaded = Moments.load(tmp_path / "reference.npz")
    assert loaded.count == 30
    assert frechet_distance(loaded, moments) < 1e-9
    np.savez(tmp_path / "adm.npz", mu=moments.mean, sigma=moments.covariance, arr_0=np.zeros(3, np.uint8))
    adm = Moments.load(tmp_path / "adm.npz")
    assert adm.count is None
    with pytest.raises(ValueError, match="cannot be updated"):
        adm.update(features(3, 5, 1))


def test_moment_files_that_are_damaged_or_hold_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        Moments.load(tmp_path / "absent.npz")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(ValueError, match="expected the arrays mu and sigma"):
        Moments.load(tmp_path / "other.npz")
    np.savez(tmp_path / "objects.npz", mu=np.array([print], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="cannot be read"):
        Moments.load(tmp_path / "objects.npz")
    whole = (tmp_path / "other.npz").read_bytes()
    for name, content in {"cut.npz": whole[:60], "text.npz": b"not a file", "empty.npz": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            Moments.load(tmp_path / name)


def test_kid_equals_torchmetrics_and_the_sums_written_out() -> None:
    from torchmetrics.image.kid import poly_mmd

    a, b = torch.from_numpy(features(40, 6, 0)), torch.from_numpy(features(40, 6, 1))
    score = kid(a, b, subsets=2)
    assert score.mean == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)
    assert score.std == pytest.approx(0, abs=1e-9 * abs(score.mean))
    pairs = [(i, j) for i in range(40) for j in range(40)]

    def k(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x @ y / 6 + 1) ** 3)

    within = sum(k(z[i], z[j]) for z in (a, b) for i, j in pairs if i != j) / (40 * 39)
    assert score.mean == pytest.approx(within - 2 * sum(k(a[i], b[j]) for i, j in pairs) / 1600, rel=1e-9)


def test_kid_draws_by_its_seed_and_refuses_too_large_subsets() -> None:
    a, b = features(60, 6, 0), features(50, 6, 0)[::-1].copy()
    assert kid(a, b, subsets=5, subset_size=20, seed=1) == kid(a, b, subsets=5, subset_size=20, seed=1)
    assert kid(a, b, subsets=5, subset_size=20, seed=1) != kid(a, b, subsets=5, subset_size=20, seed=2)
    with pytest.raises(ValueError, match="expected 2 to 50"):
        kid(a, b, subset_size=51)


def test_precision_and_recall_of_a_case_worked_by_hand() -> None:
    # On a line with k = 1 the real balls reach 1 around 0 and 1, and 9 around 10; the generated
    # 4 around 5 and 9, and 35 around -30.
    real, fake = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[5.0], [9.0], [-30.0]])
    assert precision_recall(real, fake, k=1) == (2 / 3, 1)


def test_precision_and_recall_equal_the_definition_and_do_not_depend_on_the_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, fake = features(60, 4, 0), features(50, 4, 0) * 1.4 + 0.5

    def covered(points: np.ndarray, centres: np.ndarray, k: int) -> float:
        among = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        radii = np.sort(among, axis=1)[:, k]
        return float((np.linalg.norm(points[:, None] - centres[None], axis=-1) <= radii).any(axis=1).mean())

    whole = precision_recall(real, fake, k=3)
    assert whole == (covered(fake, real, 3), covered(real, fake, 3))
    assert 0 < whole.precision < 1
    monkeypatch.setattr(distances, "_BLOCK_ENTRIES", 130)
    assert precision_recall(real, fake, k=3) == whole


def test_precision_and_recall_at_the_ends() -> None:
    same = features(20, 3, 0)
    assert precision_recall(same, same) == (1, 1)
    assert precision_recall(same, same + 1e6) == (0, 0)
    # A generator that gives one picture only: precise, and with no recall.
    assert precision_recall(same, np.repeat(same[:1], 9, axis=0)).precision == 1
    assert precision_recall(same, np.repeat(same[:1], 9, axis=0)).recall == 1 / 20
    with pytest.raises(ValueError, match="3 samples in the smaller set"):
        precision_recall(same, same[:3])


def test_inception_score_equals_torchmetrics_formula_and_stays_in_its_range() -> None:
    logits = torch.from_numpy(features(90, 7, 0))
    p = logits.softmax(1)
    expected = float((p * (p.log() - p.mean(0, keepdim=True).log())).sum(1).mean().exp())
    assert inception_score(logits).mean == pytest.approx(expected, rel=1e-12)
    certain = 200 * torch.eye(7).repeat(10, 1)
    assert inception_score(certain).mean == pytest.approx(7, rel=1e-9)
    assert inception_score(torch.zeros(8, 5)).mean == pytest.approx(1)
    by_class = certain[certain.argmax(1).argsort()]
    assert inception_score(by_class, splits=7, seed=None).mean == pytest.approx(1)
    assert inception_score(by_class, splits=2).mean > 5
    with pytest.raises(ValueError, match="one class only"):
        inception_score(torch.zeros(8, 1))
    with pytest.raises(ValueError, match="cannot be split into 9"):
        inception_score(torch.zeros(8, 3), splits=9)


def test_nearest_finds_copies_at_distance_zero() -> None:
    references = features(40, 30, 0) + 1e3
    index, distance = nearest(references[7:10], references, k=2)
    assert index[:, 0].tolist() == [7, 8, 9]
    assert distance[:, 0].tolist() == [0, 0, 0]
    exact = np.linalg.norm(references[7] - references[int(index[0, 1])])
    assert float(distance[0, 1]) == pytest.approx(exact, rel=1e-6)
    with pytest.raises(ValueError, match="k is 41"):
        nearest(references, references, k=41)
