"""One web page that shows what was made: opened from disk, without a network, in light or dark."""

from __future__ import annotations

import base64
import html
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from nextscale.pictures.files import free_path, write_file
from nextscale.pictures.still import Picture, png_bytes, to_pil
from nextscale.pictures.style import STYLE

_MEDIA_TYPES = {
    ".png": "image/png",
    ".apng": "image/apng",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
}


@dataclass(frozen=True)
class Figure:
    """A picture with what it shows in words (`alt`, for those who do not see it) and a caption under it.

    image: a picture (see `to_pil`), or the path of a PNG, APNG, GIF, WebP or JPEG file, kept as it is
    (animations move). scale: shown this many times as large, with hard pixel edges where that is more than 1.
    """

    image: Picture | str | os.PathLike[str]
    alt: str
    caption: str = ""
    scale: int = 1


@dataclass(frozen=True)
class Gallery:
    """Figures side by side, as many to a row as fit; each is at least `tile` pixels wide (on a phone too)."""

    figures: Sequence[Figure]
    tile: int = 240


@dataclass(frozen=True)
class Table:
    """A header and rows of cells; columns of numbers are set flush right. `caption` says what the table
    holds.
    """

    header: Sequence[object]
    rows: Sequence[Sequence[object]]
    caption: str = ""


@dataclass(frozen=True)
class Facts:
    """A few figures to be seen first: (label, value, remark)."""

    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Code:
    """Commands or code, set as they are."""

    text: str
    caption: str = ""


