"""Augmentation depends on (seed, epoch, index) alone; bad samples are passed over and named."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.datasets import images
from nextscale.datasets.errors import ImageSizeError, LabelError, UnreadableImagesError
from nextscale.datasets.images import collate, open_images


@pytest.fixture
def folder(tmp_path, make):
    for i in range(6):
        path = tmp_path / "set" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make.image(i, (40 + i, 32)))
    return tmp_path / "set"


def same(one: dict, other: dict) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def test_a_sample(folder):
    dataset = open_images(folder, size=16)
    assert len(dataset) == 6
    assert dataset.classes == ("a", "b", "c")
    assert dataset.num_classes == 3
    assert dataset.label_counts().tolist() == [2, 2, 2]
    sample = dataset[3]
    assert sample["image"].shape == (3, 16, 16)
    assert sample["image"].dtype == torch.float32
    assert -1 <= sample["image"].min() < 0 < sample["image"].max() <= 1
    assert (sample["label"], sample["index"], sample["name"], sample["skipped"]) == (1, 3, "b/4.png", ())
    assert dataset.require_labels() is dataset
    with pytest.raises(IndexError):
        dataset[6]


def test_augmentation_depends_on_seed_epoch_and_index_alone(folder):
    first, second = (open_images(folder, size=16, flip=True, seed=3) for _ in range(2))
    keys = [(epoch, index) for epoch in range(3) for index in range(6)]
    forwards = {key: first[key] for key in keys}
    backwards = {key: pickle.loads(pickle.dumps(second))[key] for key in reversed(keys)}
    assert all(same(forwards[key], backwards[key]) for key in keys)
    assert same(first[2], forwards[(0, 2)])
    assert not torch.equal(forwards[(0, 1)]["image"], forwards[(1, 1)]["image"])
    other_seed = open_images(folder, size=16, flip=True, seed=4)
    assert any(not torch.equal(other_seed[key]["image"], forwards[key]["image"]) for key in keys)


def test_crops_reach_every_place_and_half_are_flipped(tmp_path):
    ramp = np.broadcast_to(np.arange(10, dtype=np.uint8)[None, :, None] * 20, (10, 10, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ramp.png")
    dataset = open_images(tmp_path, size=8, flip=True, resize_ratio=0)
    rows = [dataset[(epoch, 0)]["image"][0, 0] for epoch in range(300)]
    flipped = sum(bool(row[0] > row[-1]) for row in rows)
    assert 110 < flipped < 190
    edges = {round(float(min(row[0], row[-1]) + 1) / 2 * 255) // 20 for row in rows}
    assert edges == {0, 1, 2}


def test_central_crop_and_no_flip_are_the_same_in_every_epoch(folder):
    dataset = open_images(folder, size=16, crop="center")
    assert torch.equal(dataset[(0, 1)]["image"], dataset[(9, 1)]["image"])


def test_images_of_the_models_size_are_not_resampled(tmp_path, make):
    (tmp_path / "one.png").write_bytes(make.image(5))
    pixels = np.asarray(Image.open(tmp_path / "one.png"))
    dataset = open_images(tmp_path, size=8, resize_ratio=1.0, flip=True)
    found = [dataset[(epoch, 0)]["image"] for epoch in range(8)]
    wanted = torch.from_numpy(pixels / 255 * 2 - 1).permute(2, 0, 1).float()
    assert all(torch.allclose(image, wanted) or torch.allclose(image, wanted.flip(2)) for image in found)
    assert len({image.numpy().tobytes() for image in found}) == 2
    assert dataset[0]["label"] == -1


def test_fetch_and_collate_agree(folder, tmp_path, make):
    shard = make.tar(tmp_path / "s.tar.gz", make.samples(5))
    for dataset in (open_images(folder, size=16), open_images(shard, size=8, resize_ratio=1.0, flip=True)):
        keys = [(2, 4), (0, 1), (1, 1)]
        assert same(dataset.fetch(keys), collate([dataset[key] for key in keys]))
        assert same(dataset.fetch(keys), dataset.fetch(keys))


def test_deep_and_shallow_images_in_one_batch(tmp_path, make):
    (tmp_path / "a.png").write_bytes(make.image(1))
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(tmp_path / "b.png")
    dataset = open_images(tmp_path, size=8, resize_ratio=1.0)
    batch = dataset.fetch([0, 1])
    assert same(batch, collate([dataset[0], dataset[1]]))
    assert torch.allclose(batch["image"][1], torch.tensor(30000 / 65535 * 2 - 1))


def test_a_corrupt_image_is_passed_over_and_named(folder, caplog):
    broken = [folder / "b" / "1.png", folder / "b" / "4.png", folder / "c" / "5.png"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    dataset = open_images(folder, size=16)
    sample = dataset[(1, 2)]
    assert sample["skipped"] == ("b/1.png", "b/4.png")
    assert (sample["name"], sample["index"], sample["label"]) == ("c/2.png", 4, 2)
    assert same(sample, dataset[(1, 2)])
    assert dataset[5]["name"] == "a/0.png"  # past the end it goes on at the start
    assert dataset.fetch([(0, 2), (0, 0), (0, 5)])["skipped"] == ("b/1.png", "b/4.png", "c/5.png")
    assert caplog.text.count("passed over b/1.png") == 1
    assert "cannot be decoded" in caplog.text


def test_too_many_corrupt_images_in_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_UNREADABLE", 3)
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image")
    with pytest.raises(UnreadableImagesError, match=r"3 samples in a row .* 2\.jpg, 3\.jpg, 4\.jpg"):
        open_images(tmp_path, size=8)[2]


def test_images_too_small_when_resizing_is_off_are_named_together(folder, make):
    (folder / "a" / "x.png").write_bytes(make.image(0, (20, 60)))
    (folder / "c" / "y.png").write_bytes(make.image(0, (60, 9)))
    with pytest.raises(ImageSizeError, match=r"2 of 8 .*a/x\.png \(20 x 60\), c/y\.png \(60 x 9\)"):
        open_images(folder, size=32, resize_ratio=0)
    assert open_images(folder, size=32)[2]["image"].shape == (3, 32, 32)


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 8, "crop": "left"}, {"size": 8, "resize_ratio": 0.5}])
def test_impossible_settings(folder, options):
    with pytest.raises(ValueError, match="must be"):
        open_images(folder, **options)


def test_labels_can_be_required_or_ignored(tmp_path, folder, make):
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "one.png").write_bytes(make.image(0))
    with pytest.raises(LabelError, match=r"one\.png, have no class"):
        open_images(flat, size=8).require_labels()
    ignored = open_images(folder, size=8, labels=False)
    assert ignored[0]["label"] == -1
    assert ignored.classes is None
    assert ignored.num_classes == 0
    assert len(ignored.label_counts()) == 0


def test_jpeg_of_a_shard_is_decoded_once(tmp_path, make, monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "JPEG")
    dataset = open_images(make.tar(tmp_path / "s.tar", {"a.jpg": buffer.getvalue()}), size=8, resize_ratio=1.0)
    before = dataset[0]
    monkeypatch.setattr(images, "decode", lambda data: pytest.fail("decoded twice"))
    assert same(dataset[0], before)
