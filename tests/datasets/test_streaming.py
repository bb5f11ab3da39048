"""Streamed shards: every sample once an epoch, whoever reads; any place to go on at; what is broken passed over."""

import gzip
import logging
from itertools import islice

import numpy as np
import pytest
import torch

from nextscale.datasets.errors import LabelError, NoImagesError, ShardError, SourceError, UnreadableImagesError
from nextscale.datasets.images import open_images
from nextscale.datasets.stream_plan import StreamPlan, lanes_of
from nextscale.datasets.streaming import open_stream

COUNTS = (7, 3, 11, 1, 5)
TOTAL = sum(COUNTS)
LAYOUTS = [(1, 0), (1, 2), (2, 0), (2, 2), (3, 0), (3, 2)]


@pytest.fixture
def shards(tmp_path, make):
    """Shards of unequal sizes, one of them compressed; returns their pattern."""
    first = 0
    for number, count in enumerate(COUNTS):
        suffix = "tar.gz" if number == 2 else "tar"
        make.tar(tmp_path / f"train-{number}.{suffix}", make.samples(count, first))
        first += count
    return str(tmp_path / "train-*")


def opened(source, **options):
    made = open_stream(source, size=8, resize_ratio=1.0, flip=True, seed=3, **{"buffer": 4, **options})
    made.name_classes(3, None)
    return made


def as_lists(batches):
    return [{k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch.items()} for batch in batches]


def seen(images, epochs=2, micro_batch=3, start=0, **options):
    """(epoch, index) of all samples of whole epochs, over all processes."""
    processes = options.pop("processes", 1)
    wanted = epochs * TOTAL
    per_process = -(-wanted // (processes * micro_batch))
    pairs = []
    for rank in range(processes):
        stream = images.batches(start, micro_batch, rank=rank, processes=processes, **options)
        for batch in islice(stream, per_process):
            pairs += zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True)
    return [pair for pair in pairs if pair[0] < epochs]


@pytest.mark.parametrize(("processes", "workers"), LAYOUTS)
def test_every_sample_is_seen_once_an_epoch_by_one_process(shards, processes, workers):
    pairs = seen(opened(shards), processes=processes, workers=workers)
    assert sorted(pairs) == [(epoch, index) for epoch in range(2) for index in range(TOTAL)]
    by_epoch = [[index for epoch, index in pairs if epoch == e] for e in range(2)]
    assert by_epoch[0] != by_epoch[1] != sorted(by_epoch[1])  # shuffled, each epoch anew


@pytest.mark.parametrize(("processes", "workers"), LAYOUTS)
def test_a_run_goes_on_at_any_batch(shards, processes, workers):
    images = opened(shards, lanes=6)
    for rank in range(processes):
        options = {"rank": rank, "processes": processes}
        whole = as_lists(islice(images.batches(0, 2, **options), 30))
        starts = range(1, 29, 3) if workers == 0 else (13,)
        for start in starts:
            again = as_lists(islice(opened(shards, lanes=6).batches(start, 2, workers=workers, **options), 2))
            assert again == whole[start : start + 2]


