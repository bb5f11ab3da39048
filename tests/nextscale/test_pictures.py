"""Pictures as files: exact bytes, names that do not replace others, sheets, animations and the page."""

import base64
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from nextscale.pictures import (
    Code,
    Facts,
    Figure,
    Gallery,
    Section,
    Table,
    animate,
    comparison_sheet,
    contact_sheet,
    save_png,
    save_pngs,
    scale_strip,
    to_pil,
    write_file,
    write_page,
)


def pictures(count: int, side: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_rounding_and_truncation_to_bytes() -> None:
    values = torch.tensor([0.0, 0.4 / 255, 0.5 / 255, 0.6 / 255, 1.5 / 255, 254.4 / 255, 254.6 / 255, 1.0])
    picture = values.reshape(1, 1, 8).expand(3, 1, 8)
    assert np.asarray(to_pil(picture))[0, :, 0].tolist() == [0, 0, 1, 1, 2, 254, 255, 255]
    assert np.asarray(to_pil(picture, "truncate"))[0, :, 0].tolist() == [0, 0, 0, 0, 1, 254, 254, 255]
    every_byte = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, 16, 16)
    assert (np.asarray(to_pil(every_byte.float() / 255))[..., 1].ravel() == np.arange(256)).all()
    assert np.array_equal(np.asarray(to_pil(every_byte)), np.asarray(to_pil(every_byte.float() / 255)))


