"""`nextscale evaluate generation` and `nextscale evaluate tokenizer`, on random weights and tiny networks."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.cli import main
from nextscale.cli.evaluate_generation import sweep_points
from nextscale.evaluation.npz_images import NpzImages
from nextscale.tasks.generation.evaluation_samples import SampleRun, draw_samples, drawn_batches


class Means(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.mean(dim=(2, 3)), 5.0 * images.amax(dim=(2, 3))


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("network") / "means.pt"
    torch.jit.script(Means()).save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{number}.png")
    return folder


def figures(folder: Path) -> list[dict]:
    return json.loads((folder / "figures.json").read_text())["points"]


def test_a_model_is_drawn_and_measured_and_a_sweep_gives_a_curve(
    forms: SimpleNamespace, network: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, out = tmp_path / "kept.npz", tmp_path / "sweep"
    command = ["evaluate", "generation", str(forms.folder), "--network", network, "--images", "12", "--device", "cpu"]
    sweep = ["--sweep", "guidance=0,2", "top_k=0,4"]
    assert main([*command, "--reference", str(photos), "--keep", str(kept), "--out", str(out), "--npz", *sweep]) == 0
    points = figures(out)
    assert [(p["settings"]["guidance"], p["settings"]["top_k"]) for p in points] == [(0, 0), (0, 4), (2, 0), (2, 4)]
    assert all(p["samples"] == 12 and p["reference"] == 24 and p["fid"] >= 0 for p in points)
    assert {"table.md", "samples.png", "sweep.png"} <= {path.name for path in out.iterdir()}
    assert "Inception score" in capsys.readouterr().out

    # One of its sets as a file of images, against the kept statistics: the same figures.
    npz = out / "samples" / "guidance=2.0-top_k=4" / "samples.npz"
    again = tmp_path / "again"
    given = ["evaluate", "generation", str(npz), "--network", network, "--device", "cpu", "--out", str(again)]
    assert main([*given, "--reference", str(kept)]) == 0
    measured = figures(again)[0]
    assert {k: v for k, v in measured.items() if k != "settings"} == {
        k: v for k, v in points[3].items() if k != "settings"
    }

    # Other settings into the same folder are refused; the same command goes on from what is there.
    other = [*command, "--reference", str(kept), "--out", str(out), "--seed", "5", *sweep]
    assert main(other) == 2
    assert "other settings" in capsys.readouterr().err


def test_samples_do_not_depend_on_processes_or_stops(tmp_path: Path) -> None:
    drawn: list[int] = []

    def generate(conditions: list[int], seeds: list[int]) -> torch.Tensor:
        drawn.extend(seeds)
        values = torch.tensor([[c, s, 0] for c, s in zip(conditions, seeds, strict=True)]) / 255
        return values[:, :, None, None].expand(-1, -1, 2, 2)

    run = SampleRun("model", 23, [4, 7, 9], seed=10, part=5)
    draw_samples(generate, run, tmp_path / "one")
    for rank in range(2):
        draw_samples(generate, run, tmp_path / "two", rank=rank, processes=2)
    one, two = (torch.cat(list(drawn_batches(run, tmp_path / name, 3))) for name in ("one", "two"))
    assert torch.equal(one, two)
    assert (one[:, :2, 0, 0] * 255).round().long().tolist() == [[[4, 7, 9][n % 3], 10 + n] for n in range(23)]

    (tmp_path / "two" / "part-00002.npz").unlink()
    with pytest.raises(ValueError, match="lacks 1 of 5 parts, such as part-00002"):
        list(drawn_batches(run, tmp_path / "two", 3))
    drawn.clear()
    for rank in range(3):
        draw_samples(generate, run, tmp_path / "two", rank=rank, processes=3)
    assert drawn == [20, 21, 22, 23, 24]


def test_mistakes_are_told(
    forms: SimpleNamespace, network: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["evaluate", "generation", str(photos), "--network", network, "--reference", str(photos), "--device", "cpu"]
    assert main([*base, "--sweep", "guidance=1,2"]) == 2
    assert "holds images" in capsys.readouterr().err
    with pytest.raises(ValueError, match="seed=1"):
        sweep_points(["seed=1"])
    with pytest.raises(ValueError, match="takes numbers"):
        sweep_points(["top_k=many"])
    assert sweep_points(None) == [{}]
    text = ["evaluate", "generation", str(forms.folder), *base[3:], "--clip", "nowhere"]
    assert main(text) == 2
    assert "reads no text" in capsys.readouterr().err


def test_a_tokenizer_is_measured(
    forms: SimpleNamespace, network: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tokenizer"
    command = ["evaluate", "tokenizer", str(forms.folder), "--data", str(photos), "--network", network]
    assert main([*command, "--device", "cpu", "--out", str(out), "--batch-size", "10"]) == 0
    content = json.loads((out / "figures.json").read_text())
    tokenizer = forms.model.tokenizer
    names = sorted(photos.iterdir(), key=lambda path: path.name)
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(name)) for name in names])).permute(0, 3, 1, 2) / 255
    tokens = tokenizer.encode(pixels * 2 - 1)
    rebuilt = (tokenizer.decode(tokens) + 1) / 2
    psnr = -10 * (pixels - rebuilt).square().flatten(1).mean(1).log10()
    assert content["images"] == 24
    assert content["psnr"] == pytest.approx(float(psnr.mean()), rel=1e-4)
    a, b = (each.mean((2, 3)).double().numpy() for each in (rebuilt, pixels))
    import scipy.linalg

    covariances = [np.cov(each, rowvar=False) for each in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert content["rfid"] == pytest.approx(expected, rel=1e-3)
    shares = np.bincount(tokens[:, 5:].flatten().numpy(), minlength=32) / tokens[:, 5:].numel()
    entropy = -sum(share * np.log2(share) for share in shares if share)
    last = content["usage"]["per_scale"][-1]
    assert (last["tokens"], last["entropy"]) == (24 * 16, pytest.approx(entropy))
    assert (out / "usage.png").is_file() and (out / "images.png").is_file()
    assert "entropy, bits" in capsys.readouterr().out


def test_bits_are_counted_by_themselves() -> None:
    from nextscale.evaluation.bit_usage import BitUsage

    usage = BitUsage(3, 1)
    usage.update(
        [torch.tensor([[[True, False, True], [True, True, False]], [[True, False, False], [True, True, True]]])]
    )
    scale = usage.per_scale()[0]
    assert scale.tokens == 4
    assert [scale.used, scale.entropy] == pytest.approx([2 / 3, 2])
    with pytest.raises(ValueError, match="expected 1 of 3 bits"):
        usage.update([torch.zeros(1, 2, dtype=torch.bool)])


def test_images_of_an_npz_are_the_reference(photos: Path, network: str, tmp_path: Path) -> None:
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(photos.iterdir())])
    np.savez(tmp_path / "real.npz", arr_0=pixels)
    assert len(NpzImages(tmp_path / "real.npz")) == 24
    command = ["evaluate", "generation", str(photos), "--network", network, "--device", "cpu"]
    assert main([*command, "--reference", str(tmp_path / "real.npz"), "--out", str(tmp_path / "out")]) == 0
    found = figures(tmp_path / "out")[0]
    assert found["fid"] == pytest.approx(0, abs=1e-9)
    assert (found["precision"], found["recall"]) == (1, 1)