def test_a_step_sees_the_same_samples_on_any_number_of_processes(shards):
    images = opened(shards, lanes=6)
    steps = []
    for processes in (1, 2, 3):
        ranks = [images.batches(0, 6 // processes, rank=r, processes=processes) for r in range(processes)]
        steps.append(
            [
                sorted(
                    (sample, image.tobytes())
                    for batch in step
                    for sample, image in zip(batch["index"].tolist(), batch["image"].numpy(), strict=True)
                )
                for step in islice(zip(*ranks, strict=True), 12)
            ]
        )
    assert steps[0] == steps[1] == steps[2]


def test_a_sample_is_the_one_of_the_indexed_shards(shards):
    indexed = open_images(shards, size=8, resize_ratio=1.0, flip=True, seed=3)
    images = opened(shards)
    for batch in islice(images.batches(0, 5), 8):
        keys = list(zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True))
        there = indexed.fetch(keys)
        assert torch.equal(batch["image"], there["image"]) and torch.equal(batch["label"], there["label"])
        assert batch["name"] == there["name"]
    for keys in ([0, 1, 8, 20, 26], [26, 3, 3, 2], [(1, 7)]):
        there, here = indexed.fetch(keys), images.fetch(keys)
        assert torch.equal(here["image"], there["image"]) and here["name"] == there["name"]


# --- the plan ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 4, 5, 7, 40])
def test_lanes_are_equal_to_a_sample_and_cover_all(lanes):
    plan = StreamPlan(COUNTS, lanes, seed=1)
    for epoch in range(3):
        found = []
        for lane in range(lanes):
            of_lane = [
                plan.first_of(part.shard) + i for part in plan.ranges(epoch, lane) for i in range(part.first, part.last)
            ]
            assert len(of_lane) == plan.length(lane) and abs(len(of_lane) - TOTAL / lanes) < 1
            found += of_lane
        assert sorted(found) == list(range(TOTAL))
    assert plan.locate(2 * TOTAL + lanes) == (2, 0, 1) or lanes > TOTAL


def test_numbers_of_lanes():
    assert [lanes_of(shards, 1) for shards in (1, 5, 10, 1000)] == [1, 4, 8, 24]
    assert lanes_of(1000, 16) == 48 and lanes_of(5, 3) == 12 and lanes_of(5, 2, 6) == 6
    with pytest.raises(ValueError, match="lanes is 0"):
        lanes_of(5, 1, 0)


# --- what is broken ---------------------------------------------------------------------------------------


def damaged(kind, tmp_path):
    """Break the third shard, of eleven samples, after it was counted. Returns the place from which it is broken."""
    path = tmp_path / "train-2.tar.gz"
    if kind == "missing":
        path.unlink()
    elif kind == "truncated gzip":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "damaged member":
        whole = bytearray(gzip.decompress(path.read_bytes()))
        at = whole.index(
            b"0015.png"
        )  # the header of the sample at place 5; what comes before a damaged header is not known to be whole
        whole[at + 130] ^= 255
        path.write_bytes(gzip.compress(bytes(whole)))


@pytest.mark.parametrize("kind", ["missing", "truncated gzip", "damaged member"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_shard_is_passed_over_and_named(shards, tmp_path, caplog, kind, workers):
    images = opened(shards, lanes=4)
    damaged(kind, tmp_path)
    with caplog.at_level(logging.WARNING):
        batches = list(islice(images.batches(0, 3, workers=workers), TOTAL // 3))
    indices = np.concatenate([batch["index"].numpy() for batch in batches])
    lost = {"missing": 11, "damaged member": 7}.get(kind) or TOTAL - len(set(indices.tolist()))
    assert 0 < lost <= 11 and len(set(indices.tolist())) == TOTAL - lost
    names = {name for batch in batches for name in batch["skipped"]}
    assert names == {f"{tmp_path / 'train-2.tar.gz'} (from sample {11 - lost} on)"}
    if not workers:
        assert "a shard is broken from sample" in caplog.text
        whole = as_lists(batches)
        for start in range(1, 8):
            again = as_lists(islice(images.batches(start, 3), 2))
            assert [b["index"] for b in again] == [b["index"] for b in whole[start : start + 2]]


def test_a_shard_that_is_broken_when_it_is_counted_gives_what_it_has(shards, tmp_path):
    path = tmp_path / "train-0.tar"
    path.write_bytes(path.read_bytes()[:6000])
    images = opened(shards)
    readable = images.shards.counts[0]
    assert 0 < readable < 7 and len(images) == TOTAL - 7 + readable
    first = next(images.batches(0, 3))
    assert len(first["skipped"]) == 1 and str(path) in first["skipped"][0]


def test_unreadable_images_are_replaced_in_their_places(tmp_path, make):
    files = make.samples(12)
    for bad in ("0003.png", "0004.png", "0011.png"):
        files[bad] = b"no image"
    files["0007.cls"] = b"9"
    images = opened(str(make.tar(tmp_path / "a.tar", files)), lanes=2)
    batches = list(islice(images.batches(0, 4), 6))
    indices = [i for batch in batches for i in batch["index"].tolist()]
    assert set(indices) == {0, 1, 2, 5, 6, 8, 9, 10} and len(indices) == 24
    assert {name for batch in batches for name in batch["skipped"]} == {"0003", "0004", "0011", "0007"}
    for start in range(1, 5):
        assert [b["index"].tolist() for b in islice(images.batches(start, 4), 2)] == [
            indices[4 * s : 4 * s + 4] for s in (start, start + 1)
        ]


def test_nothing_left_to_read_ends_the_run(tmp_path, make):
    path = make.tar(tmp_path / "a.tar", make.samples(4))
    images = opened(str(path))
    path.unlink()
    with pytest.raises(ShardError, match="none of 1 shards"):
        next(images.batches(0, 2))
    bad = make.tar(tmp_path / "b.tar", {f"{i:03d}.png": b"no image" for i in range(40)})
    unreadable = open_stream(str(bad), size=8, labels=False)
    with pytest.raises(UnreadableImagesError, match="32 samples in a row"):
        next(unreadable.batches(0, 2))


# --- classes and settings ---------------------------------------------------------------------------------


def test_classes_must_be_told(shards, tmp_path, make):
    images = open_stream(shards, size=8)
    with pytest.raises(LabelError, match="give classes"):
        images.require_labels()
    assert next(images.as_one_class().batches(0, 3))["label"].tolist() == [0, 0, 0]
    with pytest.raises(LabelError, match="2 class names were given for 3"):
        images.name_classes(3, ["a", "b"])
    named = {f"{i}.{e}": d for i in range(3) for e, d in (("png", make.image(i)), ("cls", b"dog" if i else b"cat"))}
    pets = open_stream(str(make.tar(tmp_path / "pets.tar", named)), size=8, buffer=1)
    pets.name_classes(None, ["cat", "dog"])
    assert (pets.classes, pets.num_classes) == (("cat", "dog"), 2)
    assert sorted(next(pets.batches(0, 3))["label"].tolist()) == [0, 1, 1]


@pytest.mark.parametrize(
    ("options", "error"),
    [({"resize_ratio": 0.5}, "resize_ratio 0.5"), ({"buffer": 0}, "buffer is 0"), ({"lanes": -1}, "lanes is -1")],
)
def test_impossible_settings(shards, options, error):
    with pytest.raises(ValueError, match=error):
        open_stream(shards, size=8, **options)


def test_what_cannot_be_streamed(tmp_path, make):
    (tmp_path / "a.png").write_bytes(make.image())
    with pytest.raises(SourceError, match="no webdataset shard"):
        open_stream(str(tmp_path), size=8)
    with pytest.raises(NoImagesError, match="no sample in"):
        open_stream(str(make.tar(tmp_path / "none.tar", {"a.txt": b"x"})), size=8)
    with pytest.raises(SourceError, match="more than once"):
        open_stream("https://host/{a,a}.tar", size=8)
