"""`nextscale chat`: conversations in a terminal, with images saved beside them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.cli import main
from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.vargpt import VARGPT
from nextscale.tasks.generation.vargpt_small import SmallSizes, small_model
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = AutoencoderConfig(32, (1, 1), 1, latent_channels=4)
    tokenizer = ResidualVQ(ResidualVQConfig(sizes, QuantizerConfig(16, 4, smoothers=1), ScaleSchedule.squares(1, 2, 3)))
    model = small_model(["what is it", "draw a cat"], tokenizer, 8, SmallSizes(32, 1, 2, 16, 1, 2, 4, 32, 1, 2, 128))
    return model.save(tmp_path_factory.mktemp("chat") / "model")


def typed(monkeypatch, *lines: str) -> None:
    """Someone types lines at a terminal."""
    left = iter(lines)

    def answer(prompt: str) -> str:
        line = next(left, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)


def test_one_message_with_an_image(folder, tmp_path, capsys):
    picture = tmp_path / "seen.png"
    Image.fromarray(np.zeros((9, 12, 3), np.uint8)).save(picture)
    out = tmp_path / "out"
    asked = ["chat", str(folder), "--message", "what is it", "--image", str(picture), "--max-new-tokens", "3"]
    assert main([*asked, "--max-images", "0", "--out", str(out)]) == 0
    said = json.loads((out / "chat.json").read_text())["messages"]
    assert [message["role"] for message in said] == ["user", "assistant"] and said[0]["images"] == [str(picture)]


def test_a_conversation_with_a_drawn_image(folder, tmp_path, monkeypatch, capsys):
    typed(monkeypatch, "/draw a cat", "", "what is it", "/image nowhere.png", "/nosuch", "/new", "/quit")
    assert main(["chat", str(folder), "--max-new-tokens", "2", "--max-images", "0", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "image-0000.png" in shown.out and "cannot be read" in shown.err and shown.out.count("/image FILE") == 2
    assert Image.open(tmp_path / "image-0000.png").size == (6, 6)


def test_stopped_in_the_middle_of_an_image(folder, tmp_path, monkeypatch, capsys):
    """What there is of it is kept, and the conversation goes on."""
    steps = VARGPT.steps

    def interrupted(self, *arguments, **options):
        for step in steps(self, *arguments, **options):
            yield step
            raise KeyboardInterrupt

    monkeypatch.setattr(VARGPT, "steps", interrupted)
    typed(monkeypatch, "/draw a cat", "/quit")
    assert main(["chat", str(folder), "--out", str(tmp_path)]) == 0
    assert "(stopped)" in capsys.readouterr().out and (tmp_path / "unfinished-0000.png").is_file()
    assert json.loads((tmp_path / "chat.json").read_text())["messages"][1]["stopped"]


@pytest.mark.parametrize(
    ("message", "told"),
    [("   ", "empty"), ("what is <image>", "marks of images"), ("cat " * 10_000, "shorten it")],
)
def test_messages_that_cannot_be_read(folder, tmp_path, capsys, message, told):
    assert main(["chat", str(folder), "--message", message, "--out", str(tmp_path)]) == 2
    assert told in capsys.readouterr().err


def test_other_models_hold_no_conversation(forms, tmp_path, capsys):
    assert main(["chat", str(forms.folder), "--message", "hello", "--out", str(tmp_path)]) == 2
    assert "holds no conversation" in capsys.readouterr().err


def test_published_folders_load(folder, tmp_path, capsys):
    """config.json of transformers, and the state dict in parts; written by the converter, and back."""
    import nextscale

    model, out = nextscale.load(folder), tmp_path / "published"
    official = model.to_official()
    model.save_official(out, shard_bytes=100_000)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    loaded = nextscale.load(out, schedule="1 2 3")
    assert loaded.config.labelled is False and loaded.processor.render([{"role": "user", "content": "a cat"}])
    again = loaded.to_official()
    assert all(torch.equal(again[name], value) for name, value in official.items())
    assert main(["info", str(out)]) == 0 and main(["info", str(folder)]) == 0
    assert main(["convert", str(folder), str(tmp_path / "whole")]) == 0
    assert main(["convert", str(tmp_path / "whole"), str(tmp_path / "own"), "--scales", "1 2 3"]) == 0
    kept = nextscale.load(tmp_path / "own").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


def test_generate_draws_prompts_of_conversations(folder, tmp_path, capsys):
    asked = ["generate", str(folder), "--prompt", "draw a cat", "what is it", "--num", "3", "--out", str(tmp_path)]
    assert main([*asked, "--guidance", "0", "--batch-size", "2"]) == 0
    record = json.loads((tmp_path / "generate.json").read_text())["files"]
    assert record["images"] == [f"image-{i:04d}.png" for i in range(3)] and (tmp_path / record["sheet"]).is_file()
    for more, told in ((["--classes", "1"], "--classes is not for"), (["--animate"], "chat --draw")):
        assert main([*asked, *more]) == 2
        assert told in capsys.readouterr().err
    assert main(["generate", str(folder)]) == 2
    assert "give --prompt" in capsys.readouterr().err


def test_questions_with_answers_are_measured(folder, tmp_path, capsys):
    Image.fromarray(np.zeros((9, 12, 3), np.uint8)).save(tmp_path / "seen.png")
    rows = [{"image": "seen.png", "question": "what is it", "answer": "a cat", "group": "class"}] * 2
    (tmp_path / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    asked = ["evaluate", "understanding", str(folder), "--benchmark", "answers", "--max-new-tokens", "2"]
    assert main([*asked, "--questions", str(tmp_path / "questions.jsonl"), "--out", str(tmp_path)]) == 0
    scores = json.loads((tmp_path / "answers.json").read_text())["scores"]
    assert scores["floor"] == scores["class floor"] == 100 and scores["accuracy"] == scores["class"]
