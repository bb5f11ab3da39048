"""Many pictures on one: grids with captions, rows to compare, and strips of how a picture forms."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

from nextscale.pictures.still import Picture, Quantise, enlarge, to_pil

_BACKGROUND = (255, 255, 255)
_INK = (32, 36, 44)
_TEXT_SIZE = 13
_WIDEST_CAPTION = 160
_SPELT_OUT = {"×": "x", "–": "-", "—": "-", "→": "->", "≤": "<=", "≥": ">=", "ß": "ss", "ø": "o", "æ": "ae"}


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_TEXT_SIZE)


def _printable(text: object) -> str:
    """`text` in the letters the bundled font has (ASCII); accents go, and what is left over becomes '?'."""
    spelt = "".join(_SPELT_OUT.get(letter, letter) for letter in str(text))
    plain = "".join(c for c in unicodedata.normalize("NFKD", spelt) if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" else "?" for c in plain.replace("\n", " "))


def _fitted(text: str, width: int) -> str:
    """The text, cut short with an ellipsis where it is wider than `width` pixels."""
    font = _font()
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _captions(texts: Iterable[object] | None) -> tuple[list[str], int]:
    """The printable texts, and the width in pixels that shows them (at most `_WIDEST_CAPTION`)."""
    printable = [_printable(text) for text in texts] if texts is not None else []
    widest = max((_font().getlength(text) for text in printable), default=0)
    # Six pixels of air, or neighbouring captions read as one.
    return printable, min(math.ceil(widest) + 6, _WIDEST_CAPTION) if printable else 0


_LINE = _TEXT_SIZE + 5


def _draw_text(sheet: Image.Image, text: str, left: int, top: int, width: int) -> None:
    fitted = _fitted(text, width)
    offset = max(0, (width - math.ceil(_font().getlength(fitted))) // 2)
    ImageDraw.Draw(sheet).text((left + offset, top + 1), fitted, fill=_INK, font=_font())


def contact_sheet(
    images: Iterable[Picture],
    columns: int | None = None,
    labels: Sequence[object] | None = None,
    scale: int = 1,
    padding: int = 2,
    *,
    quantise: Quantise = "round",
) -> Image.Image:
    """Pictures in a grid, row by row, on white, each over its caption.

    images: a batch (N, 3, H, W) or any sequence of pictures (see `to_pil`); smaller ones are centred in their
    cell. columns: None makes the grid about square. labels: one per picture, shown below it in the font that
    ships with Pillow; cells widen for them, up to 160 pixels, and longer ones are cut short. scale: every
    pixel becomes a square of that many pixels, for tiny pictures. padding: pixels between cells and around
    them.
    """
    pictures = [enlarge(to_pil(image, quantise), scale) for image in images]
    if not pictures:
        raise ValueError("no pictures were given; a contact sheet takes at least one")
    if labels is not None and len(labels) != len(pictures):
        raise ValueError(f"{len(labels)} labels were given for {len(pictures)} pictures; expected one each")
    if padding < 0:
        raise ValueError(f"padding is {padding}; expected 0 or more pixels")
    columns = math.ceil(math.sqrt(len(pictures))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns is {columns}; expected 1 or more")
    columns = min(columns, len(pictures))
    captions, caption_width = _captions(labels)
    width = max(caption_width, *(p.width for p in pictures))
    height = max(p.height for p in pictures)
    cell = height + (_LINE if captions else 0)
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + padding) + padding, rows * (cell + padding) + padding), _BACKGROUND)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        left, top = padding + column * (width + padding), padding + row * (cell + padding)
        sheet.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
        if captions:
            _draw_text(sheet, captions[number], left, top + height, width)
    return sheet


def comparison_sheet(
    rows: Sequence[tuple[object, Iterable[Picture]]],
    headings: Sequence[object] | None = None,
    scale: int = 1,
    padding: int = 4,
    *,
    quantise: Quantise = "round",
) -> Image.Image:
    """Rows of pictures to be compared, each behind its caption: a sample and its nearest training images,
    say.

    rows: (caption, pictures); rows may be of different lengths. headings: one per column of pictures, shown
    above. scale and padding: as in `contact_sheet`.
    """
    lines = [(caption, [enlarge(to_pil(p, quantise), scale) for p in pictures]) for caption, pictures in rows]
    columns = max((len(pictures) for _, pictures in lines), default=0)
    if columns == 0:
        raise ValueError("no pictures were given; a comparison sheet takes at least one row with one picture")
    if headings is not None and len(headings) != columns:
        raise ValueError(f"{len(headings)} headings were given for {columns} columns; expected one each")
    captions, caption_width = _captions(caption for caption, _ in lines)
    titles, title_width = _captions(headings)
    everything = [picture for _, pictures in lines for picture in pictures]
    width = max(title_width, *(p.width for p in everything))
    height = max(_LINE, *(p.height for p in everything))
    left_margin = padding + (caption_width + 2 * padding if caption_width else 0)
    top_margin = padding + (_LINE + 2 if titles else 0)
    sheet = Image.new(
        "RGB",
        (left_margin + columns * (width + padding), top_margin + len(lines) * (height + padding)),
        _BACKGROUND,
    )
    for column, title in enumerate(titles):
        _draw_text(sheet, title, left_margin + column * (width + padding), padding, width)
    for row, (caption, (_, pictures)) in enumerate(zip(captions, lines, strict=True)):
        top = top_margin + row * (height + padding)
        text = _fitted(caption, caption_width)
        ImageDraw.Draw(sheet).text((padding, top + (height - _LINE) // 2), text, fill=_INK, font=_font())
        for column, picture in enumerate(pictures):
            left = left_margin + column * (width + padding)
            sheet.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
    return sheet


def scale_strip(
    frames: Iterable[Picture],
    labels: Sequence[object] | None = None,
    scale: int = 1,
    padding: int = 2,
    *,
    quantise: Quantise = "round",
) -> Image.Image:
    """How a picture forms, coarse to fine, side by side: `frames` are what is decoded after each scale.

    labels: one per frame, e.g. "1 x 1", "2 x 2"; scale and padding: as in `contact_sheet`.
    """
    pictures = list(frames)
    return contact_sheet(pictures, max(len(pictures), 1), labels, scale, padding, quantise=quantise)
