"""The command line: help at once, errors in one line, and what a user types gives what is promised."""

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import nextscale
from nextscale.cli import COMMANDS, main
from nextscale.cli.parsing import parse_classes
from nextscale.core.checkpoint import read_tensors
from nextscale.tasks.generation.drawing import draw

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """What a command prints; `status` is what is expected of it, and errors are one line on standard error."""
    monkeypatch.chdir(tmp_path)

    def typed(line: str, status: int = 0) -> str:
        assert main(shlex.split(line)) == status, capsys.readouterr()
        out, err = capsys.readouterr()
        if status:
            assert not out and err.startswith("nextscale: ") and err.count("\n") == 1
            return err
        return out + err

    return typed


# --- help and errors ----------------------------------------------------------------------------------


def test_help_answers_at_once_without_pytorch() -> None:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "nextscale.cli", "--help"], capture_output=True, text=True
        )
        times.append(time.perf_counter() - began)
        assert done.returncode == 0 and all(name in done.stdout for name in COMMANDS)
        assert "| torch\n" not in done.stderr and "numpy" not in done.stderr
    print(f"--help: {min(times):.2f} s")
    assert min(times) < 1.5


def test_commands_are_read_without_pytorch() -> None:
    code = (
        "import sys; from nextscale.cli import main\n"
        "for line in ('', '--help', '--version', 'list', 'nonsense', 'generate', 'edit --help', 'tokenize --help',"
        " 'convert --help', 'info --help', 'bench --help', 'demo --help', 'generate x --num y'):\n"
        "    main(line.split())\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1] == "False", done.stderr[-500:]


def test_nothing_typed_shows_help(run: Run) -> None:
    assert run("") == run("--help")
    assert run("--version") == f"nextscale {nextscale.__version__}\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nonsense", "invalid choice: 'nonsense'.*See `nextscale --help`"),
        ("list a b", "unrecognized arguments: b.*`nextscale list --help`"),
        ("list zzz", "no model's name matches 'zzz'; there are var-cifar10"),
        ("generate nix", "'nix' is no file, no folder and no model's name"),
        ("generate MODEL --num many", "--num is 'many'; expected int. See `nextscale generate --help`"),
        ("generate MODEL --num 0", "--num is 0; expected 1 or more"),
        ("generate MODEL --top-p 2", "--top-p is 2.0; expected 0 to 1"),
        ("generate MODEL --temperature 0", "--temperature is 0.0; expected more than 0"),
        ("generate MODEL --classes zebra", "no class is called 'zebra'"),
        ("generate MODEL --classes 11", "class 11 does not exist: classes are 0 to 9"),
        ("generate MODEL --classes 9-3", "run backwards; write 3-9"),
        ("generate MODEL --device tpu", "no device 'tpu'"),
        ("generate TOKENIZER", "is a ResidualVQ, which draws no images"),
        ("edit MODEL x.png", "say what is drawn anew: --box"),
        ("edit MODEL x.png --box 0,0,1,1", "x.png: No such file or directory"),
        ("edit MODEL x.png --box 1,2,3", "--box is '1,2,3'; expected top,left,bottom,right"),
        ("edit MODEL x.png --box 0,0,.5,.5 --mode class", "--mode class needs --class"),
        (
            "tokenize MODEL x out --size 20",
            "--size is 20, but the scales '1 2 4' stand for 16 pixels; let them end at 5",
        ),
        ("tokenize MODEL . out --views 2 --crop center", "are all the same"),
        ("convert TOKENIZER out --part transformer", "has no transformer"),
        ("convert MODEL out.pth", "var_d1.pth and vae_ch32v32z8.pth are two files"),
        ("convert MODEL .", "there already|TAKEN"),
        ("train var", "give either data .images. or tokens"),
        ("train var --tokens x --tokenizer nix", "'nix' is no file, no folder"),
        (
            "train var --tokens x --tokenizer TOKENIZER --training.batch-size x",
            "batch_size.*nextscale train var --help",
        ),
        ("train var --tokens x --tokenizer TOKENIZER", "x holds no index.json"),
        ("train tokenizer --config nix.yaml", "nix.yaml"),
        ("bench MODEL --repeat 0", "numbers of 1 or more"),
        ("info EMPTY", "is empty"),
    ],
)
def test_errors_are_one_line(run: Run, forms: SimpleNamespace, tmp_path: Path, line: str, expected: str) -> None:
    (tmp_path / "EMPTY").touch()
    (tmp_path / "TAKEN").touch()
    line = line.replace("MODEL", str(forms.folder)).replace("TOKENIZER", str(forms.tokenizer))
    assert re.search(expected, run(line, status=2))


