"""``nextscale restore``: photographs of every kind, taken up where it was stopped."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.cli import main
from nextscale.tasks.restoration.tiling import TileStore
from nextscale.tasks.restoration.varformer import VarFormer, VarFormerConfig

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forms) -> Run:
    """What a command prints, in a folder with `photo.png` and a model that gives back what it is given."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (21, 37, 3), np.uint8)).save("photo.png")
    model = VarFormer(VarFormerConfig(1, 4, 1, decoder_blocks=1, window_groups=1), forms.build())
    with torch.no_grad():
        model.decoder.input_share.fill_(1)
    model.save("model")

    def typed(line: str, status: int = 0) -> str:
        assert main(shlex.split(line)) == status, capsys.readouterr()
        out, err = capsys.readouterr()
        return err if status else out + err

    return typed


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_a_photo_is_restored_once(run):
    told = run("restore photo.png --model model --out out --batch-size 3")
    assert "out/photo.png: 37 x 21 pixels in " in told and "s per megapixel" in told
    assert np.array_equal(pixels("out/photo.png"), pixels("photo.png"))
    assert not Path("out/.restoring").exists()
    assert json.loads(Path("out/restore.json").read_text())["photo"]["model"] == "model"
    assert "restored before, out/photo.png" in run("restore photo.png --model model --out out")
    # Another setting, or another photo of that name, is another result; the first one is kept.
    assert "out/photo-0001.png" in run("restore photo.png --model model --out out --overlap 0")


def test_photos_of_every_kind(run):
    rgb = Image.open("photo.png")
    folder = Path("photos/deep")
    folder.mkdir(parents=True)
    rgb.convert("L").save(folder / "grey.png")
    rgb.convert("RGBA").save(folder / "alpha.png")
    rgb.convert("CMYK").save(folder / "print.tif")
    Image.fromarray(np.arange(35, dtype=np.uint16).reshape(5, 7) * 1800).save(folder / "sixteen.png")
    rgb.crop((0, 0, 1, 1)).save(folder / "pixel.png")
    exif = rgb.getexif()
    exif[0x0112] = 6  # on its side
    rgb.save(folder / "turned.png", exif=exif)
    told = run("restore photos photo.png --model model --out out")
    assert "has 16 bits a channel" in told
    sizes = {path.stem: Image.open(path).size for path in Path("out").rglob("*.png")}
    assert sizes == {
        **dict.fromkeys(("grey", "alpha", "print", "photo"), (37, 21)),
        "sixteen": (7, 5),
        "pixel": (1, 1),
        "turned": (21, 37),
    }
    assert np.array_equal(pixels("out/deep/turned.png"), np.rot90(pixels("photo.png"), -1))


def test_an_interruption_leaves_rows_and_no_file(run, monkeypatch):
    write, written = TileStore.write, []

    def stop(self, top, strip, seams):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(top)
        write(self, top, strip, seams)

    with monkeypatch.context() as patched:
        patched.setattr(TileStore, "write", stop)
        assert "interrupted" in run("restore photo.png --model model --out out --batch-size 1", 130)
    assert not list(Path("out").glob("*.png")) and len(list(Path("out/.restoring/photo").iterdir())) == 1
    monkeypatch.setattr(TileStore, "write", lambda self, *row: (written.append(row[0]), write(self, *row)))
    run("restore photo.png --model model --out out --batch-size 1")
    assert len(set(written)) == len(written) == 2  # each row once
    assert np.array_equal(pixels("out/photo.png"), pixels("photo.png")) and not Path("out/.restoring").exists()


def test_what_is_refused(run):
    Path("broken.png").write_bytes(b"\x89PNG nothing")
    told = run("restore broken.png photo.png --model model --out out", 2)
    assert "1 of 2 photos could not be restored: broken.png cannot be decoded" in told
    assert Path("out/photo.png").is_file()
    assert "no such file or folder" in run("restore nothing.png --model model", 2)
    assert "--batch-size is 0" in run("restore photo.png --model model --batch-size 0", 2)
    assert "half a tile of 16" in run("restore photo.png --model model --overlap 9", 2)
    Image.open("photo.png").save("photo.bmp")
    assert "would both become photo.png" in run("restore photo.png photo.bmp --model model", 2)


def test_other_models_restore_nothing(run, forms):
    assert "which restores no photos" in run(f"restore photo.png --model {forms.folder}", 2)


def test_without_a_model_that_ships_one_is_to_be_named(run, monkeypatch):
    monkeypatch.setattr("nextscale.models.MODELS", {})
    assert "no restorer ships with this library: name one by --model" in run("restore photo.png", 2)
