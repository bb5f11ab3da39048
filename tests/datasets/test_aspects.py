"""Lists of images with texts, and batches of one aspect ratio each."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextscale.datasets.aspects import AspectImages, open_aspects
from nextscale.datasets.caption_lists import CaptionListError
from nextscale.datasets.captions import CaptionError, Choice, open_captions
from nextscale.datasets.decoding import covering, decode
from nextscale.datasets.errors import NoImagesError
from nextscale.datasets.images import open_images
from nextscale.datasets.sampler import EpochSampler

SIZES = ((8, 8), (12, 6), (6, 12))
SHAPES = {"square": (20, 20), "tall": (10, 22), "wide": (40, 19)}
"""(width, height)"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos with spaces"
    folder.mkdir()
    for place, (name, size) in enumerate(SHAPES.items()):
        for number in range(3):
            Image.new("RGB", size, (40 * place, 80 * number, 7)).save(folder / f"{name}{number}.png")
    return folder


def write_list(path: Path, names: list[str], **entries: object) -> Path:
    lines = [{"image_path": name, "long_caption": f"this is {name}. It is small! --ar 3", **entries} for name in names]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


@pytest.fixture
def listed(photos: Path) -> Path:
    return write_list(
        photos.parent / "1.000_9.jsonl", [f"photos with spaces/{f.name}" for f in sorted(photos.iterdir())]
    )


def test_images_go_to_the_size_nearest_to_their_shape(listed: Path):
    data = open_aspects(listed, SIZES)
    wanted = {"square": 0, "tall": 1, "wide": 2}
    assert [wanted[data.name(i).rstrip("012.png")] for i in range(9)] == data.groups.tolist()
    batch = data.fetch([(0, int(i)) for i in np.flatnonzero(data.groups == 2)])
    assert tuple(batch["image"].shape) == (3, 3, 6, 12)
    assert batch["name"] == ["wide0.png", "wide1.png", "wide2.png"]
    assert batch["text"][1] == "this is photos with spaces/wide1.png. It is small!"  # what follows -- is dropped
    assert batch["image"][1, :, 3, 5].tolist() == pytest.approx([80 / 127.5 - 1, 80 / 127.5 - 1, 7 / 127.5 - 1])


def test_a_ratio_in_the_list_wins_over_the_header(photos: Path):
    lists = write_list(photos / "one.jsonl", ["square0.png"], h_div_w=2.0)
    assert open_aspects(lists, SIZES).groups.tolist() == [1]


def test_batches_hold_one_size_on_every_rank_and_every_sample_comes_up(listed: Path):
    data = open_aspects(listed, SIZES)
    seen: list[int] = []
    for rank in range(2):
        sampler = EpochSampler(9, batch_size=1, rank=rank, world_size=2, seed=3, groups=data.groups)
        assert sampler.batches_per_epoch == 6  # three groups of three fill two batches of two each
        batches = list(islice(sampler, 12))
        seen += [index for batch in batches[:6] for _, index in batch]
        again = EpochSampler(9, batch_size=1, rank=rank, world_size=2, seed=3, groups=data.groups, start_batch=8)
        assert list(islice(again, 4)) == batches[8:]
    assert set(seen) == set(range(9))
    assert (data.groups[seen[:6]] == data.groups[seen[6:]]).all()
    with pytest.raises(ValueError, match="9 numbers, expected 8"):
        EpochSampler(8, batch_size=1, groups=data.groups)


def test_a_batch_of_several_sizes_is_refused(listed: Path):
    with pytest.raises(ValueError, match="3 sizes, expected one"):
        open_aspects(listed, SIZES).fetch([0, 3, 6])


def test_a_damaged_image_is_replaced_by_one_of_its_size(photos: Path, listed: Path):
    (photos / "tall1.png").write_bytes(b"nothing")
    data = open_aspects(listed, SIZES)
    number = next(i for i in range(9) if data.name(i) == "tall1.png")
    assert data.groups[number] == 0  # of an unknown shape
    batch = data.fetch([number])
    assert batch["skipped"] == ("tall1.png",)
    assert data.groups[batch["index"][0]] == 0
    assert batch["name"][0].removesuffix(".png") in batch["text"][0]


