"""Any data set of photos with depth, for training."""

from __future__ import annotations

from dataclasses import dataclass, field

from nextscale.datasets.depth import DepthDataset, open_depth
from nextscale.datasets.depth_augment import Augmentation


@dataclass(frozen=True)
class DepthSet:
    """Photos with their depth, of which crops of one shape are taken and resized.

    Attributes:
        source: folder of the data set; NYU's .mat file; the YAML file of a folder; the folder of packed pairs.
        dataset: kitti, nyu, hypersim, eth3d, ibims, tum, diode, sunrgbd, scenes (packed pairs) or folder (a YAML file).
        split: as the data set names it.
        depth_root: folder of the depth files where they do not lie with the images.
        list_file: a list of the user's instead of the split's.
        validation, validation_split: held-out pairs of the same data set: another source, another split, or both.
        height, width: pixels of what is trained on.
        augmentation: random changes; of held-out pairs the centre is seen as it is.
    """

    source: str
    dataset: str = "scenes"
    split: str | None = None
    depth_root: str | None = None
    list_file: str | None = None
    validation: str | None = None
    validation_split: str | None = None
    height: int = 480
    width: int = 640
    augmentation: Augmentation = field(default_factory=Augmentation)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.height, self.width

    def open_training(self, seed: int) -> DepthDataset:
        """Random crops, after a look at every file."""
        return open_depth(
            self.dataset,
            self.source,
            self.split,
            size=self.size,
            list_file=self.list_file,
            depth_root=self.depth_root,
            crop="random",
            augmentation=self.augmentation,
            seed=seed,
        )

    def open_validation(self) -> DepthDataset | None:
        """Centre crops of the held-out pairs, without augmentation; None where there are none."""
        if self.validation is None and self.validation_split is None:
            return None
        source, split = self.validation or self.source, self.validation_split or self.split
        return open_depth(self.dataset, source, split, size=self.size, depth_root=self.depth_root)
