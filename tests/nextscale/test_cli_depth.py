"""``nextscale depth``: photos of any kind, results of any form, and what is there already."""

import io
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.cli import main
from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import TransformerConfig
from nextscale.pictures import depth_picture, depth_png
from nextscale.tasks.depth.depthart import DepthART, DepthARTConfig
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    schedule = ScaleSchedule.squares(1, 2, 4)
    shape = AutoencoderConfig(channels=32, multipliers=(1, 1), blocks=1, latent_channels=4)
    tokenizer = ResidualVQ(ResidualVQConfig(shape, QuantizerConfig(vocabulary=16, channels=4), schedule))
    config = DepthARTConfig(
        TransformerConfig(16, 1, 1, attention="dot"), vocabulary=16, code_channels=4, schedule=schedule
    )
    model = DepthART(config, tokenizer)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save("small")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(pixels).save(photos / "colour.png")
    Image.fromarray(pixels[..., 0]).save(photos / "grey.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(photos / "deep.png")
    Image.fromarray(np.dstack((pixels, pixels[..., :1]))).save(photos / "alpha.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(photos / "turned.jpg", exif=turned)

    def typed(line: str, status: int = 0) -> str:
        assert main(shlex.split(line)) == status, capsys.readouterr()
        out, err = capsys.readouterr()
        return out + err

    return typed


def test_every_kind_of_photo_in_every_form(run):
    assert "5 depth maps (relative)" in run(
        "depth photos --model small --out out --save png npy picture points view --points 50"
    )
    for name in ("colour", "grey", "deep", "alpha", "turned"):
        depth = np.load(f"out/{name}.npy")
        assert depth.shape == ((30, 20) if name == "turned" else (20, 30)) and depth.dtype == np.float32
        steps = np.asarray(Image.open(f"out/{name}-depth.png"))
        assert steps.dtype == np.uint16 and np.abs(steps / 65535 - depth).max() < 2e-5
        for end in ("-colours.png", "-view.png"):
            assert np.asarray(Image.open(f"out/{name}{end}")).shape == (*depth.shape, 3)
        assert Path(f"out/{name}.ply").read_bytes().startswith(b"ply")
    assert json.loads(Path("out/depth.json").read_text())["depth"]["unit"] == "relative"


def test_what_is_there_is_not_made_again(run):
    run("depth photos/colour.png photos/grey.png --model small --out out --save npy")
    before = Path("out/grey.npy").stat().st_mtime_ns
    Path("out/colour.npy").unlink()
    assert "1 depth map (relative) in out, 1 were there already" in run(
        "depth photos/colour.png photos/grey.png --model small --out out --save npy"
    )
    assert Path("out/grey.npy").stat().st_mtime_ns == before
    assert "already" in run("depth photos/colour.png photos/grey.png --model small --out out --save npy")
    assert "seed was 0, now 3" in run("depth photos --model small --out out --save npy --seed 3", 2)
    run("depth photos --model small --out out --save npy --seed 3 --overwrite")


def test_a_damaged_photo_is_told_and_the_others_are_done(run):
    Path("photos/broken.png").write_bytes(b"nothing")
    said = run("depth photos --model small --out out --save npy", 2)
    assert "5 depth maps" in said and "broken.png" in said and Path("out/turned.npy").is_file()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("photos --model small --save gif", "gif"),
        ("photos --model small --samples 0", "samples"),
        ("photos --model small --png-scale 0", "png-scale"),
        ("photos --model small --fov 190", "190"),
        ("photos --model small --camera 1 2", "four numbers"),
        ("photos/grey.png --model small --pick best", "best"),
        ("photos/grey.png --model small --colormap nothing", "nothing"),
        ("photos/grey.png --model var-cifar10", "no depth"),
        ("photos/none.png --model small", "none.png"),
    ],
)
def test_mistakes_are_told_in_one_line(run, line, said):
    assert said in run(f"depth {line}", 2).splitlines()[-1]


def test_two_photos_of_one_name_are_refused(run):
    Image.new("RGB", (8, 8)).save("photos/grey.jpg")
    assert "the same files" in run("depth photos --model small", 2)


def test_unknown_depth_is_zero_and_black():
    depth = torch.tensor([[1.0, 2.0, 0.0], [float("nan"), float("inf"), 500.0]])
    values = np.asarray(Image.open(io.BytesIO(depth_png(depth, 256))))
    assert values.tolist() == [[256, 512, 0], [0, 0, 65535]]
    picture = depth_picture(depth)
    assert (picture[:, 0, 2] == 0).all() and (picture[:, 1, :2] == 0).all() and picture[:, 0, 0].any()
