"""What a source is shows from what is there; what is unclear, empty or missing is refused by name."""

import os

import pytest

from nextscale.datasets.errors import EmptyClassError, NoImagesError, SourceError
from nextscale.datasets.images import open_images
from nextscale.datasets.sources import expand_braces


@pytest.fixture
def put(tmp_path, make):
    def write(*names: str):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make.image(len(name)))
        return tmp_path

    return write


def names(source, **options) -> list[str]:
    dataset = open_images(source, size=8, **options)
    return [dataset.name(i) for i in range(len(dataset))]


def test_flat_folder(put):
    assert names(put("b.PNG", "a.JPEG", "notes.txt", ".hidden.png")) == ["a.JPEG", "b.PNG"]


def test_nested_folder_beside_images_has_no_classes(put):
    dataset = open_images(put("a.png", "x/b.png", "x/y/c.png"), size=8)
    assert [dataset.name(i) for i in range(3)] == ["a.png", "x/b.png", "x/y/c.png"]
    assert dataset.classes is None


def test_class_folders_are_numbered_in_sorted_order(put):
    dataset = open_images(put("n02/b.JPEG", "n01/deep/a.JPEG", "n10/c.JPEG", "README.md"), size=8)
    assert dataset.classes == ("n01", "n02", "n10")
    assert [(dataset[i]["name"], dataset[i]["label"]) for i in range(3)] == [
        ("n01/deep/a.JPEG", 0),
        ("n02/b.JPEG", 1),
        ("n10/c.JPEG", 2),
    ]


def test_linked_folders_are_followed_but_not_in_circles(put, tmp_path):
    put("real/a.png", "set/one/b.png")
    os.symlink(tmp_path / "real", tmp_path / "set" / "two")
    os.symlink(tmp_path / "set", tmp_path / "set" / "one" / "back")
    assert "two/a.png" in names(tmp_path / "set")


def test_empty_classes_are_named_together(put, tmp_path):
    put("a/1.png", "d/1.png")
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "c" / "notes.txt").write_text("nothing")
    with pytest.raises(EmptyClassError, match="2 of 4 class folders hold no image: b, c"):
        open_images(tmp_path, size=8)
    assert len(open_images(tmp_path, size=8, labels=False)) == 2


def test_nothing_there(tmp_path, put):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoImagesError, match="empty holds no image"):
        open_images(tmp_path / "empty", size=8)
    with pytest.raises(SourceError, match=r"nothing is there .*x-1\.tar, .*x-2\.tar$"):
        open_images(str(tmp_path / "x-{1..2}.tar"), size=8)
    with pytest.raises(NoImagesError, match="list of sources is empty"):
        open_images([], size=8)


def test_mixtures_are_refused(put, tmp_path, make):
    put("a.png")
    make.tar(tmp_path / "b.tar", make.samples(1))
    with pytest.raises(SourceError, match="mixture of 1 images and 1 tar shards"):
        open_images(tmp_path, size=8)
    with pytest.raises(SourceError, match="mixture"):
        open_images([tmp_path / "a.png", tmp_path / "b.tar"], size=8)
    with pytest.raises(SourceError, match="neither an image"):
        open_images(__file__, size=8)


def test_splits_are_no_classes_and_not_one_set(put, tmp_path, make):
    root = put("r/train/n01/a.png", "r/val/n01/a.png") / "r"
    with pytest.raises(SourceError, match=r"splits .train, val.*name one"):
        open_images(root, size=8)
    with pytest.raises(SourceError, match="splits"):
        open_images(root, size=8, labels=False)
    assert len(open_images(root / "train", size=8)) == 1
    (tmp_path / "s").mkdir()
    for name in ("train-0.tar", "train-1.tar", "test-0.tar"):
        make.tar(tmp_path / "s" / name, make.samples(2))
    with pytest.raises(SourceError, match="shards of several splits"):
        open_images(tmp_path / "s", size=8)
    assert len(open_images(str(tmp_path / "s" / "train*.tar"), size=8)) == 4


def test_shards_one_folder_too_deep(tmp_path, make):
    (tmp_path / "data").mkdir()
    make.tar(tmp_path / "data" / "a.tar", make.samples(1))
    with pytest.raises(SourceError, match="only in folders below it: name one of data"):
        open_images(tmp_path, size=8)


def test_list_of_images(put, tmp_path):
    put("x/a.png", "x/y/b.png")
    assert names([tmp_path / "x/y/b.png", tmp_path / "x/a.png"]) == ["y/b.png", "a.png"]
    with pytest.raises(SourceError, match="more than once"):
        open_images([tmp_path / "x/a.png", tmp_path / "x/a.png"], size=8)


def test_braces():
    assert expand_braces("a{008..010}b") == ["a008b", "a009b", "a010b"]
    assert expand_braces("{x,y}{1..2}") == ["x1", "x2", "y1", "y2"]
    assert expand_braces("plain{}") == ["plain{}"]