def test_a_traceback_on_request(forms: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXTSCALE_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="nix"):
        main(["info", "nix"])


def test_an_interruption_is_told_by_its_own_status(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nextscale.cli.listing.run", stop)
    assert run("list", status=130) == "nextscale: interrupted\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m nextscale.cli list | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# --- list and info ------------------------------------------------------------------------------------


def test_list_and_info_of_names(run: Run) -> None:
    assert "hub: FoundationVision/var" in run("list d16") and "MIT" in run("list d16")
    text = run("info var-d36")
    assert "file var_d36.pth; not on this machine" in text and "MIT" in text


def test_info_of_every_form(run: Run, forms: SimpleNamespace) -> None:
    count = sum(p.numel() for n, p in forms.model.named_parameters() if not n.startswith("tokenizer."))
    for path in (forms.folder, forms.transformer, forms.checkpoint):
        text = run(f"info {path}")
        assert f"({count:,}) in float32" in text and "1 2 4 (21 tokens)" in text and "width 32, depth 1" in text
    assert re.search(r"  epoch +7\n", text) and "bs=768" in text and "var_wo_ddp, vae_local" in text
    codes = sum(p.numel() for p in forms.model.tokenizer.parameters())
    assert f"({codes:,}) in float32" in text, "the training checkpoint's tokenizer is told too"
    text = run(f"info {forms.tokenizer} --entries")
    assert "quantize.embedding.weight  32 x 8  float32" in text and "published weights of residual-vq: MIT" in text


# --- generate and edit --------------------------------------------------------------------------------


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened)


def test_batches_are_those_of_generate(forms: SimpleNamespace) -> None:
    options = {"guidance": 2.0, "top_k": 5, "top_p": 0.9, "temperature": 1.1}
    expected = forms.model.generate([None, "cat"], 5, seed=3, batch_size=2, **options)
    parts = list(draw(forms.model, [None, "cat"], 5, 3, batch_size=2, forming=3, **options))
    assert torch.equal(torch.cat([part.images for part in parts]), expected)
    assert [part.seeds for part in parts] == [[3, 4], [5, 6], [7]]
    assert [part.forming is not None and part.forming.shape[1] for part in parts] == [2, 1, False]
    assert torch.equal(parts[0].forming[-1], parts[0].images)
    decoded = forms.model.tokenizer.decode(parts[0].tokens, forms.model.config.schedule)
    assert torch.allclose((decoded + 1) / 2, parts[0].images, atol=1e-5)


