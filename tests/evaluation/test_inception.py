"""The Inception network of FID against what torch-fidelity's computes, and its resize against plain arithmetic."""

import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from nextscale.evaluation.inception import FIDInception, resize_like_tensorflow


def weights() -> dict[str, torch.Tensor]:
    """Every entry drawn from its own name."""
    state = {}
    for name, value in FIDInception().state_dict().items():
        shape = tuple(value.shape)
        if name.endswith("num_batches_tracked"):
            continue
        draws: np.ndarray = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
        if name.endswith(("running_var", "bn.weight")):
            draws = 1 + 0.1 * np.abs(draws)
        elif len(shape) == 1:
            draws = 0.1 * draws
        else:
            draws = draws * math.sqrt(2 / math.prod(shape[1:]))
        state[name] = torch.from_numpy(draws.astype(np.float32))
    return state


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05.pth"
    torch.save(weights(), path)
    return path


EXPECTED: dict[str, list[float]] = {
    "features": [0.140037, 0.040445, 0.011798, 0.0, 0.0, 0.014914, 0.144849, 1.253536],
    "spatial": [1.359246, 0.942566, 1.747957, 0.0, 0.626417, 1.605395, 0.0, 1.62233],
    "logits": [0.776147, -3.184303, -2.05826, -0.911213, 2.33021, 1.068927, -4.095055, 3.896497],
}
"""The first values that torch-fidelity 0.4's FeatureExtractorInceptionV3 gives with these weights and images; the
spatial ones by a hook on its Mixed_6d.branch1x1."""


def images() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(7).integers(0, 256, (2, 3, 40, 56)).astype(np.float32))


def test_it_equals_torch_fidelity(file: Path) -> None:
    with torch.inference_mode():
        made = FIDInception.from_file(file)(images())
    assert [tuple(value.shape) for value in made] == [(2, 2048), (2, 2023), (2, 1008)]
    for name, expected in EXPECTED.items():
        value = getattr(made, name)[1, : len(expected)]
        torch.testing.assert_close(value, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_a_file_of_other_weights_is_refused(file: Path, tmp_path: Path) -> None:
    state = torch.load(file)
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.pth")
    with pytest.raises(ValueError, match=r"0 entries are missing and 1 are others, such as fc\.weight"):
        FIDInception.from_file(tmp_path / "torchvision.pth")
    with pytest.raises(FileNotFoundError):
        FIDInception.from_file(tmp_path / "absent.pth")


@pytest.mark.parametrize(("height", "width"), [(5, 3), (20, 9), (8, 8)])
def test_the_resize_has_no_half_pixel_centres(height: int, width: int) -> None:
    image = np.random.default_rng(0).random((height, width))
    expected = np.empty((8, 8))
    for i in range(8):
        for j in range(8):
            y, x = i * height / 8, j * width / 8
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
            lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
            expected[i, j] = upper * (1 - (y - top)) + lower * (y - top)
    made = resize_like_tensorflow(torch.from_numpy(image)[None, None], 8)[0, 0]
    np.testing.assert_allclose(made.numpy(), expected, atol=1e-6)
