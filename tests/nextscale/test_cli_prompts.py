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


@pytest.fixture(scope="module")
def judges(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A CLIP and a Mask2Former of random weights, as transformers saves them."""
    from transformers import (
        AutoTokenizer,
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPTextConfig,
        CLIPVisionConfig,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessorPil,
        SwinConfig,
    )

    root = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(folder / "words")
    text = CLIPTextConfig(**tower, vocab_size=len(tokenizer), max_position_embeddings=16, eos_token_id=1,
                          bos_token_id=1, pad_token_id=0)  # fmt: skip
    vision = CLIPVisionConfig(**tower, image_size=8, patch_size=4)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).save_pretrained(
        root / "clip"
    )
    tokenizer.save_pretrained(root / "clip")
    size = {"height": 8, "width": 8}
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=size).save_pretrained(root / "clip")
    swin = SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
                      out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
                               encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
                               num_attention_heads=2, num_queries=5, id2label={0: "fox", 1: "mouse"})  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(root / "detector")
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(root / "detector")
    return SimpleNamespace(clip=root / "clip", detector=root / "detector")


def test_benchmarks_of_prompts(
    folder: Path, judges: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Drawn in GenEval's layout, taken up where it was stopped, and scored."""
    lines = [
        {"tag": "single_object", "include": [{"class": "fox", "count": 1}], "prompt": "a red fox"},
        {"tag": "colors", "include": [{"class": "fox", "count": 1, "color": "red"}], "prompt": "a fox"},
    ]
    prompts, out = tmp_path / "metadata.jsonl", tmp_path / "out"
    prompts.write_text("\n".join(json.dumps(line) for line in lines))
    line = f"evaluate text-to-image {folder} --benchmark geneval --prompts {prompts} --out {out} --samples 2"
    assert "images of 1 prompts" in typed(f"{line} --limit 1", capsys)
    before = (out / "00000/samples/00001.png").stat().st_mtime_ns
    said = typed(f"{line} --clip {judges.clip} --detector {judges.detector}", capsys)
    assert "1 of 2 prompts are drawn already" in said
    assert (out / "00000/samples/00001.png").stat().st_mtime_ns == before
    figures = json.loads((out / "results.json").read_text())
    assert 0 <= figures["clip_score"] <= 100
    assert set(figures) >= {"geneval", "geneval single_object", "geneval colors", "geneval images", "geneval prompts"}
    assert [len(row["clip_score"]) for row in figures["prompts"]] == [2, 2]
    again = typed(f"evaluate text-to-image {out} --benchmark geneval --prompts {prompts} --samples 2 --clip "
                  f"{judges.clip} --out {tmp_path / 'again'}", capsys)  # fmt: skip
    assert "clip_score" in again
    assert json.loads((tmp_path / "again/results.json").read_text())["clip_score"] == pytest.approx(
        figures["clip_score"], abs=1e-4
    )
    assert "holds images drawn with other settings" in typed(f"{line} --seed 1", capsys, 2)
    (out / "00001/samples/00000.png").unlink()
    assert "lacks images of 1 of 2 prompts: 00001" in typed(
        f"evaluate text-to-image {out} --benchmark geneval --prompts {prompts} --samples 2", capsys, 2
    )


def test_benchmark_options_that_mean_nothing(
    folder: Path, judges: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lines.txt").write_text("a fox")
    line = f"evaluate text-to-image {folder} --prompts {tmp_path / 'lines.txt'} --out {tmp_path / 'out'}"
    assert "needs --clip" in typed(f"{line} --detector x", capsys, 2)
    assert "--samples is 0" in typed(f"{line} --samples 0", capsys, 2)
    assert "expected a CLIP" in typed(f"{line} --clip {judges.detector}", capsys, 2)
    assert "HPS has one image" in typed(f"{line} --benchmark hps --samples 2", capsys, 2)
