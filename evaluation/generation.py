"""Figures of a class-conditional image generator, measured in the features of one classifier.

Three sets are held against the real images: what was generated; what the tokenizer makes of real images,
which is the best its generator can reach; and the real images themselves, half against half, which is the
best there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nextscale.evaluation.classifier import Classifier
from nextscale.evaluation.distances import frechet_distance, inception_score, precision_recall
from nextscale.evaluation.generation_report import GenerationReport, Measurement, SetFigures
from nextscale.evaluation.neighbours import NearestImages, Neighbours, nearest_neighbours

__all__ = [
    "FeatureSet",
    "GenerationReport",
    "Measurement",
    "NearestImages",
    "Neighbours",
    "SetFigures",
    "compare_feature_sets",
    "evaluate_class_conditional",
    "evaluate_generator",
    "nearest_neighbours",
]

Images = Tensor | tuple[Tensor, Tensor]
"""A batch: images (B, 3, H, W) in [0, 1], or those with their labels (B,)."""


class FeatureSet:
    """Features, logits and (where every batch has them) labels of a set of images, gathered batch by batch.

    The images are not kept: 50,000 images of 256 features take 53 MB.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.count = 0
        self._batches: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def add(self, batch: Images) -> None:
        """Take in images (B, 3, H, W) in [0, 1], or (images, labels (B,))."""
        images, labels = (batch, None) if isinstance(batch, Tensor) else batch
        features, logits = self.classifier(images)
        if labels is not None:
            labels = torch.as_tensor(labels).cpu().long()
            if labels.shape != (len(images),):
                raise ValueError(
                    f"{len(images)} images came with labels of shape {tuple(labels.shape)}; expected one each"
                )
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
                raise ValueError(
                    f"labels go from {int(labels.min())} to {int(labels.max())}; this classifier knows 0 to "
                    f"{logits.shape[1] - 1}"
                )
        self._batches.append((features.cpu(), logits.cpu(), labels))
        self.count += len(images)

    @property
    def features(self) -> Tensor:
        """(N, D) float32."""
        return torch.cat([features for features, _, _ in self._batches])

    @property
    def logits(self) -> Tensor:
        """(N, classes) float32."""
        return torch.cat([logits for _, logits, _ in self._batches])

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64, or None where a batch had none."""
        labels = [labels for _, _, labels in self._batches if labels is not None]
        return torch.cat(labels) if self._batches and len(labels) == len(self._batches) else None


def _classified(images: FeatureSet) -> tuple[Measurement | None, dict[int, Measurement]]:
    labels = images.labels
    if labels is None:
        return None, {}
    right = images.logits.argmax(dim=1) == labels
    per_class = {}
    for label in labels.unique().tolist():
        members = right[labels == label]
        per_class[label] = Measurement(float(members.double().mean()), len(members))
    return Measurement(float(right.double().mean()), len(right)), per_class


def _figures(
    classified: tuple[Measurement | None, dict[int, Measurement]],
    features: Tensor,
    logits: Tensor,
    reference: Tensor,
    k: int,
    generator: torch.Generator,
) -> SetFigures:
    # The paper takes equally many of both sets; with unequal ones each figure leans towards the larger
    # manifold.
    count = min(len(features), len(reference))
    real_part = reference[torch.randperm(len(reference), generator=generator)[:count]]
    part = features[torch.randperm(len(features), generator=generator)[:count]]
    precision, recall = precision_recall(real_part, part, k)
    return SetFigures(
        classified=classified[0],
        per_class=classified[1],
        frechet=Measurement(frechet_distance(features, reference), len(features), len(reference)),
        precision=Measurement(precision, count, count),
        recall=Measurement(recall, count, count),
        inception_score=Measurement(inception_score(logits).mean, len(logits)),
    )


def _split_distance(features: Tensor, count: int, generator: torch.Generator) -> Measurement:
    """Fréchet distance of a random part of `count` samples to the rest, the mean of five draws.

    One draw is not enough: with 5,000 against 5,000 images single ones differ by a factor of two.
    """
    distances = []
    for _ in range(5):
        order = torch.randperm(len(features), generator=generator)
        distances.append(frechet_distance(features[order[:count]], features[order[count:]]))
    return Measurement(sum(distances) / len(distances), count, len(features) - count)


def compare_feature_sets(
    generated: FeatureSet,
    real: FeatureSet,
    reconstructions: FeatureSet | None = None,
    *,
    k: int = 3,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> GenerationReport:
    """The report of sets gathered before. k: neighbours of precision and recall; `seed` draws halves and
    subsets.

    Raises ValueError where a set has too few images: more than k, and of real ones at least 2 (k + 1).
    """
    sets = [("generated", generated, k + 1), ("real", real, 2 * (k + 1))]
    if reconstructions is not None:
        sets.append(("reconstructed", reconstructions, k + 1))
    notes = []
    for name, images, least in sets:
        if images.count < max(least, 2):
            raise ValueError(f"{images.count} {name} images were given; the figures with k = {k} take at least {least}")
    dimensions = real.features.shape[1]
    for name, images, _ in sets:
        if images.count <= dimensions:
            notes.append(
                f"{images.count:,} {name} images span fewer than the {dimensions} feature dimensions: "
                "their Fréchet distance is biased upwards"
            )
    generator = torch.Generator().manual_seed(seed)
    features, logits = real.features, real.logits
    order = torch.randperm(len(features), generator=generator)
    half, rest = order[: len(order) // 2], order[len(order) // 2 :]
    halves = _figures(_classified(real), features[half], logits[half], features[rest], k, generator)
    halves = replace(halves, frechet=_split_distance(features, len(half), generator))
    same_count = None
    if generated.count <= len(features) // 2:
        same_count = _split_distance(features, generated.count, generator)

    def figures(images: FeatureSet) -> SetFigures:
        return _figures(_classified(images), images.features, images.logits, features, k, generator)

    if class_names is not None and len(class_names) < logits.shape[1]:
        raise ValueError(f"{len(class_names)} class names were given; the classifier knows {logits.shape[1]} classes")
    return GenerationReport(
        generated=figures(generated),
        reconstructions=None if reconstructions is None else figures(reconstructions),
        real=halves,
        frechet_real_same_count=same_count,
        neighbours=k,
        class_names=None if class_names is None else tuple(class_names),
        notes=tuple(notes),
    )


def evaluate_class_conditional(
    generated: Iterable[tuple[Tensor, Tensor]],
    real: Iterable[Images],
    classifier: Classifier,
    reconstructions: Iterable[Images] | None = None,
    *,
    k: int = 3,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> GenerationReport:
    """Measure generated images against real ones in the features of `classifier`.

    generated: batches of (images (B, 3, H, W) in [0, 1], the labels (B,) asked for). real: batches of images,
    or of (images, labels), which also give the classifier's accuracy on real images: the ceiling of the share
    classified as asked. reconstructions: the tokenizer's, of real images. Each is read once, batch by batch.
    """
    sets = []
    for batches in (generated, real, reconstructions):
        images = FeatureSet(classifier)
        for batch in batches if batches is not None else ():
            images.add(batch)
        sets.append(images)
    return compare_feature_sets(
        sets[0],
        sets[1],
        None if reconstructions is None else sets[2],
        k=k,
        seed=seed,
        class_names=class_names,
    )


def _requests(classes: Sequence[int], per_class: int, batch_size: int, seed: int) -> Iterator[tuple[Tensor, list[int]]]:
    """Labels and seeds, batch by batch; classes alternate, so that a part of the run is balanced as well."""
    total = len(classes) * per_class
    for start in range(0, total, batch_size):
        numbers = range(start, min(start + batch_size, total))
        yield torch.tensor([classes[n % len(classes)] for n in numbers]), [seed + n for n in numbers]


def evaluate_generator(
    generate: Callable[[Tensor, list[int]], Tensor],
    real: Iterable[Images],
    classifier: Classifier,
    *,
    classes: int | Sequence[int],
    per_class: int,
    batch_size: int = 64,
    seed: int = 0,
    reconstruct: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
    k: int = 3,
    class_names: Sequence[str] | None = None,
) -> GenerationReport:
    """Generate `per_class` images of each class and measure them as `evaluate_class_conditional` does,
    streaming.

    generate: (labels (B,) int64, B seeds) -> images (B, 3, H, W) in [0, 1]. Image n of the run has seed `seed
    + n`. classes: their number, or the labels to ask for. reconstruct: images in [0, 1] -> the tokenizer's
    reconstructions in [0, 1], applied to every real batch. progress is called after each batch with
    "generated" or "real", how many images are done, and the total (None for real ones, whose number is not
    known before).
    """
    labels = list(range(classes)) if isinstance(classes, int) else list(classes)
    if not labels or per_class < 1 or batch_size < 1:
        raise ValueError(
            f"{len(labels)} classes, {per_class} images per class, batches of {batch_size}; expected 1 or more of each"
        )
    generated, real_set, reconstructions = (FeatureSet(classifier) for _ in range(3))
    for asked, seeds in _requests(labels, per_class, batch_size, seed):
        generated.add((generate(asked, seeds), asked))
        if progress is not None:
            progress("generated", generated.count, len(labels) * per_class)
    for batch in real:
        real_set.add(batch)
        if reconstruct is not None:
            images = reconstruct(batch if isinstance(batch, Tensor) else batch[0])
            reconstructions.add(images if isinstance(batch, Tensor) else (images, batch[1]))
        if progress is not None:
            progress("real", real_set.count, None)
    return compare_feature_sets(
        generated,
        real_set,
        None if reconstruct is None else reconstructions,
        k=k,
        seed=seed,
        class_names=class_names,
    )
