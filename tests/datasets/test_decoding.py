"""Every kind of pixel arrives as upright RGB in [-1, 1], or is refused by name."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from nextscale.datasets.decoding import CENTRE, decode, square, to_signed
from nextscale.datasets.errors import ImageError


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png16(values: np.ndarray) -> bytes:
    """A 16-bit PNG of (H, W, channels): Pillow cannot write one in colour."""
    height, width, channels = values.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pixels(data: bytes, size: int = 8) -> np.ndarray:
    return to_signed(square(decode(data), size, ratio=0, flip=False, across=0, down=0))


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)


def signed(values: np.ndarray, top: int = 255) -> np.ndarray:
    return np.moveaxis(values / top * 2 - 1, -1, 0)


def test_values_and_axes(rgb):
    np.testing.assert_allclose(pixels(saved(Image.fromarray(rgb))), signed(rgb), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_png_keeps_its_precision(channels):
    values = np.random.default_rng(2).integers(0, 65536, (8, 8, channels))
    wanted = signed(values, 65535)
    if channels == 4:
        alpha = values[..., 3] / 65535
        wanted = wanted[:3] * alpha + (1 - alpha)
    np.testing.assert_allclose(pixels(png16(values)), np.broadcast_to(wanted, (3, 8, 8)), atol=1e-6)


def test_16_bit_png_is_resized_without_rounding():
    ramp = np.broadcast_to(np.linspace(0, 65535, 64).round()[None, :, None], (64, 64, 3))
    image = square(decode(png16(ramp)), 32, ratio=1.0, flip=False, across=0, down=0)
    assert len(np.unique(image[0, 0])) == 32
    eight_bit = np.round((image + 1) / 2 * 255) / 255 * 2 - 1
    assert np.abs(image - eight_bit).max() > 1e-3


def test_16_bit_files_that_would_be_cut_are_refused():
    with pytest.raises(ImageError, match="16-bit PNG of layout LA"):
        decode(png16(np.zeros((8, 8, 2), int)))
    ppm = b"P6 2 2 65535\n" + bytes(24)
    with pytest.raises(ImageError, match="16 bits a channel"):
        decode(ppm)
    with pytest.raises(ImageError, match="value range"):
        decode(saved(Image.new("F", (4, 4)), "TIFF"))


def test_grey_palette_alpha_cmyk(rgb):
    grey = rgb[..., :1]
    np.testing.assert_allclose(
        pixels(saved(Image.fromarray(grey[..., 0]))), np.broadcast_to(signed(grey), (3, 8, 8)), atol=1e-6
    )
    palette = Image.fromarray(rgb).quantize(64)
    np.testing.assert_allclose(pixels(saved(palette)), signed(np.asarray(palette.convert("RGB"))), atol=1e-6)
    alpha = rgb[..., 0] // 2
    over_white = rgb * (alpha[..., None] / 255) + 255 - alpha[..., None]
    found = pixels(saved(Image.fromarray(np.dstack([rgb, alpha]))))
    np.testing.assert_allclose(found, signed(over_white), atol=2.1 / 255)
    clear = Image.fromarray(np.zeros((8, 8), np.uint8), "L").convert("P")
    assert (pixels(saved(clear, transparency=0)) == 1).all()
    colour = Image.new("RGB", (8, 8), (200, 40, 90))
    found = pixels(saved(colour.convert("CMYK"), "JPEG", quality=100))
    np.testing.assert_allclose(found, signed(np.asarray(colour)), atol=5 / 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    """The corner that a viewer shows at the top left is white, whichever corner of the file it is."""
    corner = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[orientation]
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[8 * corner[0] :, 16 * corner[1] :][:8, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    (plane,) = decode(saved(Image.fromarray(stored), "JPEG", quality=95, exif=exif))
    assert plane.size == ((32, 16) if orientation < 5 else (16, 32))
    shown = np.asarray(plane).mean(-1)
    assert shown[:6, :6].min() > 200
    assert shown[-6:].max() < 50


def test_resize_follows_the_official_rule():
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (50, 75, 3), np.uint8))
    wanted = np.asarray(image.resize((54, 36), Image.Resampling.LANCZOS))[2:34, 11:43]
    found = square((image,), 32, ratio=1.125, flip=False, across=CENTRE, down=CENTRE)
    np.testing.assert_array_equal(found, wanted.transpose(2, 0, 1))
    mirrored = square((image,), 32, ratio=1.125, flip=True, across=0.0, down=0.999)
    from_flipped = np.asarray(
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((54, 36), Image.Resampling.LANCZOS)
    )
    np.testing.assert_array_equal(mirrored, from_flipped[4:, :32].transpose(2, 0, 1))


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a" + bytes(40), b"\xff\xd8\xff" + bytes(100), b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_what_is_no_image_is_an_image_error(data):
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode(data)


def test_a_truncated_jpeg_is_an_image_error(rgb):
    data = saved(Image.fromarray(rgb).resize((64, 64)), "JPEG")
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode(data[: len(data) // 2])