def test_folders_with_texts_beside_the_images(photos: Path):
    for image in photos.glob("*.png"):
        image.with_suffix(".txt").write_text(image.stem)
    data = open_aspects(photos, SIZES)
    assert isinstance(data, AspectImages)
    assert data.vocabulary() == sorted(data.vocabulary())
    assert sorted(np.bincount(data.groups)) == [3, 3, 3]


def test_lists_are_a_source_of_square_images_with_texts(photos: Path, listed: Path):
    images = open_images(listed, size=8, labels=True)
    assert len(images) == 9 and images.labels is None
    texts = open_captions(listed, images, choice=Choice(cut=True))
    found = {texts.fetch([(epoch, 4)])["text"][0] for epoch in range(20)}
    whole = "this is photos with spaces/tall1.png. It is small!"
    assert found == {whole, "this is photos with spaces/tall1.png."}
    assert len(open_images(photos.parent, size=8)) == 9  # with images below, a list in a folder is a note


def test_short_texts_are_drawn_as_often_as_asked(photos: Path):
    lists = write_list(photos / "two.jsonl", ["wide0.png"] * 1, text="short")
    images = open_images(lists, size=8)
    texts = open_captions(lists, images, choice=Choice(short=0.3, seed=1))
    drawn = [texts.fetch([(epoch, 0)])["text"][0] for epoch in range(400)]
    assert 0.2 < drawn.count("short") / 400 < 0.4
    assert drawn == [texts.fetch([(epoch, 0)])["text"][0] for epoch in range(400)]
    assert open_captions(lists, images, field="text").fetch([0])["text"] == ["short"]
    with pytest.raises(ValueError, match="short is 2"):
        Choice(short=2)


def test_wrong_lines_are_named_together(photos: Path):
    lists = photos / "bad.jsonl"
    good = json.dumps({"file_name": "wide0.png", "text": "x"})
    lists.write_text("\n".join([good, "{", "[]", "{}", '{"image_path": "gone.png"}', good[:-1] + ', "h_div_w": -1}']))
    with pytest.raises(CaptionListError, match="5 lines cannot be used") as error:
        open_images(lists, size=8)
    for problem in ("line 2 (no JSON)", "line 3 (no object)", "line 4 (no image_path or", "gone.png is not", "is -1"):
        assert problem in str(error.value)
    lists.write_text("\n")
    with pytest.raises(NoImagesError, match="no image is named"):
        open_images(lists, size=8)


def test_lines_without_text_are_named(photos: Path):
    lists = photos / "silent.jsonl"
    lists.write_text(json.dumps({"image_path": "wide0.png"}))
    with pytest.raises(CaptionError, match=r"1 of 1 images have no text: wide0\.png"):
        open_aspects(lists, SIZES)


@pytest.mark.parametrize("size", [(7, 31), (31, 7), (16, 16), (3, 2)])
def test_covering_keeps_the_centre(size: tuple[int, int], tmp_path: Path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[6:10, 6:10] = 255
    Image.fromarray(pixels).save(tmp_path / "dot.png")
    made = covering(decode((tmp_path / "dot.png").read_bytes()), *size)
    assert made.shape == (3, *size)
    assert made[:, size[0] // 2, size[1] // 2].min() > 90


def test_covering_cuts_a_16_bit_image_too(tmp_path: Path):
    Image.fromarray(np.full((9, 30), 40000, np.uint16)).save(tmp_path / "deep.png")
    made = covering(decode((tmp_path / "deep.png").read_bytes()), 6, 6)
    assert made.dtype == np.float32 and made.shape == (3, 6, 6)
    assert made == pytest.approx(40000 / 65535 * 2 - 1, abs=1e-5)
