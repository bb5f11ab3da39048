"""Figures of a generator whose quality is known, and the nearest training images."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from nextscale.evaluation.classifier import load_classifier
from nextscale.evaluation.distances import frechet_distance
from nextscale.evaluation.generation import (
    GenerationReport,
    evaluate_class_conditional,
    evaluate_generator,
    nearest_neighbours,
)

Labelled = tuple[Tensor, Tensor]


def batches(images: Tensor, labels: Tensor | None = None, size: int = 50) -> Iterator[Any]:
    for i in range(0, len(images), size):
        yield images[i : i + size] if labels is None else (images[i : i + size], labels[i : i + size])


def test_shares_and_distances_are_those_of_the_whole_sets(
    network_file: Path, coloured: Callable[..., Tensor], real: Labelled
) -> None:
    real_images, real_labels = real
    classifier = load_classifier(network_file)
    asked = torch.arange(60) % 3
    drawn = asked.clone()
    drawn[asked == 1] = 2  # Asked for 1, this generator always gives 2.
    images = coloured(drawn, seed=1)
    report = evaluate_class_conditional(
        batches(images, asked),
        batches(real_images, real_labels),
        classifier,
        batches(real_images * 0.8, real_labels),
    )
    assert report.generated.classified is not None
    assert report.generated.classified.value == pytest.approx(2 / 3)
    assert report.generated.classified.samples == 60
    assert {label: m.value for label, m in report.generated.per_class.items()} == {0: 1, 1: 0, 2: 1}
    assert report.generated.per_class[1].samples == 20
    expected = frechet_distance(classifier(images)[0], classifier(real_images)[0])
    assert report.generated.frechet.value == pytest.approx(expected, rel=1e-6)
    assert (report.generated.frechet.samples, report.generated.frechet.reference) == (60, 240)
    assert report.reconstructions is not None
    paired = frechet_distance(classifier(real_images * 0.8)[0], classifier(real_images)[0])
    assert report.reconstructions.frechet.value == pytest.approx(paired, rel=1e-6)
    assert report.frechet_ratio == pytest.approx(expected / paired, rel=1e-6)
    assert report.real.classified is not None
    assert (report.real.classified.value, report.real.classified.samples) == (1, 240)
    assert (report.real.frechet.samples, report.real.frechet.reference) == (120, 120)
    assert (report.generated.precision.samples, report.generated.precision.reference) == (60, 60)
    # A missing class is far; half the real images lie close to the other half, and cover it.
    assert report.real.frechet.value < report.generated.frechet.value / 10
    assert report.real.recall.value > 0.7 > report.generated.recall.value
    assert report.frechet_real_same_count is not None
    assert report.frechet_real_same_count.samples == 60


def test_reports_say_what_they_hold(network_file: Path, coloured: Callable[..., Tensor], real: Labelled) -> None:
    real_images, _ = real
    classifier = load_classifier(network_file)
    names = ["red", "green", "blue"]
    few = torch.arange(6) % 3
    report = evaluate_class_conditional([(coloured(few, 1), few)], batches(real_images), classifier, class_names=names)
    assert report.reconstructions is None
    assert report.real.classified is None
    assert len(report.notes) == 1
    assert report.notes[0].startswith("6 generated images span fewer than the 6 feature dimensions")
    data = json.loads(report.to_json())
    assert data["generated"]["frechet"]["samples"] == 6
    assert data["generated"]["per_class"]["2"]["value"] == 1
    assert data["frechet_ratio"] is None
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    for part in (
        "Classified as asked",
        "Fréchet distance",
        "green",
        "100.0% (2)",
        "Real images",
        "120 / 120",
    ):
        assert part in text


def test_a_generator_is_asked_for_every_class_with_a_seed_per_image(
    network_file: Path, coloured: Callable[..., Tensor], real: Labelled
) -> None:
    real_images, real_labels = real
    classifier = load_classifier(network_file)
    asked: list[tuple[int, int]] = []
    calls: list[tuple[str, int, int | None]] = []

    def generate(labels: Tensor, seeds: list[int]) -> Tensor:
        asked.extend(zip(labels.tolist(), seeds, strict=True))
        return torch.cat([coloured(labels[i : i + 1], seed) for i, seed in enumerate(seeds)])

    def run(batch_size: int) -> GenerationReport:
        return evaluate_generator(
            generate,
            batches(real_images, real_labels),
            classifier,
            classes=3,
            per_class=7,
            batch_size=batch_size,
            seed=100,
            reconstruct=lambda images: images * 0.9,
            progress=lambda *call: calls.append(call),
        )

    report = run(8)
    assert sorted(asked) == sorted((n % 3, 100 + n) for n in range(21))
    assert calls[:3] == [("generated", 8, 21), ("generated", 16, 21), ("generated", 21, 21)]
    assert calls[-1] == ("real", 240, None)
    assert report.generated.classified is not None
    assert report.generated.classified.value == 1
    assert report.reconstructions is not None
    assert report.reconstructions.frechet.samples == 240
    other = run(21)
    assert other.generated.frechet.value == pytest.approx(report.generated.frechet.value, rel=1e-6)


def test_what_cannot_be_measured_is_refused(
    network_file: Path, coloured: Callable[..., Tensor], real: Labelled
) -> None:
    real_images, real_labels = real
    classifier = load_classifier(network_file)
    images = coloured(real_labels[:9], 1)
    with pytest.raises(ValueError, match="labels go from 0 to 3; this classifier knows 0 to 2"):
        evaluate_class_conditional([(images, torch.arange(9) % 4)], [real_images], classifier)
    with pytest.raises(ValueError, match="9 images came with labels of shape"):
        evaluate_class_conditional([(images, real_labels[:8])], [real_images], classifier)
    with pytest.raises(ValueError, match="0 real images were given"):
        evaluate_class_conditional([(images, real_labels[:9])], [], classifier)
    with pytest.raises(ValueError, match="3 generated images were given; the figures with k = 3 take at least 4"):
        evaluate_class_conditional([(images[:3], real_labels[:3])], [real_images], classifier)
    with pytest.raises(ValueError, match="2 class names"):
        evaluate_class_conditional([(images, real_labels[:9])], [real_images], classifier, class_names=["a", "b"])
    with pytest.raises(ValueError, match="0 images per class"):
        evaluate_generator(lambda labels, seeds: images, [real_images], classifier, classes=3, per_class=0)


def test_copies_of_training_images_are_found_in_any_batch(
    network_file: Path, coloured: Callable[..., Tensor], real: Labelled
) -> None:
    real_images, real_labels = real
    classifier = load_classifier(network_file)
    samples = torch.cat([real_images[[17, 203]], (real_images[[90]] * 0.97 + 0.01)])
    for size in (240, 33):
        found = nearest_neighbours(samples, batches(real_images, real_labels, size), classifier, k=3)
        assert found.pixels.index[:, 0].tolist() == [17, 203, 90]
        assert found.features.index[:2, 0].tolist() == [17, 203]
        assert found.pixels.distance[:2, 0].tolist() == [0, 0]
        torch.testing.assert_close(found.pixels.images[:2, 0], samples[:2])
        rms = float((samples[2] - real_images[90]).square().mean().sqrt())
        assert float(found.pixels.distance[2, 0]) == pytest.approx(rms, rel=1e-5)
        assert (found.pixels.distance.diff(dim=1) >= 0).all()
        every = torch.cdist(samples.flatten(1).double(), real_images.flatten(1).double())
        assert found.pixels.index.tolist() == every.topk(3, largest=False).indices.tolist()
    with pytest.raises(ValueError, match="2 training images were given; 3 nearest"):
        nearest_neighbours(samples, [real_images[:2]], classifier, k=3)
    with pytest.raises(ValueError, match="expected one size"):
        nearest_neighbours(samples, [coloured(real_labels, 0, side=10)], classifier)
