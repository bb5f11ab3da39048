"""Windows and the attention within them, against what a dense mask gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation import litevar_attention
from nextscale.tasks.generation.litevar_attention import Work, lite_attention
from nextscale.tasks.generation.litevar_cache import LiteCache, Vectors
from nextscale.tasks.generation.litevar_search import banded_keys, published_widths
from nextscale.tasks.generation.litevar_stand_ins import Effects, elimination_costs, stand_in_weights
from nextscale.tasks.generation.litevar_windows import ALL, NONE, Window, band, in_tiles
from nextscale.tasks.tokenizers.residual_vq import SCHEDULE_256

HEADS, SIZE = 3, 8


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, form: str) -> torch.Tensor:
    """The published formulas, all scores computed; (rows, positions, heads, size)."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 2.0
    if form == "absent":
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    elif form == "logits":
        weights = (scores * mask).softmax(-1)
    else:
        weights = scores.softmax(-1) * mask
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def drawn(rows: int, positions: int) -> torch.Tensor:
    return torch.randn(rows, positions, HEADS, SIZE)


def seen(window: Window) -> torch.Tensor:
    """What the tiles of a window take in, as a (heads, queries, keys) mask."""
    mask = torch.zeros(window.heads * window.tiles, window.visible, dtype=torch.bool)
    for group in window.groups:
        for tile, keys, count in zip(group.tiles, group.keys, group.counts, strict=True):
            mask[tile, keys[:count].long()] = True
    whole = mask.view(window.heads, window.tiles, 1, -1).expand(-1, -1, window.tile, -1).flatten(1, 2)
    return whole[:, : window.queries]


@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (25, 16), (36, 9)])
def test_bands_are_the_published_ones(queries: int, keys: int) -> None:
    x, y = torch.arange(queries)[:, None], torch.arange(keys)
    for width in (1, 2, 5):
        expected = (x.double() * keys / queries - y).abs() < width
        assert torch.equal(band(queries, keys, torch.tensor([width]))[0], expected)
    everything, nothing = band(queries, keys, torch.tensor([ALL, NONE]))
    assert everything.all() and not nothing.any()


def test_published_list_of_banded_keys() -> None:
    counts = [len(banded_keys(SCHEDULE_256, index)) for index in range(10)]
    assert counts == [0, 0, 0, 2, 3, 3, 4, 5, 6, 7]
    widths = published_widths(SCHEDULE_256, 9)
    assert widths[:5] == [16, 20, 24, 28, 32] and widths[-1] == 240


@given(heads=st.integers(1, 3), queries=st.integers(1, 20), visible=st.integers(1, 30), tile=st.integers(1, 8))
def test_tiles_take_in_what_a_mask_keeps(heads: int, queries: int, visible: int, tile: int) -> None:
    mask = torch.rand(heads, queries, visible) < 0.2
    window = Window.from_mask(mask, tile)
    kept = in_tiles(mask, tile).any(2)
    assert torch.equal(seen(window), kept.repeat_interleave(tile, dim=1)[:, :queries])
    again = Window.from_tiles(kept, queries, tile)
    assert again.scores == window.scores >= int(kept.sum()) * tile
    # Filling tiles up to four lengths costs less than filling them up to one.
    assert window.scores <= max(int(kept.sum(2).max()), 1) * kept.shape[0] * kept.shape[1] * tile


