"""``nextscale shape``: meshes of classes, pictures and texts, with pictures, turntables and a page."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from nextscale.cli import main
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import TransformerConfig
from nextscale.tasks.shapes.g3pt import G3PT, G3PTConfig
from nextscale.tasks.shapes.g3pt_tokenizer import PointTokenizer, PointTokenizerConfig
from nextscale.tasks.shapes.g3pt_tokenizer_training import initialize as initialize_tokenizer
from nextscale.tasks.shapes.g3pt_training import initialize
from nextscale.tasks.shapes.pictures import LearnedEncoderConfig
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizerConfig

SCHEDULE = ScaleSchedule.counts(1, 3)
Run = Callable[..., str]


def ball_drawer() -> G3PT:
    """A model with random weights, but for the readout: what it draws is near a ball."""
    torch.manual_seed(0)
    config = PointTokenizerConfig(16, 2, 4, 32, 1, 1, 3, 1.0, BitwiseQuantizerConfig(4), SCHEDULE)
    tokenizer = initialize_tokenizer(PointTokenizer(config))
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(4096, 3, generator=generator) * 2 - 1
    bits = torch.rand(8, SCHEDULE.length, 4, generator=generator) > 0.5
    tail = [*tokenizer.readout.parameters(), *tokenizer.head.parameters(), *tokenizer.query_encoding.parameters()]
    optimizer = torch.optim.Adam(tail, 1e-2)
    hidden = tokenizer.decode(bits).detach()
    for step in range(60):
        part = points[64 * step % 4096 :][:64].expand(8, -1, -1)
        logits = tokenizer.occupancy(hidden, part)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, (part.norm(dim=-1) < 0.6).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    told = {"classes": 2, "class_names": ("chair", "office table"), "picture_width": 8}
    config = G3PTConfig(
        TransformerConfig(16, 1, 2, conditioning="shared"),
        16,
        4,
        SCHEDULE,
        learned=LearnedEncoderConfig(8, 8, 2),
        **told,
    )
    return initialize(G3PT(config, tokenizer))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ball_drawer().save(tmp_path_factory.mktemp("models") / "g3pt")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> Run:
    """What `nextscale shape` prints, in a folder with `a chair.png`."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (12, 9), (200, 90, 10)).save("a chair.png")

    def typed(line: str, status: int = 0) -> str:
        argv = ["shape", "--model", str(model), "--resolution", "16", "--size", "24", *shlex.split(line)]
        assert main(argv) == status, capsys.readouterr()
        out, err = capsys.readouterr()
        return err if status else out

    return typed


def test_classes_into_a_folder(run: Run) -> None:
    told = run("--class chair office-table --num 2 --out out --format obj --turntable gif --page --seed 5")
    names = [
        f"{name}-{seed:04d}" for name, seed in (("chair", 5), ("chair", 6), ("office-table", 7), ("office-table", 8))
    ]
    assert [line.split(":")[0] for line in told.splitlines()] == [f"out/{name}.obj" for name in names] + [
        "out/page.html"
    ]
    mesh = trimesh.load("out/chair-0005.obj")
    assert mesh.is_watertight and np.abs(mesh.vertices).max() < 1.05
    assert Image.open("out/chair-0005.png").size == (24, 24) and Path("out/chair-0005-turn.gif").is_file()
    record = json.loads(Path("out/shape.json").read_text())
    assert record["files"]["shapes"][3]["condition"] == "office-table" and record["settings"]["resolution"] == 16
    again = run("--class 0 chair --out out --format obj --seed 5 --picture false")
    assert [line.split(":")[0] for line in again.splitlines()] == ["out/0-0005.obj", "out/chair-0006-0001.obj"]


def test_a_picture_into_one_file(run: Run) -> None:
    run("--image 'a chair.png' --out 'mein stück.glb' --largest --guidance 0")
    assert trimesh.load("mein stück.glb").geometry and Path("mein stück.png").is_file()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--out x", "say what to make by one of --class, --image and --prompt"),
        ("--class chair --image 'a chair.png'", "say what to make by one of"),
        ("--class chair --num 2 --out one.glb", "is one file, 2 shapes are asked for"),
        ("--class chair --out one.fbx", "meshes are written as .glb"),
        ("--class chair --format off", "--format is 'off'"),
        ("--class chair --turntable mp4", "--turntable is 'mp4'"),
        ("--class chair --num 0", "--num is 0; expected 1 or more"),
        ("--class chair --resolution 1", "--resolution is 1; expected 2 or more"),
        ("--class sofa", "no class is called 'sofa'"),
        ("--image none.png", "none.png: no such picture"),
        ("--prompt 'a chair'", "not told by --prompt; give --class or --image"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_line(run: Run, line: str, words: str) -> None:
    told = run(line, status=2)
    assert words in told and told.count("\n") == 1
