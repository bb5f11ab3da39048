"""Evaluation networks from TorchScript files: what is taken, what is refused and why."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nextscale.evaluation.classifier import ImageClassifier, extract, load_classifier


def test_a_torchscript_file_gives_features_and_logits_without_gradients(network_file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier = load_classifier(network_file, "cpu")
    images = torch.rand(5, 3, 12, 12, requires_grad=True)
    features, logits = classifier(images)
    torch.testing.assert_close(logits, 20 * images.detach().mean(dim=(2, 3)))
    assert features.shape == (5, 6)
    assert not features.requires_grad


def test_extract_streams_batches_in_order(network_file: Path) -> None:
    classifier = load_classifier(network_file)
    images = torch.rand(7, 3, 12, 12)
    features, logits = extract(classifier, (images[i : i + 3] for i in range(0, 7, 3)))
    torch.testing.assert_close(features, classifier(images)[0])
    torch.testing.assert_close(logits, classifier(images)[1])
    with pytest.raises(ValueError, match="no images"):
        extract(classifier, [])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 12, 12), r"shape \(3, 12, 12\)"),
        (torch.rand(2, 1, 12, 12), "expected .batch, 3, height, width"),
        (torch.zeros(2, 3, 12, 12, dtype=torch.uint8), "torch.uint8; expected floats"),
        (torch.rand(2, 3, 12, 12) * 2 - 1, r"map \[-1, 1\] by"),
        (torch.full((2, 3, 12, 12), torch.nan), "values from nan"),
    ],
)
def test_images_of_another_layout_or_range_are_refused(network_file: Path, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_classifier(network_file)(images)


def test_networks_that_fail_or_give_something_else_are_named() -> None:
    wide = ImageClassifier(nn.Linear(7, 2), name="wide.pt")
    with pytest.raises(ValueError, match=r"wide.pt did not take images of shape \(2, 3, 4, 4\)"):
        wide(torch.rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"expected \(B, D\) and \(B, classes\)"):
        ImageClassifier(lambda x: (x, x))(torch.rand(2, 3, 4, 4))


class Writes(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        torch.save(images, "/tmp/must-not-appear")
        return images, images


class Reads(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, torch.from_file("/etc/hostname", False, 4, dtype=torch.uint8)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(("module", "operator"), [(Writes(), "save"), (Reads(), "from_file")])
def test_torchscript_that_touches_files_is_refused(tmp_path: Path, module: nn.Module, operator: str) -> None:
    torch.jit.script(module).save(str(tmp_path / "network.pt"))
    with pytest.raises(ValueError, match=f"operator '{operator}'"):
        load_classifier(tmp_path / "network.pt")


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.marker,)  # type: ignore[return-value]


def test_files_that_are_not_torchscript_are_refused_and_not_run(tmp_path: Path, network_file: Path) -> None:
    marker = tmp_path / "was-run"
    torch.save(Payload(marker), tmp_path / "pickle.pt")
    (tmp_path / "cut.pt").write_bytes(network_file.read_bytes()[:2000])
    (tmp_path / "text.pt").write_text("weights")
    for name in ("pickle.pt", "cut.pt", "text.pt"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as a TorchScript"):
            load_classifier(tmp_path / name)
    assert not marker.exists()
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        load_classifier(tmp_path / "absent.pt")
