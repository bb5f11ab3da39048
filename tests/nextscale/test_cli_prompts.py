"""Prompts at the command line: pictures of texts, and options refused where they mean nothing."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nextscale.cli import main
from nextscale.cli.prompts import read_prompts
from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.infinity import Infinity
from nextscale.tasks.generation.infinity_config import InfinityConfig
from nextscale.tasks.generation.infinity_training import initialize
from nextscale.tasks.generation.infinity_transformer import InfinityBlocksConfig
from nextscale.tasks.generation.text import TextEncoderConfig
from nextscale.tasks.generation.text_small import make_encoder
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizerConfig
from nextscale.tasks.tokenizers.bitwise_vq import BitwiseVQ, BitwiseVQConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of 8 x 8 pixels that reads prompts."""
    root = tmp_path_factory.mktemp("prompts")
    encoder = make_encoder(root / "words", ["a red fox by the sea"], width=16)
    schedule = ScaleSchedule.squares(1, 2, 4)
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(32, (1, 1), 1, 4, attention=False)
    config = InfinityConfig(
        InfinityBlocksConfig(16, 1, 2, 2.0), text_width=16, text_length=16, pool_heads=2, token_bits=4,
        schedule=schedule, text=TextEncoderConfig(str(encoder), max_length=16),
    )  # fmt: skip
    model = Infinity(config, BitwiseVQ(BitwiseVQConfig(autoencoder, BitwiseQuantizerConfig(4), schedule)))
    saved = initialize(model, modulation=1, gate=1, head=1).eval().save(root / "model")
    assert json.loads((saved / "config.json").read_text())["config"]["transformer"]["text"]["name"] == "words"
    return saved


def typed(line: str, capsys: pytest.CaptureFixture[str], status: int = 0) -> str:
    assert main(shlex.split(line)) == status, capsys.readouterr()
    return "".join(capsys.readouterr())


def test_pictures_of_prompts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a red fox\n\nthe sea\n")
    out = tmp_path / "out"
    line = f"generate {folder} --prompts {tmp_path / 'prompts.txt'} --prompt 'a fox' --num 4 --seed 3 --out {out}"
    said = typed(f"{line} --animate --tokens --negative-prompt sea --temperature 0.7 --batch-size 3", capsys)
    assert f"4 images in {out}: image-0000.png to image-0003.png" in said
    record = json.loads((out / "generate.json").read_text())
    assert record["settings"]["prompts"] == ["a fox", "a red fox", "the sea"]
    assert record["settings"]["temperature"] == 0.7
    assert record["files"]["seeds"] == [3, 4, 5, 6]
    with np.load(out / "tokens.npz") as file:
        assert file["tokens"].shape == (4, 21, 1)
        assert np.unpackbits(file["tokens"], axis=-1, count=int(file["bits"])).shape == (4, 21, 4)
    assert {"sheet.png", "forming.webp", "forming.png"} <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "draws prompts: give --prompt or --prompts FILE"),
        ("--prompt fox --classes 3", "--classes and --smooth are not for"),
        ("--prompt fox --smooth", "--classes and --smooth are not for"),
        ("--prompt fox --ratio 16-9 --size 256", "expected width:height such as 16:9"),
        ("--prompt fox --size 300", "size is '300'; expected 0.06M"),
        ("--prompt fox --text-bits 8", "8 bits needs the package"),
        ("--prompts nowhere.txt", "nowhere.txt"),
    ],
)
def test_errors_are_one_line(options: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = typed(f"generate {folder} {options}", capsys, status=2)
    assert message in error
    assert error.count("\n") == 1


def test_a_model_of_classes_reads_no_prompts(forms: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--prompt is for models that read text" in typed(f"generate {forms.folder} --prompt fox", capsys, status=2)


def test_files_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "two", "seed": 1}\n')
    assert read_prompts(path) == ["one", "two"]
    path.write_text('{"text": "one"}\n')
    with pytest.raises(ValueError, match="a line is no JSON with an entry prompt"):
        read_prompts(path)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt")
