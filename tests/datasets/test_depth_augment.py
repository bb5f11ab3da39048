"""Random changes of a photograph that leave its depth, mask and camera right."""

import math

import pytest
import torch

from nextscale.datasets.depth_augment import DRAWS, Augmentation, DepthBatch, augment


def ramp(seed: int = 0, count: int = 3) -> DepthBatch:
    torch.manual_seed(seed)
    image = torch.rand(count, 3, 20, 30)
    depth = torch.rand(count, 1, 20, 30) + 1
    valid = torch.rand(count, 1, 20, 30) > 0.2
    camera = torch.tensor([[25.0, 0, 14], [0, 25, 9], [0, 0, 1]]).repeat(count, 1, 1)
    return DepthBatch(image, torch.where(valid, depth, 0), valid, camera)


def test_mirroring_moves_everything() -> None:
    before = ramp()
    drawn = torch.full((3, DRAWS - 3), 0.5, dtype=torch.float64)
    drawn[0, 0] = 0.1
    after = augment(ramp(), Augmentation(flip=0.4), drawn)
    assert torch.equal(after.image[0], before.image[0].flip(-1)) and torch.equal(after.image[1], before.image[1])
    assert torch.equal(after.depth[0], before.depth[0].flip(-1)) and torch.equal(
        after.valid[0], before.valid[0].flip(-1)
    )
    assert after.intrinsics[:, 0, 2].tolist() == [15, 14, 14]


def test_rolling_turns_about_the_principal_point() -> None:
    drawn = torch.full((3, DRAWS - 3), 0.5, dtype=torch.float64)
    same = augment(ramp(), Augmentation(flip=0, rotation=20), drawn)
    assert torch.allclose(same.image, ramp().image, atol=1e-5) and torch.equal(same.valid, ramp().valid)
    drawn[:, 1] = 1
    turned = augment(ramp(), Augmentation(flip=0, rotation=20), drawn)
    before = ramp()
    assert torch.equal(turned.intrinsics, before.intrinsics)
    # A pixel at the principal point stays; depths are those of pixels, none made up; what is outside is unknown.
    assert torch.equal(turned.depth[:, :, 9, 14], before.depth[:, :, 9, 14])
    known = turned.depth[turned.valid]
    assert torch.isin(known, before.depth).all() and not turned.valid[:, :, 0, 0].any()
    # Column 24 on the axis of the principal point goes to (cos 20, sin 20) x 10 pixels.
    c, s = math.cos(math.radians(20)), math.sin(math.radians(20))
    row, column = round(9 - 10 * s), round(14 + 10 * c)
    assert torch.equal(turned.valid[:, 0, row, column], before.valid[:, 0, 9, 24]) or known.numel()


def test_colours_change_the_image_alone() -> None:
    drawn = torch.rand(3, DRAWS - 3, dtype=torch.float64)
    setting = Augmentation(flip=0, brightness=0.3, contrast=0.3, saturation=0.3, gamma=0.3, hue=0.1)
    before, after = ramp(), augment(ramp(), setting, drawn)
    assert not torch.allclose(before.image, after.image, atol=0.01) and 0 <= after.image.min() <= after.image.max() <= 1
    assert torch.equal(before.depth, after.depth) and torch.equal(before.intrinsics, after.intrinsics)
    with pytest.raises(ValueError, match="zoom of 1 or more"):
        Augmentation(zoom=0.5)


def test_parts_above_and_below_change_places() -> None:
    drawn = torch.full((3, DRAWS - 3), 0.5, dtype=torch.float64)
    drawn[1, 7], drawn[:, 8] = 0.1, torch.tensor([0.0, 0.5, 1.0])
    before, after = ramp(), augment(ramp(), Augmentation(flip=0, cut_flip=0.4), drawn)
    assert torch.equal(after.image[0], before.image[0]) and torch.equal(after.depth[2], before.depth[2])
    for name in ("image", "depth", "valid"):  # half of the height is swapped
        assert torch.equal(getattr(after, name)[1], getattr(before, name)[1].roll(10, dims=-2))
    assert after.intrinsics[1].isnan().all() and torch.equal(after.intrinsics[::2], before.intrinsics[::2])


def test_a_strip_shows_the_depth() -> None:
    drawn = torch.full((3, DRAWS - 3), 0.5, dtype=torch.float64)
    drawn[1:, 9], drawn[:, 10], drawn[:, 11] = 0.1, 0.5, torch.tensor([0.5, 0.8, 0.0])
    before, after = ramp(), augment(ramp(), Augmentation(flip=0, cut_depth=0.4), drawn)
    changed = (after.image != before.image).any(1).any(1)
    assert [row.nonzero()[:, 0].tolist() for row in changed] == [[], list(range(15, 24)), [15]]
    shown = before.depth[1, :, :, 15:24] / before.depth[1].max()
    assert torch.equal(after.image[1, :, :, 15:24], shown.expand(3, -1, -1))
    assert torch.equal(after.depth, before.depth) and torch.equal(after.valid, before.valid)
    blank = ramp()
    blank.valid[:] = False
    assert augment(blank, Augmentation(flip=0, cut_depth=0.4), drawn).image[1, :, :, 15:24].eq(0).all()
    with pytest.raises(ValueError, match="cut_depth and cut_flip in"):
        Augmentation(cut_depth=2)
