"""Published datasets are found by their folders, and what is missing or damaged is told all at once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.datasets.decoding import decode
from nextscale.datasets.degradations import PRESETS, Mixture, parse_steps
from nextscale.datasets.paired_layouts import LAYOUTS
from nextscale.datasets.pairs import PairError, check_pairs, find_pairs, fitted, read_rgb
from nextscale.datasets.restoration import RestorationSource, open_restoration


def image(path: Path, width: int = 24, height: int = 20, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)


TREES = {
    # dataset: (degraded, clean, decoys)
    "gopro": ("test/GOPR01/blur/000001.png", "test/GOPR01/sharp/000001.png", ["test/GOPR01/blur_gamma/000001.png"]),
    "gopro/train": ("train/input/a.png", "train/target/a.png", []),
    "lol": ("eval15/low/1.png", "eval15/high/1.png", ["our485/low/2.png"]),
    "lol/train": ("our485/low/2.png", "our485/high/2.png", []),
    "sidd/train": ("Data/0001_001_S6/0001_NOISY_SRGB_010.PNG", "Data/0001_001_S6/0001_GT_SRGB_010.PNG", []),
    "sidd": ("val/input_crops/0001-0.png", "val/target_crops/0001-0.png", []),
    "rain13k/train": ("train/Rain13K/input/1.jpg", "train/Rain13K/target/1.jpg", []),
    "rain100l": ("rain/X2/norain-001x2.png", "norain/norain-001.png", []),
    "rain100h": ("rainy/rain-001.png", "norain-001.png", []),
    "test1200": ("test/Test1200/input/1.png", "test/Test1200/target/1.png", []),
    "reside/outdoor": ("SOTS/outdoor/hazy/0001_0.8_0.2.jpg", "SOTS/outdoor/gt/0001.png", []),
    "reside/indoor": ("indoor/hazy/1400_1.png", "indoor/gt/1400.png", []),
    "reside/ots": ("OTS/hazy/part1/0005_0.8_0.04.jpg", "OTS/clear/0005.jpg", []),
    "reside/its": ("hazy/1_1_0.90179.png", "clear/1.png", ["trans/1_1.png"]),
    "snow100k/large": ("Snow100K-L/synthetic/a.jpg", "Snow100K-L/gt/a.jpg", ["Snow100K-L/mask/a.jpg"]),
    "outdoor-rain": ("test1/input/im_0001_s80_a04.png", "test1/gt/im_0001.png", []),
    "outdoor-rain/train": ("in/im_0001_s80_a04.png", "gt/im_0001.png", []),
    "raindrop": ("test_a/data/0_rain.png", "test_a/gt/0_clean.png", []),
    "div2k/x4": ("DIV2K_valid_LR_bicubic/X4/0801x4.png", "DIV2K_valid_HR/0801.png", []),
    "div2k-train/x2": ("DIV2K_train_LR_bicubic/X2/0001x2.png", "DIV2K_train_HR/0001.png", []),
    "wed": (None, "pristine_images/00001.bmp", []),
    "set5": (None, "image_SRF_2/img_001_SRF_2_HR.png", ["image_SRF_2/img_001_SRF_2_LR.png"]),
    "bsd68": (None, "CBSD68/original_png/0000.png", ["CBSD68/readme.txt"]),
    "div2k/clean": (None, "DIV2K_valid_HR/0801.png", ["DIV2K_valid_LR_bicubic/X2/0801x2.png"]),
}


@pytest.mark.parametrize("name", TREES)
def test_layouts(name: str, tmp_path: Path) -> None:
    degraded, clean, decoys = TREES[name]
    for file in filter(lambda f: f and not f.endswith("txt"), (degraded, clean, *decoys)):
        image(tmp_path / file)
    pairs = find_pairs(f"{name}:{tmp_path}")
    (pair,) = pairs.items
    below = "CBSD68/original_png" if name == "bsd68" else ""
    assert pair.clean == tmp_path / clean and below in str(pair.clean)
    assert pair.degraded == (tmp_path / degraded if degraded else None)
    split = LAYOUTS[name.partition("/")[0]].splits[name.partition("/")[2] or "test"]
    assert bool(pairs.notes) == (split.count is not None) and all("published" in note for note in pairs.notes)
    if split.smaller:
        with pytest.raises(PairError, match=r"not of the sizes expected: .*\(24 x 20, clean 24 x 20\)"):
            check_pairs(pairs)
        image(tmp_path / clean, 24 * split.smaller, 20 * split.smaller)
    check_pairs(pairs)


def test_every_layout_is_tested() -> None:
    alike = {"test100", "test2800", "flickr2k", "bsd400", "kodak24", "mcmaster", "set14", "b100", "urban100"}
    assert set(LAYOUTS) - alike == {name.partition("/")[0] for name in TREES}


def test_two_folders(tmp_path: Path) -> None:
    for name in ("a.png", "deep/b.png"):
        image(tmp_path / "in" / name)
        image((tmp_path / "out" / name).with_suffix(".bmp"))
    pairs = find_pairs(f"{tmp_path}/in,{tmp_path}/out")
    assert [pair.name for pair in pairs.items] == ["a", "deep/b"] and not pairs.clean_only
    image(tmp_path / "in/c.png")
    image(tmp_path / "out/d.png")
    with pytest.raises(PairError, match=r"1 without a clean image in .*: c; 1 without a degraded image in .*: d\."):
        find_pairs(f"{tmp_path}/in,{tmp_path}/out")
    by_order = find_pairs(f"sorted:{tmp_path}/in,{tmp_path}/out")
    assert [(p.degraded.name, p.clean.name) for p in by_order.items][1] == ("c.png", "d.png")
    image(tmp_path / "in/e.png")
    with pytest.raises(PairError, match=r"4 images and .* 3; expected equally many"):
        find_pairs(f"sorted:{tmp_path}/in,{tmp_path}/out")
    with pytest.raises(PairError, match=r"no folder: .*nowhere"):
        find_pairs(f"{tmp_path}/in,{tmp_path}/nowhere")


def test_clean_images(tmp_path: Path) -> None:
    image(tmp_path / "photos/a.png")
    pairs = find_pairs(str(tmp_path / "photos"))
    assert pairs.clean_only and pairs.items[0].name == "a"
    assert find_pairs(str(tmp_path / "photos/a.png")).items[0].clean == tmp_path / "photos/a.png"
    with pytest.raises(PairError, match="no such folder"):
        find_pairs(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(PairError, match="holds no image"):
        find_pairs(str(tmp_path / "empty"))


def test_wrong_names_are_told(tmp_path: Path) -> None:
    image(tmp_path / "other/a.png")
    with pytest.raises(ValueError, match="'gopr' is no dataset with a layout known here; there are gopro"):
        find_pairs(f"gopr:{tmp_path}")
    with pytest.raises(ValueError, match="no part 'val'; it has train, test"):
        find_pairs(f"gopro/val:{tmp_path}")
    with pytest.raises(ValueError, match="several parts: name one, such as reside/ots"):
        find_pairs(f"reside:{tmp_path}")
    with pytest.raises(PairError, match="does not look like lol"):
        find_pairs(f"lol:{tmp_path}")


def test_all_that_is_wrong_is_listed(tmp_path: Path) -> None:
    for number in range(4):
        image(tmp_path / f"eval15/low/{number}.png", seed=number)
        image(tmp_path / f"eval15/high/{number}.png", 24 if number != 3 else 30, seed=number)
    for name in ("low/0.png", "high/1.png"):
        path = tmp_path / "eval15" / name
        path.write_bytes(path.read_bytes()[:-40])
    (tmp_path / "eval15/low/2.png").write_bytes(b"no picture")
    pairs = find_pairs(f"lol:{tmp_path}")
    seen = []
    for whole in (True, False):
        with pytest.raises(PairError) as caught:
            check_pairs(pairs, whole=whole, progress=lambda done, total: seen.append((done, total)))
        text = str(caught.value)
        assert "3 files cannot be read" in text and "1 pairs are not of the sizes expected: eval15" not in text
        assert all(name in text for name in ("low/0.png", "high/1.png", "low/2.png", "low/3 (24 x 20, clean 30 x 20)"))
    assert seen[-1] == (4, 4)
    (tmp_path / "eval15/high/2.png").unlink()
    with pytest.raises(PairError, match=r"1 of 4 images have no clean image: low/2.png \(expected high/2"):
        find_pairs(f"lol:{tmp_path}")


def test_larger_clean_images_are_fitted(tmp_path: Path) -> None:
    image(tmp_path / "hazy/1_1.png", 20, 12)
    image(tmp_path / "gt/1.png", 40, 32)
    pairs = find_pairs(f"reside/indoor:{tmp_path}")
    check_pairs(pairs)
    clean = read_rgb(tmp_path / "gt/1.png").float()
    assert torch.equal(fitted(clean, (12, 20), pairs.fit), clean[:, 10:22, 10:30])
    assert fitted(clean, (12, 20), find_pairs(f"reside/outdoor:{tmp_path}").fit).shape == (3, 12, 20)
    with pytest.raises(ValueError, match="40 x 32 pixels, the degraded one 20 x 12"):
        fitted(clean, (12, 20), None)


def test_pixels_are_read_as_they_are(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png").dtype == torch.uint8
    deep = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    found = read_rgb(tmp_path / "deep.png")
    assert found.shape == (3, 8, 8) and found[1, 0, 1].item() == pytest.approx(1024 / 65535)
    (tmp_path / "bad.png").write_bytes(b"x")
    with pytest.raises(PairError, match=r"bad\.png cannot be decoded"):
        read_rgb(tmp_path / "bad.png")
    assert decode((tmp_path / "a.png").read_bytes())[0].size == (24, 20)


# --- training -----------------------------------------------------------------------------------------


def test_crops_of_pairs_match(tmp_path: Path) -> None:
    for number in range(3):
        image(tmp_path / f"in/{number}.png", 40, 30, seed=number)
        image(tmp_path / f"out/{number}.png", 40, 30, seed=number)
    source = RestorationSource(f"{tmp_path}/in,{tmp_path}/out")
    dataset = open_restoration([source], size=16, flip=True, rotate=True, seed=4)
    assert len(dataset) == 3 and [dataset[i]["name"] for i in range(3)] == ["0", "1", "2"]
    views = [dataset[(epoch, 1)] for epoch in range(6)]
    assert all(torch.equal(view["clean"], view["degraded"]) for view in views)
    assert len({view["clean"].numpy().tobytes() for view in views}) == 6
    assert views[0]["clean"].shape == (3, 16, 16) and -1 <= views[0]["clean"].min() < 0 < views[0]["clean"].max() <= 1
    again = open_restoration([source], size=16, flip=True, rotate=True, seed=4)
    assert torch.equal(again[(3, 1)]["clean"], views[3]["clean"])
    # Smaller images are continued by reflection, both alike.
    large = open_restoration([source], size=64)[2]
    assert large["clean"].shape == (3, 64, 64) and torch.equal(large["clean"], large["degraded"])


def test_sources_are_drawn_by_weight(tmp_path: Path) -> None:
    image(tmp_path / "in/pair.png", 32, 32)
    image(tmp_path / "out/pair.png", 32, 32)
    for number in range(5):
        image(tmp_path / f"photos/{number}.png", 32, 32, seed=number)
    mixture = Mixture({"noise": PRESETS["noise25"], "small": PRESETS["sr3"]})
    sources = [
        RestorationSource(f"{tmp_path}/in,{tmp_path}/out", weight=3.0),
        RestorationSource(str(tmp_path / "photos"), mixture),
    ]
    dataset = open_restoration(sources, size=16, length=200)
    samples = [dataset[i] for i in range(200)]
    share = sum(sample["name"] == "pair" for sample in samples) / 200
    assert 0.65 < share < 0.85
    made = [sample for sample in samples if sample["name"] != "pair"]
    assert {sample["kind"] for sample in made} == {"noise", "small"}
    assert all(sample["clean"].shape == sample["degraded"].shape == (3, 16, 16) for sample in made)
    assert all(not torch.equal(sample["clean"], sample["degraded"]) for sample in made)
    # Validation goes through all images in turn.
    held_out = open_restoration(sources, size=16, crop=False)
    assert [held_out[i]["name"] for i in range(6)] == ["pair", "0", "1", "2", "3", "4"]


def test_crops_are_cut_from_larger_degraded_regions(tmp_path: Path) -> None:
    """Of a grey photograph, JPEG's noise and haze of a region show in a crop as they do in a tile of a photograph."""
    image(tmp_path / "photos/a.png", 96, 96)
    hazy = Mixture({"haze": parse_steps("hazy")})
    source = RestorationSource(str(tmp_path / "photos"), hazy)

    def rise(region: int | None) -> float:
        """By how much more haze there is in a crop's first row than in its last, of the airlight; mean of 40."""
        dataset, found = open_restoration([source], size=16, region=region, seed=1), []
        for epoch in range(40):
            sample = dataset[(epoch, 0)]
            assert sample["clean"].shape == sample["degraded"].shape == (3, 16, 16)
            change = (sample["degraded"] - sample["clean"]).abs().mean((0, 2))
            found.append(float(change[:4].mean() - change[-4:].mean()))
        return sum(found) / len(found)

    assert rise(None) > 2 * abs(rise(96))
    large, small = (open_restoration([source], size=16, region=side, seed=3) for side in (96, 16))
    assert not torch.equal(large[0]["clean"], small[0]["clean"])
    assert torch.equal(small[0]["degraded"], open_restoration([source], size=16, seed=3)[0]["degraded"])
    # Or the region as a whole, made small: haze then rises over all of it again.
    views = open_restoration([source], size=16, region=96, shrunk=1.0, seed=1)[0]
    assert views["clean"].shape == (3, 16, 16)
    with pytest.raises(ValueError, match="region is 15"):
        open_restoration([source], size=16, region=15)


