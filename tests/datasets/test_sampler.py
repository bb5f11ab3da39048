"""The order of samples: the official one, the same on any number of ranks, complete, the same after a restart."""

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextscale.datasets.sampler import EpochSampler


def batches(count: int, length: int, **options: object) -> list[list[tuple[int, int]]]:
    return list(islice(EpochSampler(length, **options), count))


def test_the_order_of_each_epoch_is_the_official_one():
    """torch.randperm seeded with epoch + seed, filled from its start, cut in contiguous shares."""
    for rank in range(2):
        found = batches(9, 11, batch_size=2, rank=rank, world_size=2, seed=5, contiguous=True)
        for epoch in range(3):
            order = torch.randperm(11, generator=torch.Generator().manual_seed(5 + epoch)).tolist()
            share = (order + order[:1])[6 * rank : 6 * rank + 6]
            expected = [[(epoch, i) for i in share[b : b + 2]] for b in (0, 2, 4)]
            assert found[3 * epoch : 3 * epoch + 3] == expected


def test_a_table_of_the_official_order():
    """Two epochs of 7 samples, 2 ranks of 2: written out, so that no PyTorch can change it unseen."""
    options = {"batch_size": 2, "world_size": 2, "contiguous": True}
    found = [[[i for _, i in batch] for batch in batches(4, 7, rank=r, **options)] for r in (0, 1)]
    assert found == [[[4, 0], [5, 3], [0, 6], [1, 3]], [[2, 6], [1, 4], [5, 2], [4, 0]]]


@given(length=st.integers(1, 40), per_step=st.sampled_from([6, 12]), seed=st.integers(0, 9), done=st.integers(0, 9))
def test_global_batches_are_the_same_on_any_number_of_ranks(length, per_step, seed, done):
    def taken(ranks: int) -> list[list[tuple[int, int]]]:
        each = [
            batches(7, length, batch_size=per_step // ranks, rank=r, world_size=ranks, seed=seed, start_batch=done)
            for r in range(ranks)
        ]
        return [[key for part in parts for key in part] for parts in zip(*each, strict=True)]

    alone = taken(1)
    assert all(len(batch) == per_step for batch in alone)
    assert taken(2) == taken(3) == alone


def test_without_filling_and_shuffling():
    assert batches(3, 5, batch_size=2, shuffle=False, fill_last=False) == [
        [(0, 0), (0, 1)],
        [(0, 2), (0, 3)],
        [(0, 4)],
    ]


settings_of_a_run = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 7),
        "world_size": st.integers(1, 4),
        "seed": st.integers(0, 100),
        "shuffle": st.booleans(),
        "fill_last": st.booleans(),
        "contiguous": st.booleans(),
    }
)


@given(length=st.integers(30, 80), options=settings_of_a_run, epoch=st.integers(0, 3))
def test_an_epoch_has_every_sample_once_apart_from_the_filled_tail(length, options, epoch):
    seen: list[int] = []
    per_rank = []
    for rank in range(options["world_size"]):
        sampler = EpochSampler(length, rank=rank, start_epoch=epoch, **options)
        keys = [key for batch in islice(sampler, sampler.batches_per_epoch) for key in batch]
        assert {e for e, _ in keys} == {epoch}
        per_rank.append(len(keys))
        seen += [index for _, index in keys]
    assert set(seen) == set(range(length))
    group = options["batch_size"] * options["world_size"]
    extra = -length % group if options["fill_last"] else 0
    assert len(seen) == length + extra
    if options["fill_last"]:
        assert len(set(per_rank)) == 1
        if options["contiguous"]:
            assert seen[length:] == seen[:extra]


@given(length=st.integers(30, 60), options=settings_of_a_run, done=st.integers(0, 60))
def test_a_resumed_run_continues_like_an_unbroken_one(length, options, done):
    rank = options["world_size"] - 1
    sampler = EpochSampler(length, rank=rank, **options)
    unbroken = list(islice(sampler, done + 12))[done:]
    assert list(islice(EpochSampler(length, rank=rank, **options, **sampler.position(done)), 12)) == unbroken
    assert list(islice(EpochSampler(length, rank=rank, **options, start_batch=done), 12)) == unbroken


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0, "batch_size": 1}, "length 0"),
        ({"length": 4, "batch_size": 0}, "batch_size 0"),
        ({"length": 4, "batch_size": 1, "rank": 2, "world_size": 2}, "rank 2 is not one of the 2"),
        ({"length": 4, "batch_size": 1, "start_batch": -1}, "start_batch -1"),
        ({"length": 2, "batch_size": 1, "world_size": 3, "fill_last": False, "contiguous": True}, "nothing for rank 0"),
        ({"length": 2, "batch_size": 1, "rank": 2, "world_size": 3, "fill_last": False}, "nothing for rank 2"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(**options)
