"""The figures a generation paper reports, of two sets of images in one network's features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from nextscale.evaluation.distances import Score, frechet_distance, inception_score, kid, precision_recall
from nextscale.evaluation.feature_statistics import FeatureStatistics

SPLIT = 5000
"""Images of one part of the Inception score, as in ADM's evaluator: 10 parts of 50,000."""


@dataclass(frozen=True)
class GenerationFigures:
    """None where the network or the reference does not give a figure; `notes` say why and what else to know.

    fid, sfid: Fréchet distances of features and of spatial features. inception_score: mean and deviation over parts of
    5,000 images in the order they came. kid: mean and deviation over 100 subsets of 1,000. precision, recall: with 3
    neighbours. clip_score: 0 to 100.
    """

    samples: int
    reference: int | None
    network: str
    fid: float
    sfid: float | None
    inception_score: Score | None
    kid: Score | None
    precision: float | None
    recall: float | None
    clip_score: float | None = None
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """For a JSON file: scores as {mean, std}."""
        content = asdict(self)
        for name in ("inception_score", "kid"):
            score: Score | None = getattr(self, name)
            content[name] = None if score is None else {"mean": score.mean, "std": score.std}
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> GenerationFigures:
        """What :meth:`to_json` gave."""
        scores = {n: None if content[n] is None else Score(**content[n]) for n in ("inception_score", "kid")}
        return cls(**{**content, **scores, "notes": tuple(content["notes"])})

    def rows(self) -> list[tuple[str, str]]:
        """(figure, value) of those that are known."""
        rows = [("FID", f"{self.fid:.4g}")]
        rows += [("sFID", f"{self.sfid:.4g}")] if self.sfid is not None else []
        if self.inception_score is not None:
            rows.append(("Inception score", f"{self.inception_score.mean:.4g} ± {self.inception_score.std:.2g}"))
        if self.kid is not None:
            rows.append(("KID x 1000", f"{1000 * self.kid.mean:.4g} ± {1000 * self.kid.std:.2g}"))
        rows += [(n, f"{v:.4f}") for n, v in (("precision", self.precision), ("recall", self.recall)) if v is not None]
        rows += [("CLIP score", f"{self.clip_score:.4g}")] if self.clip_score is not None else []
        return rows


def compare(
    generated: FeatureStatistics,
    reference: FeatureStatistics,
    *,
    neighbours: int = 3,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> GenerationFigures:
    """The figures of generated images against reference ones.

    Args:
        generated: its features are needed for all but FID and sFID.
        seed: of KID's subsets.
        device: where the distances of features are computed.

    Raises:
        ValueError: the two are of different networks, or a set has fewer than 2 images.
    """
    if generated.network != reference.network:
        raise ValueError(f"one set was seen by {generated.network}, the other by {reference.network}")
    notes: list[str] = []
    for name, each in (("generated", generated), ("reference", reference)):
        dimensions = len(each.moments.mean)
        if each.moments.count is not None and each.moments.count <= dimensions:
            notes.append(
                f"{each.moments.count:,} {name} images span fewer than the {dimensions:,} dimensions of the features: "
                "FID is biased upwards; compare it only at the same number of images"
            )
        if not float(each.moments.covariance.trace()):
            notes.append(f"all {name} images look the same to the network")
    made, real = generated.features, reference.features
    distance = spread = None
    if made is None or real is None:
        notes.append("features of single images are not known: no KID, precision and recall")
    elif min(len(made), len(real)) <= neighbours:
        notes.append(f"precision, recall and KID take more than {neighbours} images of each kind")
    else:
        made, real = made.to(device), real.to(device)
        distance = kid(made, real, seed=seed)
        spread = precision_recall(real, made, neighbours)
        if len(made) != len(real):
            notes.append(f"precision and recall are of {len(made):,} against {len(real):,} images")
    sfid = None
    if generated.spatial is not None and reference.spatial is not None:
        sfid = frechet_distance(generated.spatial, reference.spatial)
    score = None
    if generated.logits is not None:
        parts = -(-len(generated.logits) // SPLIT)
        score = inception_score(generated.logits, splits=parts, seed=None)
    return GenerationFigures(
        samples=generated.count or 0,
        reference=reference.count,
        network=generated.network,
        fid=frechet_distance(generated.moments, reference.moments),
        sfid=sfid,
        inception_score=score,
        kid=distance,
        precision=None if spread is None else spread.precision,
        recall=None if spread is None else spread.recall,
        notes=tuple(notes),
    )
