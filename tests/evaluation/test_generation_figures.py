"""Figures, statistics files and networks against independent computations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

from nextscale.evaluation.feature_statistics import (
    FeatureStatistics,
    holds_statistics,
    read_statistics,
    statistics_of,
    with_features,
)
from nextscale.evaluation.generation_figures import GenerationFigures, compare
from nextscale.evaluation.networks import Network, Responses, open_network
from nextscale.evaluation.npz_images import NpzImages, write_images


def responses(images: torch.Tensor) -> Responses:
    """Four colour means, quadrants of the red channel, logits."""
    means = images.mean((2, 3))
    features = torch.cat([means, images.std((2, 3))], 1)
    spatial = torch.nn.functional.adaptive_avg_pool2d(images[:, 0], 2).flatten(1)
    return Responses(features, spatial, 10 * means)


def network(inception: bool = False, identity: str = "tiny") -> Network:
    return Network(responses, identity, inception=inception)


def pictures(count: int, seed: int, bright: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    base = rng.uniform(0, 160, (count, 1, 1, 3)) + rng.uniform(0, 60 + bright, (count, 12, 10, 3))
    return base.clip(0, 255).astype(np.uint8)


def as_images(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255)


def statistics(count: int, seed: int, bright: float = 0.0) -> FeatureStatistics:
    return statistics_of(as_images(pictures(count, seed, bright)).split(32), network())


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root))


def test_every_figure_equals_an_independent_computation() -> None:
    made, real = statistics(90, 0, 40), statistics(110, 1)
    figures = compare(made, real)
    images = [as_images(pictures(90, 0, 40)), as_images(pictures(110, 1))]
    a, b = (responses(each).features.double().numpy() for each in images)
    assert figures.fid == pytest.approx(frechet(a, b), rel=1e-6)
    quadrants = [responses(each).spatial.double().numpy() for each in images]  # type: ignore[union-attr]
    assert figures.sfid == pytest.approx(frechet(*quadrants), rel=1e-5)

    # All samples fit into one subset: KID's deviation is 0 where both sets have its size.
    share = responses(images[0]).logits.double().softmax(1).numpy()  # type: ignore[union-attr]
    divergence = (share * np.log(share / share.mean(0))).sum(1).mean()
    assert figures.inception_score is not None
    assert figures.inception_score.mean == pytest.approx(np.exp(divergence), rel=1e-5)

    def radii(x: np.ndarray) -> np.ndarray:
        return np.sort(np.linalg.norm(x[:, None] - x[None], axis=-1), axis=1)[:, 3]

    between = np.linalg.norm(a[:, None] - b[None], axis=-1)
    assert figures.precision == pytest.approx((between <= radii(b)).any(1).mean())
    assert figures.recall == pytest.approx((radii(a) >= between.T).any(1).mean())
    assert any("90 against 110" in note for note in figures.notes)


def test_kid_of_whole_sets_is_the_two_line_formula() -> None:
    made, real = statistics(80, 0, 40), statistics(80, 1)
    assert made.features is not None and real.features is not None
    a, b = made.features.double().numpy(), real.features.double().numpy()
    kernel = [(x @ y.T / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b))]
    expected = sum((k.sum() - np.trace(k)) / (80 * 79) for k in kernel[:2]) - 2 * kernel[2].mean()
    score = compare(made, real).kid
    assert score is not None
    assert score.mean == pytest.approx(expected, rel=1e-6)
    assert score.std == pytest.approx(0, abs=1e-9)


def test_constant_and_small_sets_are_told() -> None:
    flat = statistics_of([torch.full((8, 3, 12, 10), 0.5)], network())
    figures = compare(flat, statistics(60, 1))
    assert np.isfinite(figures.fid)
    assert figures.inception_score is not None
    assert figures.inception_score.mean == pytest.approx(1)
    assert "all generated images look the same to the network" in figures.notes
    few = compare(statistics(3, 0), statistics(60, 1))
    assert few.precision is None
    assert any("fewer than the 6 dimensions" in note for note in few.notes)
    with pytest.raises(ValueError, match="at least 2"):
        compare(statistics(1, 0), statistics(60, 1))


def test_figures_survive_json() -> None:
    figures = compare(statistics(40, 0), statistics(50, 1))
    assert GenerationFigures.from_json(figures.to_json()) == figures


def test_statistics_round_trip_and_belong_to_one_network(tmp_path: Path) -> None:
    made = statistics(40, 0)
    path = made.save(tmp_path / "kept.npz")
    assert holds_statistics(path)
    again = read_statistics(path, network())
    assert again.count == 40
    assert compare(again, statistics(50, 1)).fid == compare(made, statistics(50, 1)).fid
    with pytest.raises(ValueError, match="made with tiny, here is other"):
        read_statistics(path, network(identity="other"))


def test_the_fields_reference_batches_are_read(tmp_path: Path) -> None:
    pixels, rng = pictures(50, 3), np.random.default_rng(0)
    whole = statistics(200, 1)
    assert whole.spatial is not None
    arrays: dict[str, Any] = {"mu": whole.moments.mean, "sigma": whole.moments.covariance, "arr_0": pixels}
    arrays |= {"mu_s": whole.spatial.mean, "sigma_s": whole.spatial.covariance}
    np.savez(tmp_path / "VIRTUAL.npz", **arrays, arr_1=rng.integers(0, 9, 50))
    inception = network(inception=True)
    read = read_statistics(tmp_path / "VIRTUAL.npz", inception)
    assert read.moments.count is None
    full = with_features(read, tmp_path / "VIRTUAL.npz", inception, 16)
    assert full.count == 50
    figures = compare(statistics(60, 2), full)
    assert figures.fid == pytest.approx(compare(statistics(60, 2), whole).fid)
    assert figures.sfid == pytest.approx(compare(statistics(60, 2), whole).sfid)
    assert figures.precision is not None
    with pytest.raises(ValueError, match="names no network"):
        read_statistics(tmp_path / "VIRTUAL.npz", network())


def test_an_npz_that_would_run_code_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", mu=np.array([print], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="cannot be read as statistics"):
        read_statistics(tmp_path / "bad.npz", network(inception=True))


def test_images_in_npz_stream(tmp_path: Path) -> None:
    pixels = pictures(23, 0)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "images.npz", arr_0=pixels)
        source = NpzImages(tmp_path / "images.npz")
        assert source.shape == pixels.shape
        assert torch.equal(torch.cat(list(source.batches(7))), as_images(pixels))
        assert sum(map(len, source.batches(7, limit=10))) == 10
    write_images(tmp_path / "own.npz", np.array_split(pixels, 4), 23)
    with np.load(tmp_path / "own.npz", allow_pickle=False) as file:
        assert np.array_equal(file["arr_0"], pixels)
    with pytest.raises(ValueError, match="23 images came, 24 were announced"):
        write_images(tmp_path / "own.npz", [pixels], 24)
    np.savez(tmp_path / "floats.npz", arr_0=pixels / 255)
    with pytest.raises(ValueError, match="float64"):
        NpzImages(tmp_path / "floats.npz")
    with pytest.raises(ValueError, match="it holds arr_1"):
        np.savez(tmp_path / "floats.npz", arr_1=pixels)
        NpzImages(tmp_path / "floats.npz")


def test_torchscript_networks_give_features_with_or_without_logits(network_file: Path, tmp_path: Path) -> None:
    images = torch.rand(4, 3, 12, 12)
    both = open_network(str(network_file))
    assert both(images).logits is not None
    alone = tmp_path / "alone.pt"
    torch.jit.script(torch.nn.Flatten()).save(str(alone))
    made = open_network(str(alone))
    assert made(images).logits is None
    assert made.identity != both.identity
    with pytest.raises(ValueError, match="inception:"):
        open_network("pt_inception-2015-12-05.pth")


def test_transformers_networks_are_fed_their_own_normalisation(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="mean and deviation"):
        open_network(f"transformers:{tmp_path / 'vit'}")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}'
    )
    made = open_network(f"transformers:{tmp_path / 'vit'}")
    images = torch.rand(3, 3, 16, 16)
    model = ViTModel.from_pretrained(tmp_path / "vit").eval()
    with torch.no_grad():
        expected = model((images - 0.5) / 0.25).pooler_output
    torch.testing.assert_close(made(images).features, expected, rtol=1e-4, atol=1e-5)
    assert made.identity.startswith("transformers:vit:")
