"""Depth data sets in their layouts: found, read to metres, refused with everything that is wrong."""

import gzip
import math
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.datasets.depth import DATASETS, DepthDataset, open_depth, open_source, recognise
from nextscale.datasets.depth_augment import TRAINING, Augmentation
from nextscale.datasets.depth_encodings import (
    HYPERSIM,
    IBIMS,
    KITTI,
    NYU,
    SUN_RGBD,
    TUM,
    Encoding,
)
from nextscale.datasets.depth_lidar import project_scan, read_scan, scanner_calibration, scanner_projection
from nextscale.datasets.depth_lists import kitti_frames, kitti_list, read_list, shipped
from nextscale.datasets.depth_nyu import labelled_numbers
from nextscale.datasets.depth_pairs import MissingFilesError
from nextscale.datasets.depth_planar import focal_length
from nextscale.datasets.errors import DatasetError, NoImagesError
from nextscale.datasets.loader import make_loader
from nextscale.datasets.sampler import EpochSampler

from .depth_files import a_depth, image, written

DAY, DRIVE = "2011_09_26", "2011_09_26_drive_0002_sync"
CALIBRATION = {
    "calib_cam_to_cam.txt": "calib_time: 09-Jan-2012\nS_rect_02: 1.242e+03 3.75e+02\n"
    "R_rect_00: 1 0 0 0 1 0 0 0 1\nP_rect_02: 700 0 600 0 0 700 170 0 0 0 1 0\n",
    "calib_velo_to_cam.txt": "R: 0 -1 0 0 0 -1 1 0 0\nT: 0 0 -0.27\n",
}


# --- KITTI --------------------------------------------------------------------------------------------


def kitti_folder(root: Path, frames: tuple[int, ...] = (69,), truth: bool = True) -> Path:
    for name, text in CALIBRATION.items():
        (root / "raw" / DAY).mkdir(parents=True, exist_ok=True)
        (root / "raw" / DAY / name).write_text(text)
    for frame in frames:
        image(root / "raw" / DAY / DRIVE / "image_02" / "data" / f"{frame:010d}.png", 375, 1242)
        scan = root / "raw" / DAY / DRIVE / "velodyne_points" / "data" / f"{frame:010d}.bin"
        scan.parent.mkdir(parents=True, exist_ok=True)
        np.array([[10, 0, 0, 0.5], [10.27, 1, 0.5, 0.5], [-5, 0, 0, 0]], "<f4").tofile(scan)
        if truth:
            place = root / "depth" / "val" / DRIVE / "proj_depth" / "groundtruth" / "image_02"
            written(place / f"{frame:010d}.png", a_depth(375, 1242), KITTI)
    (root / "list.txt").write_text("".join(f"{DAY}/{DRIVE} {frame} l\n" for frame in frames))
    return root


def test_shipped_lists() -> None:
    frames = kitti_frames("eigen_test")
    assert len(frames) == 697 and sum(frame.improved for frame in frames) == 652
    assert (frames[0].sequence, frames[0].number) == (DRIVE, 69)
    assert len(kitti_frames("eigen_val")) == 800
    assert len(labelled_numbers("test")) == 654 and len(labelled_numbers("train")) == 795
    assert labelled_numbers("test")[:3] == [0, 1, 8] and "Apache-2.0" in shipped()["about"]


def test_lists_of_the_user(tmp_path: Path) -> None:
    bts = f"{DAY}/{DRIVE}/image_02/data/0000000069.png {DRIVE}/proj_depth/groundtruth/image_02/0000000069.png 721.5\n"
    (tmp_path / "a.txt").write_text(
        "# a comment\n" + bts + bts.replace("69.png", "70.png").split(" ")[0] + " None 721.5"
    )
    first, second = kitti_list(tmp_path / "a.txt")
    assert first.improved and not second.improved and second.number == 70
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(f"{DAY}/{DRIVE} 473 r\n".encode()))
    assert kitti_list(tmp_path / "b.txt.gz")[0].camera == 3
    (tmp_path / "c.txt").write_text("nonsense\n")
    with pytest.raises(DatasetError, match="line 'nonsense' is neither"):
        kitti_list(tmp_path / "c.txt")
    (tmp_path / "d.txt").write_text("\n")
    with pytest.raises(DatasetError, match="lists nothing"):
        read_list(tmp_path / "d.txt")
    (tmp_path / "e.txt.gz").write_bytes(b"\x1f\x8bxx")
    with pytest.raises(DatasetError, match="no text file, or is damaged"):
        read_list(tmp_path / "e.txt.gz")


