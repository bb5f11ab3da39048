"""Naming what a restorer is trained on in a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from nextscale.datasets.degradations import Mixture, parse_steps
from nextscale.datasets.pairs import find_pairs
from nextscale.datasets.restoration import RestorationDataset, RestorationSource, open_restoration


@dataclass(frozen=True)
class RestorationData:
    """What a restorer is trained on.

    Attributes:
        sources: data sets as :func:`nextscale.datasets.pairs.find_pairs` names them, pairs or clean images. Of several,
            each is drawn from equally often, however large it is.
        validation: held-out data, named alike.
        degradations: of clean images: by name, steps such as ``noise:sigma=0..50+jpeg:quality=10..90``; one of them is
            drawn for every crop. None: clean images stay as they are, as in VarFormer's first stage.
        weights: how often each degradation is drawn, by name; all alike unless given.
        size: side of the crops, in pixels.
        region: photographs are degraded in squares of up to this side, of which the crops are cut; None: ``size``.
        shrunk: share of the samples that are such a square made small, as photographs are looked at as a whole.
        flip, rotate: mirror, and turn by quarters, at random, before anything is degraded.
        crops: per epoch; None: as many as there are images.
    """

    sources: list[str]
    validation: list[str] = field(default_factory=list)
    degradations: dict[str, str] = field(default_factory=dict)
    weights: dict[str, float] | None = None
    size: int = 256
    region: int | None = None
    shrunk: float = 0.0
    flip: bool = False
    rotate: bool = False
    crops: int | None = None

    def open_training(self, seed: int) -> RestorationDataset:
        """Random crops, other ones in every epoch."""
        return open_restoration(
            [self._source(name) for name in self.sources],
            size=self.size,
            flip=self.flip,
            rotate=self.rotate,
            seed=seed,
            length=self.crops,
            region=self.region,
            shrunk=self.shrunk,
        )

    def open_validation(self) -> RestorationDataset | None:
        """Central crops of the held-out images, always degraded alike."""
        if not self.validation:
            return None
        return open_restoration([self._source(name) for name in self.validation], size=self.size, crop=False)

    def _source(self, name: str) -> RestorationSource:
        if not find_pairs(name).clean_only:
            return RestorationSource(name)
        named = self.degradations or {"none": ""}
        steps = {kind: parse_steps(text) if text else () for kind, text in named.items()}
        return RestorationSource(name, Mixture(steps, self.weights if self.degradations else None))
