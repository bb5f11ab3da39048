"""How depth is written in files: read to metres and back, and refused where it is damaged."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextscale.datasets.depth_encodings import (
    DIODE,
    ETH3D,
    HYPERSIM,
    IBIMS,
    KINECT,
    KITTI,
    NYU,
    SUN_RGBD,
    TUM,
    VIRTUAL_KITTI,
    Encoding,
    encode_depth,
    read_depth,
)
from nextscale.datasets.depth_planar import fill_holes, focal_length, planar_depth
from nextscale.datasets.errors import DatasetError

from .depth_files import a_depth, image, written


@pytest.mark.parametrize(
    ("encoding", "step"),
    [
        (KITTI, 1 / 256),
        (NYU, 1e-3),
        (TUM, 1 / 5000),
        (VIRTUAL_KITTI, 0.01),
        (IBIMS, 50 / 65535),
        (SUN_RGBD, 1e-3),
        (HYPERSIM, 1e-5),
        (DIODE, 1e-6),
        (Encoding("raw", size=(6, 8)), 1e-6),
        (Encoding("png8", scale=20), 0.05),
    ],
)
def test_what_is_written_is_read(tmp_path: Path, encoding: Encoding, step: float) -> None:
    depth = a_depth()
    path = written(tmp_path / f"depth{encoding.suffix}", depth, encoding)
    found = read_depth(path, encoding)
    assert found.dtype == np.float32 and np.abs(found - depth).max() <= 0.51 * step + 1e-5
    assert (found[0, :2] == 0).all()


def test_scales_are_exact(tmp_path: Path) -> None:
    values = np.array([[0, 1, 256, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert read_depth(tmp_path / "a.png", KITTI).tolist() == [[0, 1 / 256, 1, 65535 / 256]]
    assert read_depth(tmp_path / "a.png", IBIMS)[0, 3] == pytest.approx(50, rel=1e-7)
    # (v >> 3) | (v << 13): 8 x 1000 is one metre, the low bits are the high ones; above 8 m is 8 m.
    Image.fromarray(np.array([[8000, 1, 8 * 7999, 65535]], np.uint16)).save(tmp_path / "b.png")
    assert read_depth(tmp_path / "b.png", SUN_RGBD)[0].tolist() == pytest.approx([1, 8, 7.999, 8])


def test_what_is_no_value_is_zero(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[[1.0], [np.nan], [np.inf], [-2.0]]], np.float32))
    assert read_depth(tmp_path / "a.npy", DIODE).tolist() == [[1, 0, 0, 0]]
    np.array([1.5, np.inf], "<f4").tofile(tmp_path / "b.JPG")
    assert read_depth(tmp_path / "b.JPG", Encoding("raw", size=(1, 2))).tolist() == [[1.5, 0]]


def test_kinect_values_are_little_endian_disparities(tmp_path: Path) -> None:
    values = np.array([[600, 2047, 1092]], "<u2")
    (tmp_path / "d.pgm").write_bytes(b"P5\n3 1\n65535\n" + values.tobytes())
    found = read_depth(tmp_path / "d.pgm", KINECT)[0]
    assert found[0] == pytest.approx(351.3 / 492.5) and found[1] == 0 and found[2] == 10


def test_pfm_goes_from_the_bottom_up(tmp_path: Path) -> None:
    (tmp_path / "d.pfm").write_bytes(b"Pf\n1 2\n-1.0\n" + np.array([3, 4], "<f4").tobytes())
    assert read_depth(tmp_path / "d.pfm", Encoding("pfm")).tolist() == [[4], [3]]


@pytest.mark.parametrize(
    ("name", "content", "encoding", "message"),
    [
        ("a.png", b"nonsense", KITTI, "cannot be read as png"),
        ("a.npy", b"nonsense", DIODE, "cannot be read as npy"),
        ("a.hdf5", b"nonsense", HYPERSIM, "cannot be read as hdf5"),
        ("a.bin", b"abcdabcd", ETH3D, "holds 2 float32 values"),
        ("a.pfm", b"P6\n1 1\n1\n", Encoding("pfm"), "no grey PFM"),
        ("a.xyz", b"", Encoding("xyz"), "unknown kind of depth file 'xyz'"),
    ],
)
def test_damaged_depth_is_refused(tmp_path: Path, name, content, encoding, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        read_depth(tmp_path / name, encoding)


def test_a_colour_png_is_no_depth_and_a_pickle_is_not_run(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="PNG of mode RGB"):
        read_depth(image(tmp_path / "a.png", 4, 4), KITTI)
    np.save(tmp_path / "b.npy", np.array([print], object), allow_pickle=True)
    with pytest.raises(DatasetError, match="pickle"):
        read_depth(tmp_path / "b.npy", DIODE)
    with pytest.raises(DatasetError, match="does not fit: this format ends at"):
        encode_depth(np.full((2, 2), 300.0), KITTI)
    with pytest.raises(DatasetError, match="not written as pgm"):
        encode_depth(np.ones((2, 2)), KINECT)


def test_distances_become_depths() -> None:
    depth = planar_depth(np.full((3, 3), 2.0), math.pi / 2)
    focal = focal_length(3, math.pi / 2)
    assert focal == pytest.approx(1.5) and depth[1, 1] == 2
    assert depth[0, 1] == pytest.approx(2 * focal / math.hypot(1, focal))
    assert focal_length(1024, math.pi / 3) == pytest.approx(886.81, abs=0.01)
    hole = np.array([[False, True, True, False]])
    assert fill_holes(np.array([[1.0, 9.0, 9.0, 4.0]]), hole).tolist() == [[1, 1, 4, 4]]
    with pytest.raises(ValueError, match="nothing to fill"):
        fill_holes(np.ones((2, 2)), np.ones((2, 2), bool))
    with pytest.raises(ValueError, match="angle of view"):
        focal_length(3, 4.0)