def test_smaller_images_are_enlarged(tmp_path: Path) -> None:
    image(tmp_path / "in/a.png", 10, 8)
    image(tmp_path / "out/a.png", 30, 24)
    sample = open_restoration([RestorationSource(f"{tmp_path}/in,{tmp_path}/out", scale=3)], size=24)[0]
    assert sample["degraded"].shape == (3, 24, 24)


def test_all_sources_are_checked_before_training(tmp_path: Path) -> None:
    image(tmp_path / "photos/a.png")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/b.png").write_bytes(b"\x89PNG but no more")
    mixture = Mixture({"noise": PRESETS["noise25"]})
    photos, bad = str(tmp_path / "photos"), str(tmp_path / "bad")
    with pytest.raises(ValueError, match="no degraded images: give its degradation"):
        open_restoration([RestorationSource(photos)])
    with pytest.raises(PairError, match=r"no such folder.*b\.png \(was cut short\)"):
        open_restoration([RestorationSource(photos + "x", mixture), RestorationSource(bad, mixture)])
    with pytest.raises(ValueError, match="degraded images of its own"):
        open_restoration([RestorationSource(f"{photos},{photos}", mixture)])
    with pytest.raises(ValueError, match="weight is 0"):
        RestorationSource(photos, weight=0)
    with pytest.raises(IndexError):
        open_restoration([RestorationSource(photos, mixture)])[1]
