"""Tiles are put together without a seam, in bounded memory, and go on where they were stopped."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nextscale.datasets.restoration import squeezed
from nextscale.tasks.restoration.tiling import TileStore, follow_overview, reflected, restore_tiled, starts


def same(tiles: Tensor) -> Tensor:
    return tiles


@given(
    height=st.integers(1, 50),
    width=st.integers(1, 50),
    tile=st.integers(1, 20),
    share=st.floats(0, 1),
    batch=st.integers(1, 7),
)
def test_identity_and_flat_pictures_are_exact(height: int, width: int, tile: int, share: float, batch: int) -> None:
    overlap = int(share * (tile // 2))
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(height * 64 + width))
    sizes = []

    def restore(tiles: Tensor) -> Tensor:
        sizes.append(tuple(tiles.shape))
        return tiles.clone()

    result = restore_tiled(restore, image, tile=tile, overlap=overlap, batch=batch)
    torch.testing.assert_close(result, image, rtol=0, atol=1e-6)
    assert all(shape[1:] == (3, tile, tile) and shape[0] <= batch for shape in sizes)
    grey = restore_tiled(lambda t: t * 0.7, torch.full_like(image, 0.5), tile=tile, overlap=overlap, batch=batch)
    assert torch.unique(grey).numel() == 1


@given(length=st.integers(1, 3000), tile=st.integers(1, 300), share=st.floats(0, 1))
def test_tiles_cover_a_side(length: int, tile: int, share: float) -> None:
    overlap, length = int(share * (tile // 2)), max(length, tile)
    found = starts(length, tile, overlap)
    assert found[0] == 0 and found[-1] + tile == length
    assert all(a < b <= a + tile - overlap for a, b in pairwise(found))


def test_the_batch_does_not_matter_and_seams_are_smooth() -> None:
    image = torch.rand(3, 40, 70)

    def darken(tiles: Tensor) -> Tensor:
        return tiles - tiles.mean((1, 2, 3), keepdim=True)

    results = [restore_tiled(darken, image, tile=16, overlap=8, batch=batch) for batch in (1, 3, 64)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])

    # Tiles that disagree by 1 meet in a ramp, not in a step.
    numbers = iter(range(100))
    result = restore_tiled(
        lambda tiles: torch.full_like(tiles, next(numbers)), torch.zeros(1, 32, 56), tile=32, overlap=8, batch=1
    )
    steps = result[0, 0].diff()
    assert result[0, 0, 0] == 0 and result[0, 0, -1] == 1 and (steps >= 0).all() and steps.max() < 0.25


def test_reflection() -> None:
    row = torch.tensor([[[1.0, 2.0, 3.0]]])
    assert reflected(row, 1, 8).tolist() == [[[1, 2, 3, 2, 1, 2, 3, 2]]]
    assert reflected(row[..., :1], 2, 3).tolist() == [[[1, 1, 1], [1, 1, 1]]]


def test_tones_follow_a_view_of_the_whole_where_tiles_disagree() -> None:
    """Tones that tiles have guessed, each otherwise, come from a small view; details stay; who agrees is believed."""
    generator = torch.Generator().manual_seed(0)
    texture = 0.1 * torch.rand(3, 96, 160, generator=generator)
    true = texture + torch.linspace(0, 0.8, 160).expand(3, 96, 160)
    small = squeezed(true, 32)
    assert small.shape == (3, 32, 32) and abs(float(small.mean() - true.mean())) < 1e-3

    def guessed(tiles: Tensor) -> Tensor:
        """Every tile is too bright or too dark, by what it holds."""
        return tiles + 0.2 * torch.sin(1e4 * tiles.mean((1, 2, 3), keepdim=True))

    apart: list[Tensor] = []
    found = restore_tiled(guessed, true, tile=32, overlap=8, batch=3, apart=apart)
    before = (found - true).abs().mean()
    followed = follow_overview(found.clone(), small, torch.cat(apart))
    assert (followed - true).abs().mean() < before / 2
    # The same picture in tiles that had agreed stays as it is; so does one that is right already.
    agreeing = [torch.zeros_like(each) for each in apart]
    assert torch.equal(follow_overview(found.clone(), small, torch.cat(agreeing)), found)
    assert torch.equal(follow_overview(found.clone(), small, torch.zeros(0)), found)
    torch.testing.assert_close(follow_overview(true.clone(), small, torch.ones(1)), true, atol=0.03, rtol=0)


def test_a_stopped_call_goes_on(tmp_path: Path) -> None:
    image, calls = torch.rand(3, 50, 30), []

    class Stop(Exception):
        pass

    def restore(tiles: Tensor) -> Tensor:
        calls.append(len(tiles))
        return tiles * 0.5

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise Stop

    def run(owner: str = "model", progress=None) -> Tensor:
        store = TileStore(tmp_path / "rows", owner)
        return restore_tiled(restore, image, tile=16, overlap=4, batch=2, progress=progress, store=store)

    whole = restore_tiled(same, image * 0.5, tile=16, overlap=4, batch=2)
    with pytest.raises(Stop):
        run(progress=stop)
    first = sum(calls)
    seen: list[tuple[int, int]] = []
    result = run(progress=lambda done, total: seen.append((done, total)))
    torch.testing.assert_close(result, whole)
    assert seen[-1][0] == seen[-1][1] == len(starts(50, 16, 4)) * len(starts(30, 16, 4))
    assert sum(calls) < first + seen[-1][1]
    # Rows of another model are not taken.
    before = sum(calls)
    run("another model")
    assert sum(calls) - before == seen[-1][1]
    TileStore(tmp_path / "rows", "model").clear()
    assert not (tmp_path / "rows").exists()


def test_mistakes_are_named() -> None:
    image = torch.rand(3, 20, 20)
    with pytest.raises(ValueError, match="overlap is 9; expected 0 to 8"):
        restore_tiled(same, image, tile=16, overlap=9, batch=1)
    with pytest.raises(ValueError, match="tile is 0"):
        restore_tiled(same, image, tile=0, overlap=0, batch=1)
    with pytest.raises(ValueError, match=r"expected floats \(channels"):
        restore_tiled(same, image[None], tile=16, overlap=0, batch=1)
    with pytest.raises(ValueError, match="expected the same shape"):
        restore_tiled(lambda tiles: tiles[:, :, ::2], image, tile=16, overlap=0, batch=1)
