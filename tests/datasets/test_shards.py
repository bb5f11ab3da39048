"""Shards give the same samples whatever their packing; damage is found before anything starts."""

import gzip
import io
import json
import os
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
import torch

from nextscale.datasets import packing, shards
from nextscale.datasets.errors import CacheError, DatasetError, LabelError, ShardError, SourceError
from nextscale.datasets.images import open_images
from nextscale.datasets.packing import Memory


def read(source, **options) -> list[tuple[str, int, bytes]]:
    dataset = open_images(source, size=8, resize_ratio=1.0, **options)
    items = (dataset[i] for i in range(len(dataset)))
    return [(item["name"], item["label"], item["image"].numpy().tobytes()) for item in items]


@pytest.fixture
def small_memory(monkeypatch):
    """Everything compressed goes to the cache folder."""
    monkeypatch.setattr(shards, "Memory", lambda: Memory(100))


def test_tar_and_compressed_tar_hold_the_same(tmp_path, make):
    plain = read(make.tar(tmp_path / "a.tar", make.samples(7)))
    assert plain == read(make.tar(tmp_path / "a.tar.gz", make.samples(7)))
    assert plain == read(make.tar(tmp_path / "a.tgz", make.samples(7)))
    assert [row[:2] for row in plain[:4]] == [("0000", 0), ("0001", 1), ("0002", 2), ("0003", 0)]


def test_large_shards_are_unpacked_once(tmp_path, make, small_memory, cache, caplog, monkeypatch):
    path = make.tar(tmp_path / "a.tar.gz", make.samples(7))
    first = read(path)
    assert "unpacked once into" in caplog.text
    assert str(cache) in caplog.text
    assert sorted(file.suffix for file in cache.iterdir()) == [".npz", ".pack"]
    monkeypatch.setattr(shards, "_compressed", lambda *_: pytest.fail("unpacked twice"))
    assert read(path) == first
    (pack,) = cache.glob("*.pack")
    pack.write_bytes(pack.read_bytes()[:-1])
    monkeypatch.undo()
    os.environ["NEXTSCALE_CACHE"] = str(cache)
    assert read(path) == first


def test_a_shard_that_cannot_be_unpacked(tmp_path, make, small_memory, cache, monkeypatch):
    path = make.tar(tmp_path / "a.tar.gz", make.samples(7))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing.os, "fsync", full)
    with pytest.raises(CacheError, match=r"No space left on device.*NEXTSCALE_CACHE"):
        open_images(path, size=8)
    assert not list(cache.iterdir())


def test_several_shards_by_pattern_list_and_folder(tmp_path, make):
    for i in range(3):
        make.tar(tmp_path / f"t-{i}.tar", make.samples(2, first=2 * i))
    wanted = read(tmp_path)
    assert [name for name, _, _ in wanted] == [f"{i:04d}" for i in range(6)]
    assert read(str(tmp_path / "t-{0..2}.tar")) == read(sorted(tmp_path.iterdir())) == wanted


def test_json_labels_names_and_upper_case(tmp_path, make):
    image = make.image(1)
    files = {
        "a.PNG": image,
        "a.json": b'{"label": 4}',
        "b.mask.png": image,
        "b.png": image,
        "b.json": b'{"cls": 2}',
    }
    dataset = open_images(make.tar(tmp_path / "a.tar", files), size=8)
    assert [dataset[i]["label"] for i in range(2)] == [4, 2]
    assert dataset.num_classes == 5
    files = {"a.png": image, "a.cls": b"dog\n", "b.png": image, "b.cls": b"cat"}
    dataset = open_images(make.tar(tmp_path / "b.tar", files), size=8)
    assert dataset.classes == ("cat", "dog")
    assert [dataset[i]["label"] for i in range(2)] == [1, 0]