def test_a_png_holds_the_picture_and_slight_excess_is_clamped(tmp_path: Path) -> None:
    picture = pictures(1)[0]
    path = save_png((picture * 1.0005).to(torch.bfloat16).requires_grad_(), tmp_path / "new" / "a.png")
    with Image.open(path) as stored:
        assert (stored.mode, stored.size) == ("RGB", (8, 8))
        difference = np.asarray(stored).transpose(2, 0, 1) / 255 - picture.numpy()
    assert np.abs(difference).max() < 0.005


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (torch.rand(3, 4, 4) * 2 - 1, r"map \[-1, 1\] by"),
        (torch.full((3, 4, 4), torch.nan), "values from nan"),
        (torch.rand(4, 4, 3), r"shape \(4, 4, 3\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "int64; expected floats"),
        ([[0.5]], "picture is a list"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, picture: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_png(picture, tmp_path / "a.png")
    assert names(tmp_path) == []


def test_taken_names_get_numbers_and_only_overwriting_replaces(tmp_path: Path) -> None:
    first, second = pictures(2)
    paths = [save_png(first, tmp_path / "a.png") for _ in range(3)]
    assert [p.name for p in paths] == ["a.png", "a-0001.png", "a-0002.png"]
    assert save_png(second, tmp_path / "a.png", overwrite=True) == tmp_path / "a.png"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(to_pil(second)))
    assert names(tmp_path) == ["a-0001.png", "a-0002.png", "a.png"]
    assert [p.name for p in save_pngs(pictures(2), tmp_path / "many")] == ["image-0000.png", "image-0001.png"]
    (tmp_path / "many" / "image-0000.png").unlink()
    assert [p.name for p in save_pngs(pictures(1), tmp_path / "many")] == ["image-0002.png"]
    with pytest.raises(ValueError, match="written as PNG"):
        save_png(first, tmp_path / "a.jpg")


def test_a_name_taken_at_the_last_moment_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def other_was_first(source: str, target: Path) -> None:
        if target.name == "a.txt":
            target.write_text("theirs")
        link(source, target)

    monkeypatch.setattr(os, "link", other_was_first)
    assert write_file(tmp_path / "a.txt", b"ours").name == "a-0001.txt"
    assert (tmp_path / "a.txt").read_text() == "theirs"


def test_without_hard_links_files_are_written_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(source: str, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    assert [write_file(tmp_path / "a.txt", b"x").name for _ in range(2)] == ["a.txt", "a-0001.txt"]
    assert names(tmp_path) == ["a-0001.txt", "a.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool) -> None:
    write_file(tmp_path / "a.txt", b"before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "a.txt", b"after", overwrite=overwrite)
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_bytes() == b"before"


def test_files_have_the_rights_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    assert write_file(tmp_path / "a", b"").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_contact_sheet_places_pictures_row_by_row_with_hard_pixels() -> None:
    images = pictures(5, side=4)
    sheet = np.asarray(contact_sheet(images, columns=3, scale=2, padding=3))
    assert sheet.shape == (3 + 2 * 11, 3 + 3 * 11, 3)
    fourth = sheet[14:22, 3:11]
    assert np.array_equal(fourth, np.asarray(to_pil(images[3])).repeat(2, 0).repeat(2, 1))
    assert (sheet[14:22, 25:33] == 255).all()
    assert contact_sheet(images, padding=0).size == (12, 8)


def test_captions_widen_cells_and_are_drawn_under_their_picture() -> None:
    images = torch.zeros(2, 3, 16, 16)
    sheet = contact_sheet(images, columns=2, labels=["automobile", 7], padding=2)
    width = (sheet.width - 6) // 2
    assert width > 60
    under = np.asarray(sheet)[2 + 16 : -2]
    assert under[:, 2 : 2 + width].min() < 100
    ink = (under[:, 4 + width :].min(axis=(0, 2)) < 128).nonzero()[0]
    assert abs(ink.mean() - width / 2) < 3
    long = contact_sheet(images[:1], labels=["a caption that is far too long for any cell of a sheet"])
    assert long.width <= 164
    # Letters the bundled font lacks are spelt out: no empty boxes.
    assert np.array_equal(
        np.asarray(contact_sheet(images[:1], labels=["3×3 é"])),
        np.asarray(contact_sheet(images[:1], labels=["3x3 e"])),
    )


def test_sheets_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="no pictures"):
        contact_sheet([])
    with pytest.raises(ValueError, match="1 labels were given for 2 pictures"):
        contact_sheet(pictures(2), labels=["a"])
    with pytest.raises(ValueError, match="columns is 0"):
        contact_sheet(pictures(2), columns=0)
    with pytest.raises(ValueError, match="scale is 0"):
        contact_sheet(pictures(2), scale=0)
    with pytest.raises(ValueError, match="1 headings were given for 2 columns"):
        comparison_sheet([("a", pictures(2))], headings=["sample"])


def test_a_comparison_sheet_has_a_row_per_caption() -> None:
    images = pictures(5, side=24)
    sheet = comparison_sheet([("ship", images[:3]), ("truck", images[3:])], ["sample", "1", "2"], padding=4)
    pixels = np.asarray(sheet)
    for index, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        picture = np.asarray(to_pil(images[index]))
        windows = np.lib.stride_tricks.sliding_window_view(pixels, picture.shape)[:, :, 0]
        places = np.argwhere((windows == picture).all(axis=(2, 3, 4)))
        assert len(places) == 1, (row, column)
    with pytest.raises(ValueError, match="at least one row"):
        comparison_sheet([])


def test_a_scale_strip_is_one_row() -> None:
    assert scale_strip(pictures(4, side=8), padding=1).size == (4 * 9 + 1, 10)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".apng"])
def test_animations_hold_every_frame_and_the_last_one_longer(tmp_path: Path, suffix: str) -> None:
    frames = pictures(3, side=6)
    path = animate(frames, tmp_path / f"scales{suffix}", 0.25, hold=1.5, scale=2)
    with Image.open(path) as animation:
        assert animation.size == (12, 12)
        assert animation.info["loop"] == 0
        durations = []
        for frame, expected in zip(ImageSequence.Iterator(animation), frames, strict=True):
            frame.load()
            durations.append(frame.info["duration"])
            original = np.asarray(to_pil(expected)).repeat(2, 0).repeat(2, 1)
            assert np.array_equal(np.asarray(frame.convert("RGB")), original)
    assert durations == [250, 250, 1500]
    assert animate(frames, path).name == f"scales-0001{suffix}"


def test_animations_refuse_other_formats_and_frames_of_several_sizes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'\.mp4' is no animation"):
        animate(pictures(2), tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"frames have sizes \[\(4, 4\), \(8, 8\)\]"):
        animate([pictures(1, 4)[0], pictures(1, 8)[0]], tmp_path / "a.gif")
    with pytest.raises(ValueError, match="no frames"):
        animate([], tmp_path / "a.gif")
    assert names(tmp_path) == []


class Outline(HTMLParser):
    """Elements with their attributes, open ones checked to be closed in order."""

    void = frozenset({"meta", "img", "source", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_a_page_stands_alone_and_escapes_what_it_is_given(tmp_path: Path) -> None:
    moving = animate(pictures(3), tmp_path / "scales.gif")
    path = write_page(
        tmp_path / "index.html",
        "Samples <1>",
        [
            Section(
                "Samples",
                ["Drawn by `var`, seed & all.", Gallery([Figure(pictures(1)[0], 'a "ship"', "ship")], 90)],
            ),
            Section("Samples", [Figure(moving, "forming", scale=3)]),
            Section("Figures", [Table(["Figure", "Value"], [["Recall", "0.71 (2,000)"], ["FID", 4]], "Counts")]),
            Section("Code", [Code("nextscale generate <x>", "Shell"), Facts([("Time", "3 s", "on two cores")])]),
        ],
        lead="A lead.",
        footer="The end.",
    )
    page = path.read_text(encoding="utf-8")
    outline = Outline(page)
    for image in outline.all("img"):
        assert image["alt"]
        assert (image["src"] or "").startswith("data:image/")
    assert not outline.all("script")
    assert not re.search(r"https?:|url\(|@import", page)
    assert "Samples &lt;1&gt;" in page
    assert "<code>var</code>, seed &amp; all." in page
    assert [a["href"] for a in outline.all("a")][1:] == ["#samples", "#samples-2", "#figures", "#code"]
    assert {h["id"] for h in outline.all("h2")} == {"samples", "samples-2", "figures", "code"}
    assert "nextscale generate &lt;x&gt;" in page
    assert page.count('class="number"') == 3
    assert "prefers-color-scheme: dark" in page
    # Who asked for less motion gets the animation's last frame.
    still = outline.all("source")[0]
    assert still["media"] == "(prefers-reduced-motion: reduce)"
    content = base64.b64decode((still["srcset"] or "").split(",")[1])
    assert np.asarray(Image.open(io.BytesIO(content))).shape == (8, 8, 3)
    assert (outline.all("img")[1]["width"], outline.all("img")[1]["class"]) == ("24", "pixels")


def test_a_page_can_link_its_pictures_and_keeps_an_older_page(tmp_path: Path) -> None:
    picture = save_png(pictures(1)[0], tmp_path / "out" / "a b.png")
    sections = [Section("Samples", [Figure(picture, "noise")])]
    first = write_page(tmp_path / "out" / "pages" / "index.html", "t", sections, embed=False)
    assert Outline(first.read_text()).all("img")[0]["src"] == "../a%20b.png"
    assert write_page(first, "t", sections).name == "index-0001.html"
    assert write_page(first, "t", sections, overwrite=True) == first


def test_a_page_refuses_what_it_cannot_show(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    cases: list[tuple[object, type[Exception], str]] = [
        (Figure(pictures(1)[0], " "), ValueError, "no alt text"),
        (Figure(tmp_path / "broken.png", "x"), ValueError, "cannot be read as a picture"),
        (Figure(tmp_path / "absent.png", "x"), FileNotFoundError, "absent"),
        (Figure(tmp_path / "notes.txt", "x"), ValueError, "expected a picture file"),
        (Table(["a", "b"], [["1"]]), ValueError, "1 cells under 2 headings"),
        (3, ValueError, "a section holds a int"),
    ]
    for block, error, message in cases:
        with pytest.raises(error, match=message):
            write_page(tmp_path / "index.html", "t", [Section("s", [block])])  # type: ignore[list-item]
    assert names(tmp_path) == ["broken.png"]