Block = str | Figure | Gallery | Table | Facts | Code


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it; a plain string is a paragraph, with `code` between backticks."""

    title: str
    blocks: Sequence[Block]


def write_page(
    path: str | os.PathLike[str],
    title: str,
    sections: Sequence[Section],
    *,
    lead: str = "",
    facts: Facts | None = None,
    footer: str = "",
    embed: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write one HTML page; returns its path, numbered if the name was taken (see `write_file`).

    The page needs no network, no script and no other file, except where `embed` is false: figures given as
    paths are then linked relative to the page rather than taken into it. lead: a sentence under the title.
    facts: figures under the lead. Raises ValueError for a figure without alt text or a file that is no
    picture, OSError where it is missing.
    """
    target = Path(path) if overwrite else free_path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{path}: pages are written as .html; name the file so")
    writer = _Writer(target.parent, embed)
    anchors = _anchors([section.title for section in sections])
    body = "\n".join(
        f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{_text(section.title)}</h2>\n'
        + "\n".join(writer.block(block) for block in section.blocks)
        + "\n</section>"
        for anchor, section in zip(anchors, sections, strict=True)
    )
    contents = ""
    if len(sections) > 2:
        links = "".join(f'<li><a href="#{a}">{_text(s.title)}</a></li>' for a, s in zip(anchors, sections, strict=True))
        contents = f'<nav aria-label="Sections"><ul>{links}</ul></nav>'
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header>
<h1>{_text(title)}</h1>
{f'<p class="lead">{_text(lead)}</p>' if lead else ""}
{writer.block(facts) if facts else ""}
{contents}
</header>
<main id="content">
{body}
</main>
{f"<footer><p>{_text(footer)}</p></footer>" if footer else ""}
</body>
</html>
"""
    return write_file(target, page.encode("utf-8"), overwrite=overwrite)


def _escape(text: object) -> str:
    return html.escape(str(text), quote=True)


def _text(text: object) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _escape(text))


def _anchors(titles: Sequence[str]) -> list[str]:
    anchors: list[str] = []
    for title in titles:
        stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        anchor, number = stem, 1
        # "content" is the main element's.
        while anchor in anchors or anchor == "content":
            number += 1
            anchor = f"{stem}-{number}"
        anchors.append(anchor)
    return anchors


def _is_numeric(cell: object) -> bool:
    return re.match(r"^[-+±<>≤≥~]?\s?[\d.,]+(?![\w-])", str(cell).strip()) is not None or str(cell).strip() in ("", "-")


class _Writer:
    """Blocks as HTML, for a page in `folder`."""

    def __init__(self, folder: Path, embed: bool) -> None:
        self.folder = folder
        self.embed = embed

    def block(self, block: Block) -> str:
        match block:
            case str():
                return f"<p>{_text(block)}</p>"
            case Figure():
                return self.figure(block)
            case Gallery(figures, tile):
                # Small tiles get small captions.
                kind = "gallery small" if tile < 160 else "gallery"
                inside = "\n".join(self.figure(f) for f in figures)
                return f'<div class="{kind}" style="--tile: {tile}px">\n{inside}\n</div>'
            case Table():
                return self.table(block)
            case Facts(items):
                cells = "".join(
                    f"<div><dt>{_text(label)}</dt><dd><b>{_text(value)}</b>"
                    + (f"<span>{_text(remark)}</span>" if remark else "")
                    + "</dd></div>"
                    for label, value, remark in items
                )
                return f'<dl class="facts">{cells}</dl>'
            case Code(text, caption):
                title = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
                # tabindex: what scrolls sideways must be reachable from the keyboard.
                listing = f'<pre tabindex="0"><code>{_escape(text.strip())}</code></pre>'
                return f'<figure class="code">{title}{listing}</figure>'
        raise ValueError(
            f"a section holds a {type(block).__name__}; expected text, Figure, Gallery, Table, Facts or Code"
        )

    def figure(self, figure: Figure) -> str:
        if not figure.alt.strip():
            raise ValueError("a figure has no alt text; say in words what it shows")
        source, still, (width, height) = self.source(figure.image)
        if figure.scale < 1:
            raise ValueError(f"scale is {figure.scale}; expected a whole number of 1 or more")
        pixels = ' class="pixels"' if figure.scale > 1 else ""
        caption = f"<figcaption>{_text(figure.caption)}</figcaption>" if figure.caption else ""
        shown = width * figure.scale
        picture = (
            f'<img{pixels} src="{source}" alt="{_escape(figure.alt)}" width="{shown}" height="{height * figure.scale}">'
        )
        if still:
            calm = f'<source media="(prefers-reduced-motion: reduce)" srcset="{still}">'
            picture = f"<picture>{calm}{picture}</picture>"
        return f'<figure class="picture" style="--width: {shown}px">{picture}{caption}</figure>'

    def source(self, image: Picture | str | os.PathLike[str]) -> tuple[str, str, tuple[int, int]]:
        """The src attribute, that of an animation's last frame ("" for a still), and the size in pixels."""
        if not isinstance(image, (str, os.PathLike)):
            picture = to_pil(image)
            return _data_url(png_bytes(picture), "image/png"), "", picture.size
        path = Path(image)
        media_type = _MEDIA_TYPES.get(path.suffix.lower())
        if media_type is None:
            raise ValueError(f"{path}: expected a picture file, one of {', '.join(_MEDIA_TYPES)}")
        content = path.read_bytes()
        try:
            with Image.open(io.BytesIO(content)) as opened:
                size, frames, still = opened.size, getattr(opened, "n_frames", 1), ""
                if frames > 1:
                    opened.seek(frames - 1)
                    still = _data_url(png_bytes(opened.convert("RGB")), "image/png")
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{path} cannot be read as a picture: {error}") from error
        if self.embed:
            return _data_url(content, media_type), still, size
        return quote(os.path.relpath(path, self.folder).replace(os.sep, "/")), still, size

    def table(self, table: Table) -> str:
        columns = len(table.header)
        for number, row in enumerate(table.rows):
            if len(row) != columns:
                raise ValueError(f"row {number} of a table has {len(row)} cells under {columns} headings")
        right = [
            bool(table.rows) and column > 0 and all(_is_numeric(row[column]) for row in table.rows)
            for column in range(columns)
        ]

        def cell(content: object, column: int, scope: str) -> str:
            name, attributes = ("th", f' scope="{scope}"') if scope else ("td", "")
            flush = ' class="number"' if right[column] else ""
            return f"<{name}{attributes}{flush}>{_text(content)}</{name}>"

        caption = f"<caption>{_text(table.caption)}</caption>" if table.caption else ""
        head = "".join(cell(content, column, "col") for column, content in enumerate(table.header))
        body = "\n".join(
            "<tr>" + "".join(cell(c, column, "" if column else "row") for column, c in enumerate(row)) + "</tr>"
            for row in table.rows
        )
        label = _escape(table.caption or "Table")
        return (
            f'<div class="table" role="region" aria-label="{label}" tabindex="0"><table>{caption}'
            f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
        )


def _data_url(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
