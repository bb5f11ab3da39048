"""Where published restoration datasets keep their degraded and clean images, relative to the folder a user names.

A rule is a pattern of degraded files and where each one's clean file is, without its suffix (``\\1`` as in
:func:`re.sub`). Every dataset has the rule of its own archive first, and the flat folders into which the literature's
code commonly sorts it after that. Counts are the published ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rule:
    """Attributes:

    degraded: regular expression that a degraded file's path matches whole; of datasets without degraded files, a clean
        file's.
    clean: paths without suffix of its clean file, of which one has to be there; none where there are only clean files.
    """

    degraded: str
    clean: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """Attributes:

    rules: tried in turn, the first that matches a file counts.
    below: folders in which the split may lie, tried in turn; the first that matches counts.
    count: images published.
    fit: where clean images are larger than degraded ones: ``crop`` their borders, or ``resize`` them, as the dataset's
        own evaluation does.
    smaller: how many times fewer rows and columns degraded images have, in super-resolution.
    """

    rules: tuple[Rule, ...]
    below: tuple[str, ...] = ("",)
    count: int | None = None
    fit: Literal["crop", "resize"] | None = None
    smaller: int | None = None


@dataclass(frozen=True)
class Layout:
    """Attributes:

    task: what is restored.
    splits: by name; ``test`` is taken unless another is named.
    """

    task: str
    splits: dict[str, Split]


_FILE = r"([^/]+)\.\w+"
_FLAT = Rule(f"input/{_FILE}", (r"target/\1", r"gt/\1"))
_ALL_CLEAN = Rule(rf"(?:.*/)?{_FILE}")


def _clean(task: str, count: int, *below: str) -> Layout:
    """Only clean images, to be degraded on the fly. SelfExSR's copies lie beside their low-resolution images."""
    rules = (Rule(r"image_SRF_2/img_\d+_SRF_2_HR\.\w+"), _ALL_CLEAN)
    return Layout(task, {"test": Split(rules, ("", *below), count)})


def _srgb(*below: str, count: int | None) -> Split:
    noisy = Rule(r"(.*)NOISY_SRGB(_\d+)?\.\w+", (r"\1GT_SRGB\2",))
    return Split((noisy, Rule(f"input_crops/{_FILE}", (r"target_crops/\1",)), _FLAT), below, count)


def _div2k(part: str, count: int) -> dict[str, Split]:
    found = {}
    for scale in (2, 3, 4):
        low = Rule(rf"DIV2K_{part}_LR_bicubic/X{scale}/(\d+)x{scale}\.\w+", (rf"DIV2K_{part}_HR/\1",))
        found[f"x{scale}"] = Split((low,), count=count, smaller=scale)
    found["clean"] = Split((Rule(rf"DIV2K_{part}_HR/\d+\.\w+"),), count=count)
    return found


def _rain(name: str, count: int) -> Layout:
    """JORDER's archives, their numbered copies (rain-001 and norain-001), and flat folders."""
    rules = (
        Rule(r"rain/X2/(.+)x2\.\w+", (r"norain/\1",)),
        Rule(r"(.*/)?rainy/rain-(\d+)\.\w+", (r"\1norain-\2", r"\1gt/norain-\2")),
        Rule(r"(.*/)?rain-(\d+)\.\w+", (r"\1norain-\2",)),
        _FLAT,
    )
    return Layout("rain", {"test": Split(rules, ("", name, f"test/{name}"), count)})


_RESIDE = Rule(r"hazy/(?:part\d+/)?([^/_]+)_[^/]+\.\w+", (r"gt/\1", r"clear/\1"))
_SNOW = Rule(f"synthetic/{_FILE}", (r"gt/\1",))

LAYOUTS: dict[str, Layout] = {
    "gopro": Layout(
        "motion blur",
        {
            name: Split((Rule(rf"([^/]+)/blur/{_FILE}", (r"\1/sharp/\2",)), _FLAT), (name, ""), count)
            for name, count in (("train", 2103), ("test", 1111))
        },
    ),
    "lol": Layout(
        "low light",
        {
            name: Split((Rule(f"low/{_FILE}", (r"high/\1",)), _FLAT), (folder, ""), count)
            for name, folder, count in (("train", "our485", 485), ("test", "eval15", 15))
        },
    ),
    "sidd": Layout(
        "real noise",
        {
            "train": _srgb("Data", "train", "", count=320),
            "test": _srgb("val", "test", "", count=1280),
        },
    ),
    "rain13k": Layout("rain", {"train": Split((_FLAT,), ("train/Rain13K", "train", ""), 13712)}),
    "rain100l": _rain("Rain100L", 100),
    "rain100h": _rain("Rain100H", 100),
    "test100": _rain("Test100", 98),
    "test1200": _rain("Test1200", 1200),
    "test2800": _rain("Test2800", 2800),
    "reside": Layout(
        "haze",
        {
            "ots": Split((_RESIDE,), ("OTS", ""), 72135),
            "its": Split((_RESIDE,), ("ITS", "")),
            "outdoor": Split((_RESIDE,), ("SOTS/outdoor", "outdoor", ""), 500, "resize"),
            "indoor": Split((_RESIDE,), ("SOTS/indoor", "indoor", ""), 500, "crop"),
        },
    ),
    "snow100k": Layout(
        "snow",
        {
            "train": Split((_SNOW,), ("all", "train", ""), 50000),
            "small": Split((_SNOW,), ("test/Snow100K-S", "Snow100K-S", ""), 16611),
            "medium": Split((_SNOW,), ("test/Snow100K-M", "Snow100K-M", ""), 16588),
            "large": Split((_SNOW,), ("test/Snow100K-L", "Snow100K-L", ""), 16801),
        },
    ),
    "outdoor-rain": Layout(
        "rain and haze",
        {
            "train": Split((Rule(r"in/(im_\d+)_[^/]+\.\w+", (r"gt/\1",)), _FLAT), ("train", ""), 9000),
            "test": Split((Rule(r"input/(im_\d+)_[^/]+\.\w+", (r"gt/\1",)), _FLAT), ("test1", "test", ""), 750),
        },
    ),
    "raindrop": Layout(
        "drops on the lens",
        {
            name: Split((Rule(r"data/(\d+)_rain\.\w+", (r"gt/\1_clean",)),), below)
            for name, below in (("train", ("train", "")), ("test", ("test_a", "test", "")))
        },
    ),
    "div2k": Layout("fewer pixels", {**_div2k("valid", 100)}),
    "div2k-train": Layout("fewer pixels", {**_div2k("train", 800)}),
    "flickr2k": _clean("clean photographs", 2650, "Flickr2K_HR"),
    "wed": _clean("clean photographs", 4744, "exploration_database_and_code/pristine_images", "pristine_images"),
    "bsd400": _clean("clean photographs", 400),
    "bsd68": _clean("clean photographs", 68, "CBSD68/original_png", "original_png"),
    "kodak24": _clean("clean photographs", 24),
    "mcmaster": _clean("clean photographs", 18),
    "set5": _clean("clean photographs", 5),
    "set14": _clean("clean photographs", 14),
    "b100": _clean("clean photographs", 100),
    "urban100": _clean("clean photographs", 100),
}
"""Datasets by name."""
