"""What a person looks at: PNG files, contact sheets, animations of the scales, and a page that shows them.

Nothing here overwrites a file unless asked: a name that is taken gets a number. Every file appears whole or
not at all.
"""

from nextscale.pictures.animation import animate
from nextscale.pictures.depth import depth_picture, depth_png
from nextscale.pictures.files import free_path, write_file
from nextscale.pictures.page import Code, Facts, Figure, Gallery, Section, Table, write_page
from nextscale.pictures.sheets import comparison_sheet, contact_sheet, scale_strip
from nextscale.pictures.still import Picture, Quantise, save_png, save_pngs, to_pil

__all__ = [
    "Code",
    "Facts",
    "Figure",
    "Gallery",
    "Picture",
    "Quantise",
    "Section",
    "Table",
    "animate",
    "comparison_sheet",
    "contact_sheet",
    "depth_picture",
    "depth_png",
    "free_path",
    "save_png",
    "save_pngs",
    "scale_strip",
    "to_pil",
    "write_file",
    "write_page",
]