def test_generate_writes_pictures_and_what_repeats_them(run: Run, forms: SimpleNamespace, tmp_path: Path) -> None:
    line = f"generate {forms.folder} --classes cat 8-9,none --num 5 --seed 4 --animate --tokens --out o --batch-size 2"
    assert "5 images in o: image-0000.png to image-0004.png" in run(line)
    names = {f"image-000{i}.png" for i in range(5)} | {"sheet.png", "forming.webp", "forming.png", "tokens.npz"}
    assert {path.name for path in (tmp_path / "o").iterdir()} == names | {"generate.json"}
    record = json.loads((tmp_path / "o" / "generate.json").read_text())
    settings, files = record["settings"], record["files"]
    assert files["labels"] == [3, 8, 9, 10, 3] and files["seeds"] == [4, 5, 6, 7, 8]
    keys = ("guidance", "top_k", "top_p", "temperature", "smooth")
    again = forms.model.generate(settings["classes"], 5, seed=settings["seed"], **{k: settings[k] for k in keys})
    for image, name in zip(again, files["images"], strict=True):
        expected = (image * 255 + 0.5).floor().byte().permute(1, 2, 0).numpy()
        assert np.abs(pixels(tmp_path / "o" / name).astype(int) - expected).max() <= 1
    with np.load(tmp_path / "o" / "tokens.npz", allow_pickle=False) as tokens:
        assert tokens["tokens"].shape == (5, 21) and tokens["scales"].tolist() == [[1, 1], [2, 2], [4, 4]]
    with Image.open(tmp_path / "o" / "forming.webp") as moving:
        assert moving.n_frames == 3
    before = {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    run(f"generate {forms.transformer} --num 1 --out o --sheet false")
    after = {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    assert after.keys() - before.keys() == {"image-0005.png", "generate-0001.json"}
    assert {name: after[name] for name in before} == before, "nothing is overwritten"


def test_classes_as_they_are_typed() -> None:
    assert parse_classes(None, 10) is None
    assert parse_classes(["3", "tiger cat,7", "1-3", "None", "random"], 10) == [3, "tiger cat", 7, 1, 2, 3, 10, None]
    with pytest.raises(ValueError, match="no class is named"):
        parse_classes([","], 10)


def test_edit_keeps_what_is_to_stay(run: Run, forms: SimpleNamespace, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "photo.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[1, 1] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    text = run(f"edit {forms.folder} photo.png --box 0,0,0.5,0.5 --num 3 --out e --batch-size 2")
    assert "photo.png is 30 x 20 pixels; it is resized to the model's 16 x 16, its centre cropped" in text
    assert "inpaint-0000.png to inpaint-0002.png" in text
    run(f"edit {forms.folder} photo.png --mask mask.png --num 3 --out m")
    run(f"edit {forms.folder} photo.png --box 0,0,0.5,0.5 --mode outpaint --num 1 --out e")
    run(f"edit {forms.folder} photo.png --box 0,0,0.5,0.5 --mode class --class dog --num 1 --out e")
    record = json.loads((tmp_path / "e" / "edit.json").read_text())
    assert record["settings"]["box"] == [0.0, 0.0, 0.5, 0.5] and record["files"]["images"][0] == "inpaint-0000.png"
    assert len(list((tmp_path / "e").glob("*.png"))) == 8
    from nextscale.cli.edit import read_mask

    assert read_mask(str(tmp_path / "mask.png"), (4, 4)).tolist() == [[0, 1, 1, 1], *[[1] * 4] * 3]
    assert "leaves nothing to keep" in run(f"edit {forms.folder} photo.png --box 0,0,1,1", status=2)


# --- tokenize, convert, bench -------------------------------------------------------------------------


def test_convert_there_and_back(run: Run, forms: SimpleNamespace, tmp_path: Path) -> None:
    run(f"convert {forms.folder} official")
    official = tmp_path / "official"
    assert sorted(p.name for p in official.iterdir()) == ["vae_ch32v32z8.pth", "var_d1.pth"]
    expected = forms.model.to_official()
    written = torch.load(official / "var_d1.pth", weights_only=True)
    assert written.keys() == expected.keys() and all(torch.equal(written[k], expected[k]) for k in expected)
    run(f"convert {official}/var_d1.pth own")
    assert read_tensors(tmp_path / "own" / "model.safetensors").keys() == forms.model.state_dict().keys()
    run(f"convert {forms.checkpoint} apart --to official")
    taken = torch.load(tmp_path / "apart" / "var_d1.pth", weights_only=True)
    assert all(torch.equal(taken[k], expected[k]) for k in expected)
    run(f"convert {forms.checkpoint} tok --part tokenizer")
    assert json.loads((tmp_path / "tok" / "config.json").read_text())["system"] == "residual-vq"
    run("convert own only.pth --part transformer")
    assert (tmp_path / "only.pth").is_file()
    assert "is there already" in run("convert own tok", status=2)


def test_bench_tells_figures(run: Run, forms: SimpleNamespace, tmp_path: Path) -> None:
    text = run(f"bench {forms.folder} --batch-sizes 2 --repeat 1 --json figures.json --device cpu")
    assert "images/s" in text and "threads" in text
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"][0]
    assert figures["batch"] == 2 and 0 < figures["decoding_seconds"] < figures["seconds"]
