"""Points where the camera saw them, and pictures from elsewhere."""

import numpy as np
import pytest
import torch

from nextscale.tasks.depth.geometry import Camera, point_cloud, save_ply, turned, unproject

H, W = 36, 48


@pytest.fixture
def scene():
    """A red square at 2 m before a grey wall at 4 m."""
    depth, image = torch.full((H, W), 4.0), torch.full((3, H, W), 0.3)
    depth[8:24, 16:32] = 2.0
    image[:, 8:24, 16:32] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    return depth, image, Camera.of_view(H, W, 60)


def middle_of_the_square(picture):
    rows, columns = torch.nonzero((picture[0] > 0.9) & (picture[1] < 0.1), as_tuple=True)
    return rows.float().mean().item(), columns.float().mean().item()


def test_points_project_back_to_their_pixels(scene):
    depth, _, camera = scene
    points = unproject(depth, camera).reshape(-1, 3) @ camera.matrix.T
    rows, columns = np.indices((H, W))
    np.testing.assert_allclose(points[:, 0] / points[:, 2], columns.ravel(), atol=1e-4)
    np.testing.assert_allclose(points[:, 1] / points[:, 2], rows.ravel(), atol=1e-4)


def test_cameras():
    assert Camera.of_view(100, 200, 90).fx == pytest.approx(100)
    camera = Camera(500, 510, 319.5, 239.5)
    assert Camera.of_matrix(camera.matrix) == camera
    half = camera.resized(0.5, 0.5)
    assert (half.fx, half.cx) == (250, 159.5) and half.resized(2, 2) == camera
    for wrong in (lambda: Camera(0, 1, 0, 0), lambda: Camera.of_view(4, 4, 180), lambda: Camera.of_matrix([1, 2])):
        with pytest.raises(ValueError):
            wrong()


def test_a_point_cloud_is_read_back(scene, tmp_path):
    open3d = pytest.importorskip("open3d")
    depth, image, camera = scene
    depth[0, 0], depth[0, 1], depth[0, 2] = 0, float("inf"), float("nan")
    cloud = point_cloud(depth, image, camera, edges=True)
    read = open3d.io.read_point_cloud(str(save_ply(cloud, tmp_path / "deep" / "cloud.ply")))
    points, colours = np.asarray(read.points), np.asarray(read.colors)
    assert len(points) == H * W - 3 and set(points[:, 2].round(4)) == {2.0, 4.0}
    assert (colours[points[:, 2] < 3] == [1, 0, 0]).all()
    assert len(list((tmp_path / "deep").iterdir())) == 1
    without_rims = point_cloud(depth, image, camera)
    assert 0 < len(without_rims.point.positions) < len(points) - 60
    assert len(point_cloud(depth, image, camera, limit=100).point.positions) <= 100


def test_the_view_from_where_it_was_taken_is_the_photo(scene):
    depth, image, camera = scene
    picture = turned(depth, image, camera)
    inner = (slice(None), slice(10, 22), slice(18, 30))
    torch.testing.assert_close(picture[inner], image[inner], atol=1e-3, rtol=0)
    assert middle_of_the_square(picture) == pytest.approx((15.5, 23.5), abs=0.6)


def test_what_is_near_moves_the_other_way(scene):
    depth, image, camera = scene
    depth[:3], depth[-3:] = 4.0, 4.0
    row, column = middle_of_the_square(turned(depth, image, camera))
    assert middle_of_the_square(turned(depth, image, camera, right=15))[1] < column - 3
    assert middle_of_the_square(turned(depth, image, camera, right=-15))[1] > column + 3
    assert middle_of_the_square(turned(depth, image, camera, up=15))[0] > row + 3
    assert (turned(depth, image, camera, right=25, background=0.0) == 0).all(0).any()


def test_large_photos_are_reduced(scene):
    depth, image, camera = scene
    assert turned(depth, image, camera, longest=24).shape == (3, 18, 24)


@pytest.mark.parametrize("call", [point_cloud, turned])
def test_what_has_no_depth_is_refused(scene, call):
    depth, image, camera = scene
    with pytest.raises(ValueError, match="no positive"):
        call(torch.zeros_like(depth), image, camera)
    with pytest.raises(ValueError, match="same size"):
        call(depth[1:], image, camera)