def test_kitti_improved_and_lidar(tmp_path: Path) -> None:
    root = kitti_folder(tmp_path)
    source = open_source("kitti", root, "eigen", list_file=root / "list.txt")
    source.check()
    depth, valid = source.depth(0)
    assert source.name(0) == f"{DRIVE}/image_02/0000000069" and source.image(0).shape == (375, 1242, 3)
    assert np.abs(depth - a_depth(375, 1242)).max() <= 0.5 / 256 + 1e-6 and not valid[0, :2].any()
    assert source.camera(0, (375, 1242)).tolist() == [[700, 0, 600], [0, 700, 170], [0, 0, 1]]
    scanned, known = open_source("kitti", root, "eigen-lidar", list_file=root / "list.txt").depth(0)
    # Points straight ahead, and one metre to the left and half a metre up; one pixel up and left, forward distance.
    assert scanned[169, 599] == 10 and known.sum() == 2 and scanned[134, 529] == pytest.approx(10.27)


def test_all_missing_and_damaged_files_are_listed(tmp_path: Path) -> None:
    root = kitti_folder(tmp_path, (69, 54, 42))
    cut = root / "raw" / DAY / DRIVE / "image_02" / "data" / "0000000054.png"
    cut.write_bytes(cut.read_bytes()[:-20])
    (root / "depth" / "val" / DRIVE / "proj_depth" / "groundtruth" / "image_02" / "0000000042.png").unlink()
    with pytest.raises(MissingFilesError, match="2 of 6 files are missing or damaged") as caught:
        open_depth("kitti", root, size=(8, 16), list_file=root / "list.txt")
    assert "0000000054.png is cut short" in str(caught.value) and "0000000042.png is missing" in str(caught.value)
    with pytest.raises(MissingFilesError, match="1304"):
        open_source("kitti", root, "eigen").check()


def test_kitti_selection_and_server(tmp_path: Path) -> None:
    base = tmp_path / "depth_selection" / "val_selection_cropped"
    name = f"{DRIVE}_image_0000000005_image_02"
    image(base / "image" / f"{name}.png", 352, 1216)
    written(
        base / "groundtruth_depth" / f"{DRIVE}_groundtruth_depth_0000000005_image_02.png", a_depth(352, 1216), KITTI
    )
    (base / "intrinsics").mkdir()
    (base / "intrinsics" / f"{name}.txt").write_text("721.5 0 596.5 0 721.5 149.8 0 0 1")
    source = open_source("kitti", tmp_path, "selection")
    source.check()
    assert source.depth(0)[1].any() and source.camera(0, (352, 1216))[0, 2] == 596.5
    base = tmp_path / "depth_selection" / "test_depth_prediction_anonymous"
    image(base / "image" / "0000000000.png", 352, 1216)
    source = open_source("kitti", tmp_path, "server")
    assert source.name(0) == "0000000000"
    with pytest.raises(DatasetError, match="its ground truth is not public"):
        source.depth(0)


def test_the_scanners_projection_keeps_the_nearest_point() -> None:
    projection = scanner_projection(
        np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]]), np.zeros(3), np.eye(3), np.eye(3, 4) * [[10], [10], [1]]
    )
    points = np.array([[10.0, -3, -3], [5, -1.5, -1.5], [20, -6, -6], [-1, 0, 0]])
    depth = project_scan(points, projection, (5, 6))
    assert depth[2, 2] == 5 and (depth > 0).sum() == 1
    assert project_scan(points[:0], projection, (5, 6)).max() == 0