def test_missing_and_mixed_labels(tmp_path, make):
    image = make.image(1)
    files = {"a.png": image, "b.png": image, "b.cls": b"1", "c.png": image, "c.json": b"{"}
    path = make.tar(tmp_path / "a.tar", files)
    with pytest.raises(LabelError, match=r"2 of 3 samples have no label .*: a, c"):
        open_images(path, size=8)
    assert len(open_images(path, size=8, labels=False)) == 3
    path = make.tar(tmp_path / "b.tar", {"a.png": image, "a.cls": b"1", "b.png": image, "b.cls": b"dog"})
    with pytest.raises(LabelError, match=r"numbers in some samples .1. and names in others .dog."):
        open_images(path, size=8)
    path = make.tar(tmp_path / "c.tar", {"a.png": image, "a.cls": b"-1"})
    with pytest.raises(LabelError, match="outside 0"):
        open_images(path, size=8)


def test_samples_torn_apart_or_double(tmp_path, make):
    image = make.image(1)
    path = make.tar(tmp_path / "a.tar", {"a.png": image, "b.png": image, "a.cls": b"1", "b.cls": b"1"})
    with pytest.raises(ShardError, match="labels have no image beside them: a"):
        open_images(path, size=8)
    with pytest.raises(DatasetError, match="sample a has two images"):
        open_images(make.tar(tmp_path / "b.tar", {"a.png": image, "a.jpg": image}), size=8)


def test_truncated_shards_are_named_together(tmp_path, make):
    for i, name in enumerate(("a.tar", "b.tar.gz", "c.tar", "d.tar")):
        make.tar(tmp_path / name, make.samples(30, first=30 * i))
    for name in ("a.tar", "b.tar.gz"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(ShardError) as caught:
        open_images(tmp_path, size=8)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    for name, line in zip(("a.tar", "b.tar.gz"), lines, strict=True):
        assert f"{name} is truncated or damaged" in line
        assert "samples are readable, up to 00" in line
        assert "Fetch or write it again" in line


@pytest.mark.parametrize("keep", [0, 1, 511, 512, 700, 1024, 2048, -1024])
def test_a_tar_cut_anywhere_is_noticed(tmp_path, make, keep):
    path = make.tar(tmp_path / "a.tar", make.samples(3))
    with tarfile.open(path) as archive:  # without the zeros that tarfile pads a record with
        end = archive.getmembers()[-1].offset_data + 512
    data = path.read_bytes()[: end + 1024]
    path.write_bytes(data[:keep])
    with pytest.raises(ShardError, match="truncated"):
        open_images(path, size=8)


def test_damaged_headers_and_checksums(tmp_path, make):
    path = make.tar(tmp_path / "a.tar", make.samples(3))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        data[archive.getmembers()[2].offset + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"wrong checksum. 1 samples are readable, up to 0000"):
        open_images(path, size=8)
    (tmp_path / "b.tar.gz").write_bytes(b"no archive at all")
    with pytest.raises(ShardError, match=r"b\.tar\.gz"):
        open_images(tmp_path / "b.tar.gz", size=8)
    data = bytearray(make.tar(tmp_path / "c.tgz", make.samples(3)).read_bytes())
    data[-6] ^= 1  # the sum over the contents
    (tmp_path / "c.tgz").write_bytes(data)
    with pytest.raises(ShardError, match="CRC"):
        open_images(tmp_path / "c.tgz", size=8)


def test_names_that_would_escape_are_only_names(tmp_path, make, small_memory, cache):
    image = make.image(1)
    files = {"../../evil.png": image, "/etc/abs.png": image, "a/../../b.png": image, "..\\c.png": image}
    before = set(tmp_path.parent.rglob("*"))
    (tmp_path / "in").mkdir()
    for name in ("a.tar", "a.tar.gz"):
        dataset = open_images(make.tar(tmp_path / "in" / name, files), size=8)
        assert [dataset[i]["name"] for i in range(4)] == ["evil", "etc/abs", "a/b", "c"]
    new = set(tmp_path.parent.rglob("*")) - before
    assert {path.name for path in new} <= {"in", "a.tar", "a.tar.gz"} | {path.name for path in cache.iterdir()}


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_links_and_folders(tmp_path, make, layout):
    image = make.image(1)
    name = "d" * 90 + "/" + "n" * 60 + ".png" if layout == tarfile.USTAR_FORMAT else "ü" * 200 + ".png"
    with tarfile.open(tmp_path / "a.tar", "w", format=layout) as archive:
        for kind, given in (
            (tarfile.DIRTYPE, "folder.png"),
            (tarfile.SYMTYPE, "link.png"),
            (tarfile.REGTYPE, name),
        ):
            member = tarfile.TarInfo(given)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = len(image) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(image))
    dataset = open_images(tmp_path / "a.tar", size=8)
    assert len(dataset) == 1
    assert dataset.name(0) == name.removesuffix(".png")


