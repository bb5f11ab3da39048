"""Batches are the same with and without workers, and a loader says where the next one starts."""

from itertools import islice

import pytest
import torch

from nextscale.datasets.images import open_images
from nextscale.datasets.loader import make_loader
from nextscale.datasets.sampler import EpochSampler


@pytest.fixture
def dataset(tmp_path, make):
    files = make.samples(10)
    files["0003.png"] = b"broken"
    return open_images(make.tar(tmp_path / "a.tar.gz", files), size=8, resize_ratio=1.0, flip=True)


def as_lists(batches):
    return [{k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch.items()} for batch in batches]


def test_workers_change_nothing_and_the_state_is_of_what_was_given(dataset):
    sampler = EpochSampler(10, batch_size=4)
    here, there = make_loader(dataset, sampler), make_loader(dataset, sampler, workers=2)
    assert here.batches_per_epoch == 3
    assert here.state == {"start_epoch": 0, "start_batch": 0}
    first = as_lists(islice(here, 5))
    assert first == as_lists(islice(there, 5))
    assert here.state == there.state == {"start_epoch": 1, "start_batch": 2}
    assert sum((batch["skipped"] for batch in first[:3]), ()).count("0003") >= 1
    resumed = make_loader(dataset, EpochSampler(10, batch_size=4, **here.state), workers=1)
    assert as_lists(islice(resumed, 3)) == as_lists(islice(here, 8))[5:]


def test_a_dataset_without_fetch_is_collated(dataset):
    class Plain:
        def __len__(self):
            return len(dataset)

        def __getitem__(self, key):
            return dataset[key]

    sampler = EpochSampler(10, batch_size=4, seed=2)
    assert as_lists(islice(make_loader(Plain(), sampler), 4)) == as_lists(islice(make_loader(dataset, sampler), 4))


def test_pinning_without_a_device_is_no_error(dataset):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    (batch,) = islice(make_loader(dataset, EpochSampler(10, batch_size=4), pin_memory=True), 1)
    assert batch["image"].shape == (4, 3, 8, 8)


@pytest.mark.parametrize(("length", "options"), [(11, {}), (10, {"workers": -1}), (10, {"prefetch": 0})])
def test_impossible_settings(dataset, length, options):
    with pytest.raises(ValueError, match=r"must be|make the sampler"):
        make_loader(dataset, EpochSampler(length, batch_size=2), **options)
