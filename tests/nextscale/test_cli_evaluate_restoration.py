"""``nextscale evaluate restoration``: figures of methods, folders and models, kept image by image."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nextscale
from nextscale.cli import main
from nextscale.cli.evaluate_restoration import classical
from nextscale.core.interrupt import Interrupted
from nextscale.tasks.restoration.evaluation import Setting, evaluate, open_examples, summary


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), np.uint8)
        path = tmp_path / "photos" / f"deep/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((40, 32), Image.Resampling.BICUBIC).save(path)
    return tmp_path / "photos"


def figures(out: str, name: str = "deep/0") -> dict:
    return json.loads(Path(out, "images", f"{name}.json").read_text())


def test_a_method_and_a_folder_of_its_images_agree(photos, capsys) -> None:
    command = ["evaluate", "restoration", "classical:tv", "--dataset", "photos", "--degradation", "noise25", "--save"]
    assert main([*command, "--out", "a"]) == 0
    said = capsys.readouterr().out
    assert "photos, noise25, 3 images, basicsr, RGB" in said and "seconds per megapixel" in said
    assert all(Path("a", name).is_file() for name in ("run.json", "summary.json", "table.md", "figures.png"))
    assert Image.open("a/sheets/deep/1.png").width > 4 * 40
    means = json.loads(Path("a/summary.json").read_text())
    assert means["output"]["psnr"] > means["input"]["psnr"] + 2 and means["images"] == 3
    assert main(["evaluate", "restoration", "a/restored", *command[3:-1], "--out", "b"]) == 0
    first, second = figures("a"), figures("b")
    assert first["output"] == second["output"] and first["input"] == second["input"] and second["seconds"] is None

    # An image is degraded alike whatever else is measured.
    assert main([*command, "--out", "c", "--limit", "1"]) == 0
    assert figures("c")["input"] == first["input"]

    # A prediction that is exchanged is measured again; the others are not.
    shutil.copy("photos/deep/0.png", "a/restored/deep/0.png")
    kept = Path("b/images/deep/1.json").stat().st_mtime_ns
    assert main(["evaluate", "restoration", "a/restored", *command[3:-1], "--out", "b"]) == 0
    assert figures("b")["output"]["psnr"] is None and Path("b/images/deep/1.json").stat().st_mtime_ns == kept
    assert "1 images equal the truth" in capsys.readouterr().out


def test_results_of_other_settings_are_not_mixed(photos, capsys) -> None:
    command = ["evaluate", "restoration", "classical:none", "--dataset", "photos", "--degradation", "jpeg10"]
    assert main([*command, "--limit", "1"]) == 0
    assert main([*command, "--limit", "2"]) == 0
    assert main([*command, "--channel", "y"]) == 2
    assert "channel 'rgb' there, 'y' now" in capsys.readouterr().err


def test_paired_folders_and_published_figures(photos, capsys) -> None:
    shutil.copytree(photos / "deep", "LOL/eval15/high")
    shutil.copytree(photos / "deep", "LOL/eval15/low")
    for path in Path("LOL/eval15/low").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) // 4).save(path)
    command = ["evaluate", "restoration", "classical:gamma:gamma=0.5", "--dataset", "lol:LOL", "--protocol", "airnet"]
    assert main([*command, "--crop", "2", "--channel", "y", "--squash", "48", "--sheets", "0"]) == 0
    said = capsys.readouterr()
    assert "3 images; 15 were published" in said.err
    assert "VarFormer, published" in said.out and "25.13" in said.out and "check against the paper" in said.out
    assert figures("out/evaluation", "low/0")["width"] == 48 and not Path("out/evaluation/sheets").exists()


def test_what_is_wrong_is_told_before_anything_starts(photos, capsys) -> None:
    clean = ["--dataset", "photos"]
    noisy = [*clean, "--degradation", "noise25"]
    (photos / "deep/9.png").write_bytes(b"no image")
    for arguments, message in (
        (["classical:tv", *noisy], "1 files cannot be read: photos/deep/9.png"),
        (["classical:tv", *clean], "say with a degradation"),
        (["classical:tv", "--dataset", "photos,photos", "--degradation", "noise25"], "degraded images of its own"),
        (["classical:tv", *clean, "--degradation", "fog"], "'fog' is no degradation"),
        (["classical:tv", *noisy, "--lpips-weights", "x"], "needs both"),
        (["classical:tv", *noisy, "--limit", "0"], "limit 0"),
        (["classical:bm3d", *noisy, "--limit", "1"], "no classical method 'bm3d'"),
        (["var-cifar10", *noisy, "--limit", "1"], "var-cifar10 is a VAR, which restores no images"),
        (["nowhere", *noisy, "--limit", "1"], "nowhere"),
        (["photos", "--dataset", "nothing", "--degradation", "noise25"], "no such folder"),
    ):
        assert main(["evaluate", "restoration", *arguments]) == 2
        assert message in capsys.readouterr().err
    Path("less").mkdir()
    shutil.copy("photos/deep/0.png", "less/0.png")
    (photos / "deep/9.png").unlink()
    assert main(["evaluate", "restoration", "less", *noisy]) == 2
    assert "less lacks 2 of 3 restored images: deep/1, deep/2" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_model_is_given_its_options(photos, monkeypatch, capsys) -> None:
    class Model:
        def restore(self, image: torch.Tensor, *, overlap: int = 8) -> torch.Tensor:
            assert image.shape == (3, 32, 40) and overlap == 4
            return image * 0.5

    monkeypatch.setattr(nextscale, "load", lambda source, **options: Model())
    command = ["evaluate", "restoration", "mine", "--dataset", "photos", "--degradation", "noise25", "--overlap", "4"]
    assert main(command) == 0
    assert json.loads(Path("out/evaluation/run.json").read_text())["model"] == "mine overlap=4"
    assert main([*command, "--batch-size", "2"]) == 2
    assert "mine takes no batch" in capsys.readouterr().err


def test_it_stops_and_goes_on(photos) -> None:
    setting = Setting("photos", "noise25")
    _, examples = open_examples(setting)
    calls = []

    def restore(image: torch.Tensor) -> torch.Tensor:
        calls.append(image)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return image

    with pytest.raises(Interrupted, match="after 2 of 3 images"):
        list(evaluate(restore, examples, "out", "me"))
    results = list(evaluate(restore, examples, "out", "me"))
    assert len(calls) == 3 and [result.images is None for result in results] == [True, True, False]
    assert summary(results)["output"] == summary(results)["input"]

    # A damaged record is made anew.
    Path("out/images/deep/1.json").write_text("{")
    list(evaluate(restore, examples, "out", "me"))
    assert len(calls) == 4


def test_the_kernel_of_a_known_blur_is_used(photos) -> None:
    setting = Setting("photos", "defocus:radius=2")
    _, (example, *_) = open_examples(setting)
    degraded, clean = example.load()

    def error(text: str) -> float:
        return (classical(text, setting)(degraded) - clean).square().mean().item()

    assert error("lucy:steps=5") < error("none") / 2
    assert error("lucy:steps=5,sigma=3") > 1.5 * error("lucy:steps=5")
