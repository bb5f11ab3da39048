"""From the bytes of an image file to the square crop that a model sees.

An image is decoded to *planes*: one 8-bit RGB image, or one or three float images in [0, 1] when the file
holds more than 8 bits a channel. Pillow's resize and crop work on both, so 16-bit files keep their precision
to the end.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from .errors import ImageError

Planes = tuple[Image.Image, ...]

# Only these decoders are tried on untrusted bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")

_ORIENTATION = 0x0112


def decode(data: bytes) -> Planes:
    """Decode a JPEG, PNG, WebP, BMP, TIFF or PPM file, upright according to its EXIF orientation.

    Grey is repeated over the channels, palettes are resolved, CMYK is converted, transparency is laid over
    white. Raises ImageError for damaged files, and for value ranges that are unknown (float or 32-bit integer
    TIFF).
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures well before it refuses them; tags that do not parse are of no
            # interest.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            layout = _layout(image)
            planes = _deep_png(image, data, layout) if image.format == "PNG" and "16" in layout else _planes(image)
            orientation = image.getexif().get(_ORIENTATION, 1)
    except ImageError:
        raise
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise ImageError(f"cannot be decoded ({type(error).__name__}: {error})") from error
    if orientation != 1:
        planes = tuple(_upright(plane, orientation) for plane in planes)
    return planes


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) from the header alone. Raises ImageError."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS).size
    except Exception as error:
        raise ImageError(f"cannot be decoded ({type(error).__name__}: {error})") from error


def square(planes: Planes, size: int, *, ratio: float, flip: bool, across: float, down: float) -> np.ndarray:
    """Flip, resize, crop: planes -> (3, size, size), uint8 for 8-bit images, else float32 in [-1, 1].

    `ratio`: the shorter side becomes round(ratio * size) by Lanczos (nothing is resampled if it already is),
    0 keeps the image's size. `across`, `down`: place of the crop, 0 = left or top edge, 1 = right or bottom
    edge, as shares in [0, 1) of the places there are; 0.5 is not quite the centre, for which `CENTRE` stands.
    """
    if flip:
        planes = tuple(ImageOps.mirror(plane) for plane in planes)
    width, height = planes[0].size
    if ratio:
        shorter = round(ratio * size)
        # The longer side is truncated, not rounded, as in the official pre-processing.
        wanted = (
            (shorter, int(shorter * height / width)) if width <= height else (int(shorter * width / height), shorter)
        )
        if wanted != (width, height):
            planes = tuple(plane.resize(wanted, Image.Resampling.LANCZOS) for plane in planes)
            width, height = wanted
    left, top = _offset(width - size, across), _offset(height - size, down)
    if (width, height) != (size, size):
        planes = tuple(plane.crop((left, top, left + size, top + size)) for plane in planes)
    return _pixels(planes)


def covering(planes: Planes, height: int, width: int) -> np.ndarray:
    """Resize by Lanczos until a size is covered, and cut out its centre: (3, height, width), values as of `square`.

    As Infinity's training takes its images: a side that is longer than needed is truncated, and the centre too.
    """
    across, down = planes[0].size
    wide = across * height > width * down
    wanted = (int(across / down * height), height) if wide else (width, int(width / (across / down)))
    wanted = (max(wanted[0], width), max(wanted[1], height))  # rounding down may have missed a pixel
    if wanted != (across, down):
        planes = tuple(plane.resize(wanted, Image.Resampling.LANCZOS) for plane in planes)
    left, top = (wanted[0] - width) // 2, (wanted[1] - height) // 2
    return _pixels(tuple(plane.crop((left, top, left + width, top + height)) for plane in planes))


def _pixels(planes: Planes) -> np.ndarray:
    """(3, height, width): uint8 of 8-bit images, else float32 in [-1, 1]."""
    if planes[0].mode == "RGB":
        return np.asarray(planes[0]).transpose(2, 0, 1)
    stacked = np.stack([np.asarray(plane) for plane in planes]).clip(0, 1) * np.float32(2) - np.float32(1)
    return np.broadcast_to(stacked, (3, *stacked.shape[1:]))


CENTRE = -1.0


def _offset(room: int, share: float) -> int:
    return round(room / 2) if share == CENTRE else int(share * (room + 1))


def to_signed(pixels: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]; what is float already is kept. Contiguous, of the same shape; written into `out`."""
    made = np.empty(pixels.shape, np.float32) if out is None else out
    if pixels.dtype == np.uint8:
        # v / 127.5 is v / 255 * 2 of the official pre-processing to the last bit: 2 is a power of two.
        np.divide(pixels, np.float32(127.5), out=made)
        np.subtract(made, np.float32(1), out=made)
    else:
        made[...] = pixels
    return made


def _layout(image: Image.Image) -> str:
    """How the file stores a pixel (asked before loading, which forgets it). Refuses what Pillow would cut."""
    tile = getattr(image, "tile", None)  # of images from files; Image itself does not declare it
    args = tile[0].args if tile else ""
    args = args if isinstance(args, tuple) else (args,)
    layout = str(args[0])
    deep_ppm = image.format == "PPM" and len(args) > 1 and isinstance(args[1], int) and args[1] > 255
    if image.format != "PNG" and image.mode in ("RGB", "RGBA", "CMYK") and (";16" in layout or deep_ppm):
        raise ImageError(f"is a {image.format} of 16 bits a channel, which cannot be read without loss: use 16-bit PNG")
    return layout


def _planes(image: Image.Image) -> Planes:
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return (image,)
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N") or (image.mode == "I" and image.format == "PPM"):
        return (_float_plane(np.asarray(image) / np.float32(65535)),)
    if image.mode in ("I", "F"):
        raise ImageError(
            f"has mode {image.mode} ({image.format}), whose value range is not stored: convert it to 8 or 16 bits"
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return (image.convert("RGB"),)


def _deep_png(image: Image.Image, data: bytes, layout: str) -> Planes:
    """16-bit PNG. Pillow reads grey whole, but keeps only the high byte of colours, so the file is decoded a
    second time with the byte order reversed, which gives the low byte."""
    if image.mode == "I;16":
        return (_float_plane(np.asarray(image) / np.float32(65535)),)
    if layout not in ("RGB;16B", "RGBA;16B"):
        raise ImageError(f"is a 16-bit PNG of layout {layout}, which cannot be read without loss: convert it to 8 bits")
    high = np.asarray(image).astype(np.float32)
    again = Image.open(io.BytesIO(data), formats=("PNG",))
    again.tile = [tile._replace(args=layout.replace("16B", "16L")) for tile in again.tile]
    values = (high * 256 + np.asarray(again)) / np.float32(65535)
    if image.mode == "RGBA":
        values = values[..., :3] * values[..., 3:] + (1 - values[..., 3:])
    return tuple(_float_plane(values[..., channel]) for channel in range(3))


def _float_plane(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(values, np.float32), "F")


def _upright(plane: Image.Image, orientation: int) -> Image.Image:
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return plane if turn is None else plane.transpose(turn)