@pytest.mark.parametrize("queries", [16, 21])
@pytest.mark.parametrize("form", ["absent", "logits", "probabilities"])
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_windows_equal_a_dense_mask(queries: int, form: str, branches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images, visible = 2, 30
    mask = torch.rand(HEADS, queries, visible) < 0.15
    mask[:, :, 0] = True
    mask[1] = False
    mask[1, :, 3] = True
    window = Window.from_mask(mask, 4, exact=form != "absent")
    expected_mask = mask if form != "absent" else seen(window)
    assert (expected_mask >= mask).all() and 0.05 < expected_mask.float().mean() < 0.8
    q, k, v = drawn(images, queries), drawn(images, visible + 4), drawn(images * branches, visible + 4)
    many = [t.repeat(branches, 1, 1, 1) for t in (q, k[:, :visible])]
    expected = dense(*many, v[:, :visible], expected_mask, form)
    for chunk in (1, 1 << 22):
        monkeypatch.setitem(litevar_attention.CHUNK, "cpu", chunk)
        work = Work()
        with FlopCounterMode(display=False) as counter:
            out = lite_attention(
                q, Vectors.of(k), Vectors.of(v), visible, 2.0, window=window, form=form, work=work  # type: ignore[arg-type]
            )  # fmt: skip
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert counter.get_total_flops() == 2 * work.done
        assert work.full == 2 * images * branches * HEADS * queries * visible * SIZE
    each = images * SIZE * (window.scores if form != "probabilities" else HEADS * queries * visible)
    assert (work.scores, work.values) == (each, each * branches)


def test_keys_that_count_more_and_what_is_added() -> None:
    queries, visible = 10, 30
    kept = torch.rand(HEADS, 3, visible) < 0.3
    kept[..., 0] = True
    bias, offset = torch.randn(HEADS, 3, visible), torch.randn(HEADS, queries, SIZE)
    window = Window.from_tiles(kept, queries, 4, bias, offset)
    assert window.nbytes - Window.from_tiles(kept, queries, 4).nbytes == offset.nbytes + window.scores // 4 * 4
    q, k, v = drawn(2, queries), drawn(2, visible), drawn(2, visible)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 2.0 + bias.repeat_interleave(4, 1)[:, :queries]
    weights = scores.masked_fill(~kept.repeat_interleave(4, 1)[:, :queries], -torch.inf).softmax(-1)
    expected = (torch.einsum("bhqk,bkhd->bhqd", weights, v) + offset).transpose(1, 2)
    out = lite_attention(q, Vectors.of(k), Vectors.of(v), visible, 2.0, window=window.to(torch.device("cpu")))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile", [1, 3])
@pytest.mark.parametrize("branches", [1, 2])
def test_stand_ins_against_the_vectors_themselves(tile: int, branches: int) -> None:
    """G from its definition; then keys that repeat others go first, for nothing, and the others count for them."""
    images, queries, keys = 12, 5, 7
    rows = images * branches
    attention, value = torch.rand(rows, HEADS, queries, keys).softmax(-1), torch.randn(rows, HEADS, keys, SIZE)
    attention[..., 6], value[:, :, 6] = attention[..., 2], value[:, :, 2]
    attention /= attention.sum(-1, keepdim=True)
    output, gradients = attention @ value, torch.randn(HEADS, 40, branches * SIZE)
    information = (gradients.mT @ gradients / 40).unflatten(2, (branches, SIZE)).unflatten(1, (branches, SIZE))
    information = information.transpose(2, 3)
    effects = Effects.none(HEADS, queries, keys, tile, torch.device("cpu"))
    for some in (torch.arange(5), torch.arange(5, images)):
        part = torch.cat([some + b * images for b in range(branches)])
        effects.add(attention[part], value[part], output[part], information, tile)
    vectors = attention[..., None] * (value[:, :, None] - output[:, :, :, None])
    joined = torch.cat(vectors.chunk(branches), dim=-1)
    reached = torch.einsum("rhqkd,hcd->rhqkc", joined, gradients / 40**0.5)
    expected = torch.einsum("rhqjc,rhqkc->hqjk", reached, reached).flatten(2)
    expected = in_tiles(expected, tile).sum(2).unflatten(2, (keys, keys))
    torch.testing.assert_close(effects.products, expected, rtol=1e-4, atol=1e-3)
    assert effects.images == images and effects.attention.sum().item() == pytest.approx(images * HEADS * queries)
    costs = elimination_costs(effects)
    assert (costs.isinf().sum(-1) == 1).all()
    cheapest = costs.argmin(-1)
    assert ((cheapest == 2) | (cheapest == 6)).all()
    kept = torch.ones_like(costs, dtype=torch.bool)
    kept[..., 6] = False
    counted = stand_in_weights(effects, kept)
    assert (counted[..., 6] == 0).all() and (counted[..., 2] > 1.5).all()
    others = counted[..., [0, 1, 3, 4, 5]] / counted[..., 2:3]
    assert ((others > 0.4) & (others < 0.7)).all()


def test_all_keys_and_branches() -> None:
    q, k, v = drawn(2, 5), drawn(2, 9), drawn(4, 9)
    everything = torch.ones(HEADS, 5, 9, dtype=torch.bool)
    work = Work()
    out = lite_attention(q, Vectors.of(k), Vectors.of(v), 9, 2.0, work=work)
    expected = dense(q.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1), v, everything, "absent")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    # Of four products, scores and values of two branches, the second branch's scores are left out.
    assert work.saved == pytest.approx(0.25)
    work.clear()
    alone = lite_attention(q, Vectors.of(k), Vectors.of(v[:2]), 9, 2.0, work=work)
    torch.testing.assert_close(alone, out[:2], rtol=1e-4, atol=1e-5)
    assert work.saved == 0
    with pytest.raises(ValueError, match="4 rows of values do not divide into branches of 3 images"):
        lite_attention(drawn(3, 5), Vectors.of(drawn(3, 9)), Vectors.of(v), 9, 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_of_eight_bits(dtype: torch.dtype) -> None:
    cache = LiteCache(2, 4, 7, HEADS, SIZE, dtype=dtype, device="cpu", bits=8)
    full = LiteCache(2, 4, 7, HEADS, SIZE, dtype=dtype, device="cpu")
    written = [(drawn(4, n).to(dtype), drawn(4, n).to(dtype)) for n in (1, 4, 2)]
    for k, v in written:
        for layer in range(2):
            keys, values = cache.append(layer, k, v)
            full.append(layer, k, v)
    for found, n in ((keys, 0), (values, 1)):
        expected = torch.cat([pair[n] for pair in written], dim=1)
        largest = expected.float().abs().amax(-1, keepdim=True)
        rounding = 0.004 if dtype == torch.float32 else 0.012
        assert found.dtype == dtype and ((found - expected).float().abs() <= rounding * largest).all()
    assert (
        cache.nbytes == 2 * 2 * 4 * 7 * HEADS * (SIZE + 2)
        and full.nbytes == 2 * 2 * 4 * 7 * HEADS * SIZE * dtype.itemsize
    )
    with pytest.raises(ValueError, match="room for 7 positions, 8 were to be written"):
        cache.append(0, drawn(4, 1), drawn(4, 1))


def test_cache_keeps_one_branch_of_keys() -> None:
    cache = LiteCache(1, 4, 6, HEADS, SIZE, dtype=torch.float32, device="cpu", share=True)
    first, second = (drawn(4, 1), drawn(4, 1)), (drawn(4, 4), drawn(4, 4))
    keys, _ = cache.write(0, *first)
    assert keys.rows == 4
    cache.images = 2
    keys, values = cache.write(0, *second)
    assert (keys.rows, values.rows) == (2, 4)
    expected = torch.cat((first[0], second[0]), dim=1)[:2]
    assert torch.equal(keys.read(5).transpose(1, 2), expected)
    assert cache.nbytes == (2 + 4) * 6 * HEADS * SIZE * 4


@pytest.mark.parametrize("share", [False, True])
def test_one_blocks_room_serves_the_last_scale_of_all(share: bool) -> None:
    sizes = {"dtype": torch.float32, "device": "cpu", "share": share}
    whole, short = (LiteCache(2, 4, 9, HEADS, SIZE, last=last, **sizes) for last in (0, 4))  # type: ignore[arg-type]
    whole.images = short.images = 2
    for n in (1, 4, 4):
        for layer in range(2):
            k, v = drawn(4, n), drawn(4, n)
            pairs = zip(whole.append(layer, k, v), short.append(layer, k, v), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    assert short.nbytes / whole.nbytes == pytest.approx((2 * 5 + 9) / (2 * 9))
    short = LiteCache(2, 4, 9, HEADS, SIZE, last=4, **sizes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="those from 5 on, of the last scale, are written all at once"):
        short.append(0, drawn(4, 6), drawn(4, 6))


def test_windows_of_streams_and_uneven_maps() -> None:
    schedule = ScaleSchedule.parse("1 3x5 4x7")
    mask = torch.cat([band(28, n, torch.tensor([3])) for n in schedule.lengths], dim=2)
    window = Window.from_mask(mask, 7)
    assert window.tiles == 4 and (seen(window) >= mask).all() and window.nbytes > 0