def parquet(path, images, labels, *, names=None, label="label", image="image"):
    table = pyarrow.table({image: images, label: labels})
    if names:
        features = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


def test_parquet_of_hugging_face(tmp_path, make):
    images = [{"bytes": make.image(i), "path": f"{i}.png"} for i in range(5)]
    path = parquet(tmp_path / "train-0.parquet", images, [0, 1, 2, 1, 0], names=["cat", "dog", "fox", "owl"])
    dataset = open_images(path, size=8, resize_ratio=1.0)
    assert dataset.classes == ("cat", "dog", "fox", "owl")
    assert dataset.label_counts().tolist() == [2, 2, 1, 0]
    shard = open_images(make.tar(tmp_path / "a.tar", make.samples(5)), size=8, resize_ratio=1.0)
    assert all(torch.equal(dataset[i]["image"], shard[i]["image"]) for i in range(5))
    assert dataset[3]["name"] == "train-0/00000003"


def test_parquet_with_plain_bytes_text_labels_and_a_hole(tmp_path, make, small_memory):
    path = parquet(tmp_path / "a.parquet", [make.image(1), None, make.image(2)], list("bab"), label="cls", image="jpg")
    for _ in range(2):  # unpacked, then found in the cache
        dataset = open_images(path, size=8)
        assert dataset.classes == ("a", "b")
        assert dataset[1]["skipped"] == ("a/00000001",)
        assert dataset[1]["index"] == 2


def test_parquet_troubles(tmp_path, make):
    path = parquet(tmp_path / "a.parquet", [make.image(1)] * 8, [0] * 8)
    data = path.read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[:-20])
    (tmp_path / "bad.parquet").write_bytes(data[:40] + bytes(200) + data[240:])
    for name in ("cut", "bad"):
        with pytest.raises(ShardError, match=rf"{name}\.parquet is (truncated|damaged)"):
            open_images(tmp_path / f"{name}.parquet", size=8)
    with pytest.raises(SourceError, match=r"no image column: looked for image, .* found x, label"):
        open_images(parquet(tmp_path / "b.parquet", [b""], [0], image="x"), size=8)
    with pytest.raises(SourceError, match=r"only names 'far.png'"):
        open_images(parquet(tmp_path / "c.parquet", [{"bytes": None, "path": "far.png"}], [0]), size=8)


def test_a_corrupt_jpeg_in_a_shard(tmp_path, make):
    files = make.samples(4)
    files["0001.png"] = files["0001.png"][:70]
    dataset = open_images(make.tar(tmp_path / "a.tar.gz", files), size=8, resize_ratio=1.0)
    assert dataset[1]["name"] == "0002"
    assert dataset[1]["skipped"] == ("0001",)
    assert dataset.fetch([1, 2])["name"] == ["0002", "0002"]


def test_gzip_of_an_empty_archive(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(1024)))
    with pytest.raises(DatasetError, match="no image in"):
        open_images(tmp_path / "a.tar.gz", size=8)