def test_damaged_calibration_and_scans_are_refused(tmp_path: Path) -> None:
    root = kitti_folder(tmp_path) / "raw" / DAY
    assert scanner_calibration(root).sizes == {2: (375, 1242)}
    with pytest.raises(DatasetError, match="has no camera 3"):
        scanner_calibration(root).projection(3)
    (root / "calib_velo_to_cam.txt").write_text("R: 1 2 3\nT: 0 0 0\n")
    with pytest.raises(DatasetError, match="incomplete or damaged"):
        scanner_calibration(root)
    (root / "calib_velo_to_cam.txt").write_text("")
    with pytest.raises(DatasetError, match="no KITTI calibration file"):
        scanner_calibration(root)
    (root / "scan.bin").write_bytes(b"abcdabcd")
    with pytest.raises(DatasetError, match="the scan is cut short"):
        read_scan(root / "scan.bin")


# --- NYU ----------------------------------------------------------------------------------------------


def labelled(path: Path, frames: int) -> Path:
    draw = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["images"] = draw.integers(0, 256, (frames, 3, 640, 480), np.uint8)
        file["rawDepths"] = draw.uniform(0, 9, (frames, 640, 480)).astype(np.float32)
        file["depths"] = file["rawDepths"][()] + 1
    return path


def test_the_labelled_file_is_turned(tmp_path: Path) -> None:
    from nextscale.datasets.depth_nyu import LabelledNYU

    path = labelled(tmp_path / "nyu_depth_v2_labeled.mat", 3)
    source = LabelledNYU(path, (0, 2))
    source.check()
    with h5py.File(path) as file:
        assert np.array_equal(source.image(1), file["images"][2].transpose(2, 1, 0))
        assert np.array_equal(source.depth(1)[0], file["rawDepths"][2].T)
        assert np.array_equal(LabelledNYU(path, (2,), filled=True).depth(0)[0], file["depths"][2].T)
    assert source.name(1) == "rgb_00002" and source.camera(0, (480, 640))[0, 0] == np.float32(518.8579)
    with pytest.raises(MissingFilesError, match=r"expected \(1449, 3, 640, 480\)"):
        open_source("nyu", tmp_path).check()
    (tmp_path / "other.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    with pytest.raises(DatasetError, match=r"no MATLAB 7\.3"):
        open_source("nyu", tmp_path / "other.mat").check()


def test_nyu_folders(tmp_path: Path) -> None:
    image(tmp_path / "kitchen" / "rgb_00001.jpg", 12, 16)
    written(tmp_path / "kitchen" / "sync_depth_00001.png", a_depth(12, 16), NYU)
    with pytest.raises(MissingFilesError, match="653 of 654 frames are missing"):
        open_source("nyu", tmp_path)
    (tmp_path / "list.txt").write_text("/kitchen/rgb_00001.jpg /kitchen/sync_depth_00001.png 518.8579\n")
    source = open_source("nyu", tmp_path, list_file=tmp_path / "list.txt")
    source.check()
    assert source.name(0) == "kitchen/rgb_00001" and np.abs(source.depth(0)[0] - a_depth(12, 16)).max() < 6e-4
    with pytest.raises(DatasetError, match="no split 'half'; it has: test, train, all"):
        open_source("nyu", tmp_path, "half")
    with pytest.raises(NoImagesError, match="it has: nothing"):
        (tmp_path / "empty").mkdir()
        open_source("nyu", tmp_path / "empty")


# --- others -------------------------------------------------------------------------------------------


def test_hypersim(tmp_path: Path) -> None:
    images = tmp_path / "ai_001_001" / "images"
    for frame in (0, 1):
        image(images / "scene_cam_00_final_preview" / f"frame.{frame:04d}.tonemap.jpg", 6, 8)
        written(images / "scene_cam_00_geometry_hdf5" / f"frame.{frame:04d}.depth_meters.hdf5", a_depth(), HYPERSIM)
    source = open_source("hypersim", tmp_path, "all")
    source.check()
    assert len(source) == 2 and np.allclose(source.depth(0)[0], a_depth(), atol=1e-5)
    assert source.camera(0, (6, 8))[0, 0] == pytest.approx(focal_length(8, math.pi / 3))
    with pytest.raises(DatasetError, match="holds no metadata_images_split_scene_v1"):
        open_source("hypersim", tmp_path, "val")
    (tmp_path / "metadata_images_split_scene_v1.csv").write_text(
        "scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name\n"
        "ai_001_001,cam_00,0,True,,train\nai_001_001,cam_00,1,True,,val\nai_001_001,cam_00,2,False,bad,val\n"
    )
    [name] = [open_source("hypersim", tmp_path, "val").name(0)]
    assert name.endswith("frame.0001") and len(open_source("hypersim", tmp_path, "val")) == 1
    (tmp_path / "own.csv").write_text(
        ",images,depth,settings_camera_fov\n0,x,ai_001_001/images/scene_cam_00_geometry_hdf5/frame.0000."
        "depth_meters.hdf5,1.5\n"
    )
    own = open_source("hypersim", tmp_path, "val", list_file=tmp_path / "own.csv")
    assert own.camera(0, (6, 8))[0, 0] == pytest.approx(focal_length(8, 1.5))


def test_eth3d(tmp_path: Path) -> None:
    image(tmp_path / "rgb" / "office" / "images" / "dslr_images" / "DSC_0219.JPG", 6, 8)
    place = tmp_path / "depth" / "office_dslr_depth" / "office" / "ground_truth_depth" / "dslr_images" / "DSC_0219.JPG"
    written(place, a_depth(), Encoding("raw", size=(6, 8)))
    source = open_source("eth3d", tmp_path)
    source.check()
    assert source.name(0) == "office/DSC_0219" and np.allclose(source.depth(0)[0], a_depth())


def test_ibims(tmp_path: Path) -> None:
    base = tmp_path / "ibims1_core_raw"
    image(base / "rgb" / "corridor_01.png", 6, 8)
    written(base / "depth" / "corridor_01.png", a_depth() + 1, IBIMS)
    for name, keep in (("invalid", [[1, 0]]), ("transp", [[0], [1]])):
        mask = np.ones((6, 8), np.uint8)
        mask[: len(keep), : len(keep[0])] = keep
        (base / f"mask_{name}").mkdir()
        Image.fromarray(mask * 255).save(base / f"mask_{name}" / "corridor_01.png")
    (base / "calib").mkdir()
    (base / "calib" / "corridor_01.txt").write_text("559.9,558.5,312.7,247.8\n")
    (base / "imagelist.txt").write_text("corridor_01\n")
    source = open_source("ibims", tmp_path)
    source.check()
    depth, valid = source.depth(0)
    assert not valid[0, 0] and not valid[0, 1] and valid[1].all() and (depth[~valid] == 0).all()
    assert source.camera(0, (6, 8))[1, 2] == np.float32(247.8)


def test_tum(tmp_path: Path) -> None:
    root = tmp_path / "rgbd_dataset_freiburg1_xyz"
    image(root / "rgb" / "a.png", 6, 8)
    image(root / "rgb" / "b.png", 6, 8)
    written(root / "depth" / "a.png", a_depth(), TUM)
    (root / "rgb.txt").write_text("# time file\n1.000 rgb/a.png\n2.000 rgb/b.png\n")
    (root / "depth.txt").write_text("1.015 depth/a.png\n")
    source = open_source("tum", root)
    source.check()
    assert len(source) == 1 and source.name(0) == "rgb/a" and source.camera(0, (6, 8))[0, 0] == np.float32(517.3)
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["image"], file["depth"] = np.zeros((6, 8, 3), np.uint8), a_depth()
    packed = open_source("tum", tmp_path)
    packed.check()
    assert np.allclose(packed.depth(0)[0], a_depth()) and packed.image(0).shape == (6, 8, 3)


def test_diode(tmp_path: Path) -> None:
    for kind in ("indoors", "outdoor"):
        place = tmp_path / "val" / kind / "scene_1" / "scan_1"
        image(place / "n.png", 6, 8)
        np.save(place / "n_depth.npy", a_depth()[:, :, None] + 1)
        np.save(place / "n_depth_mask.npy", (a_depth() > 0).astype(np.float32))
    for split, count in (("val", 2), ("val-indoor", 1), ("val-outdoor", 1)):
        source = open_source("diode", tmp_path, split)
        source.check()
        assert len(source) == count
    depth, valid = source.depth(0)
    assert not valid[0, 0] and depth[1, 1] == pytest.approx(a_depth()[1, 1] + 1)
    with pytest.raises(DatasetError, match="no split 'half'"):
        open_source("diode", tmp_path, "half")


def test_sunrgbd(tmp_path: Path) -> None:
    scene = tmp_path / "SUNRGBD" / "kv1" / "NYUdata" / "NYU0001"
    image(scene / "image" / "NYU0001.jpg", 6, 8)
    written(scene / "depth" / "NYU0001.png", a_depth(), SUN_RGBD)
    (scene / "intrinsics.txt").write_text("518.8 0 284.5 0 519.4 208.7 0 0 1")
    inside = "downloaded/SUNRGBD/kv1/NYUdata/NYU0001"
    (tmp_path / "list.txt").write_text(f"{inside}/image/NYU0001.jpg {inside}/depth/NYU0001.png\n")
    for listing in (None, tmp_path / "list.txt"):
        source = open_source("sunrgbd", tmp_path, list_file=listing)
        source.check()
        assert source.name(0) == "kv1/NYUdata/NYU0001/image/NYU0001"
        assert np.abs(source.depth(0)[0] - a_depth()).max() < 6e-4 and source.camera(0, (6, 8))[1, 1] == np.float32(
            519.4
        )


def described(root: Path, text: str = "") -> Path:
    image(root / "photos" / "x" / "1.jpg", 40, 60, 1)
    image(root / "photos" / "2.jpg", 40, 60, 2)
    for name in ("x/1", "2"):
        written(root / "depth" / f"{name}_d.png", a_depth(20, 30), NYU)
    (root / "data.yaml").write_text(
        text
        or "image: photos/{name}.jpg\ndepth: depth/{name}_d.png\nencoding: {kind: png, scale: 1000}\n"
        "camera: {fx: 50, fy: 50, cx: 29.5, cy: 19.5}\nsplits: {test: test.txt}\n"
    )
    (root / "test.txt").write_text("x/1\n")
    return root / "data.yaml"


def test_a_folder_described_in_yaml(tmp_path: Path) -> None:
    path = described(tmp_path)
    source = open_source("folder", path)
    source.check()
    assert [source.name(i) for i in range(2)] == ["2", "x/1"] and recognise(path) == "folder"
    assert open_source("folder", path, "test").name(0) == "x/1"
    with pytest.raises(DatasetError, match="has no split 'train'; it has: test"):
        open_source("folder", path, "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image: a/{name}.jpg", "must have `image"),
        ("image: a.jpg\ndepth: b/{name}.png", "image is 'a.jpg'; expected a file name with {name}"),
        ("image: a/{name}.jpg\ndepth: b/{name}.png\nsize: 3", "size is not understood"),
        ("image: a/{name}.jpg\ndepth: b/{name}.png\nencoding: mine", "unknown encoding 'mine'; known: kitti"),
        ("image: a/{name}.jpg\ndepth: b/{name}.png\nencoding: {kid: png}", "kid is not understood"),
        ("image: a/{name}.jpg\ndepth: b/{name}.png\nencoding: {scale: 0}", "scale is 0"),
        ("image: a/{name}.jpg\ndepth: b/{name}.png\ncamera: {fx: 1}", "expected fx, fy, cx and cy"),
        ("image: a/{name}.jpg\ndepth: b/{name}.png\nfov_x: 200", "fov_x is 200"),
        ("image: [", "is no YAML file"),
        ("image: nix/{name}.jpg\ndepth: b/{name}.png", "holds no image like"),
    ],
)
def test_a_description_that_is_not_understood(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        open_source("folder", described(tmp_path, text))


def test_unknown_data_sets(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="unknown data set 'mine'; known: kitti"):
        open_source("mine", tmp_path)
    with pytest.raises(DatasetError, match="does not exist"):
        open_source("kitti", tmp_path / "nix")
    with pytest.raises(DatasetError, match="name the data set"):
        recognise(tmp_path)
    assert set(DATASETS) >= {
        "kitti",
        "nyu",
        "hypersim",
        "eth3d",
        "ibims",
        "tum",
        "diode",
        "sunrgbd",
        "scenes",
        "folder",
    }


# --- batches ------------------------------------------------------------------------------------------


def test_batches(tmp_path: Path) -> None:
    data = open_depth("folder", described(tmp_path), size=(10, 15))
    batch = data.fetch([0, 1])
    assert batch["image"].shape == (2, 3, 10, 15) and batch["image"].dtype == torch.float32
    assert -1 <= batch["image"].min() < 0 < batch["image"].max() <= 1
    assert batch["depth"].shape == batch["valid"].shape == (2, 1, 10, 15) and batch["valid"].dtype == torch.bool
    # Pixel (r, c) of 10 x 15 is nearest to (2 r + 1, 2 c + 1) of 20 x 30.
    assert torch.allclose(batch["depth"][0, 0], torch.from_numpy(a_depth(20, 30)[1::2, 1::2]), atol=6e-4)
    assert batch["intrinsics"][0].tolist() == [[12.5, 0, 7], [0, 12.5, 4.5], [0, 0, 1]]
    assert batch["name"] == ["2", "x/1"] and batch["index"].tolist() == [0, 1]
    assert torch.equal(data[1]["depth"], batch["depth"][1])
    with pytest.raises(IndexError):
        data.fetch([2])


def test_a_crop_keeps_rays(tmp_path: Path) -> None:
    """Wherever the crop lies, a pixel's ray is that of the pixel it was cut from."""
    path = described(tmp_path)
    source = open_source("folder", path)
    data = DepthDataset(source, size=(20, 20), crop="random", augmentation=Augmentation(flip=0, zoom=2), seed=3)
    plain = source.depth(0)[0]
    for epoch in range(4):
        sample = data[(epoch, 0)]
        fx, cx = sample["intrinsics"][0, 0].item(), sample["intrinsics"][0, 2].item()
        fy, cy = sample["intrinsics"][1, 1].item(), sample["intrinsics"][1, 2].item()
        rows, columns = np.mgrid[:20, :20]
        # Places in the image of 40 x 60, then in the depth of 20 x 30.
        across, down = (columns - cx) / fx * 50 + 29.5, (rows - cy) / fy * 50 + 19.5
        there = plain[((down + 0.5) / 2).astype(int).clip(0, 19), ((across + 0.5) / 2).astype(int).clip(0, 29)]
        assert np.abs(sample["depth"][0].numpy() - there).max() < 1e-6
        assert fx >= 24.9


def test_draws_depend_on_seed_epoch_and_number_alone(tmp_path: Path) -> None:
    path = described(tmp_path)
    data = open_depth("folder", path, size=(16, 24), crop="random", augmentation=TRAINING, seed=1)
    together = data.fetch([(3, 0), (3, 1)])
    alone = data.fetch([(3, 1)])
    for name in ("image", "depth", "valid", "intrinsics"):
        assert torch.allclose(together[name][1].float(), alone[name][0].float(), atol=1e-6), name
    assert not torch.equal(data.fetch([(4, 1)])["image"], alone["image"])
    loader = make_loader(data, EpochSampler(2, batch_size=2))
    assert next(iter(loader))["depth"].shape == (2, 1, 16, 24)
