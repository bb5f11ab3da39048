"""Questions, requests and answers made of classes and colours."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextscale.cli import main
from nextscale.datasets.captions import COLOURS
from nextscale.datasets.conversations import Facts, colour_of, questions, with_article, write_conversations
from nextscale.datasets.errors import DatasetError
from nextscale.datasets.images import open_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classes")
    for name, colour in (("apple", (200, 30, 40)), ("sky", (150, 190, 235))):
        (root / name).mkdir()
        for i in range(2):
            Image.new("RGB", (8, 8), colour).save(root / name / f"{i}.png")
    return root


def test_colours_are_asked_for_where_they_are_clear() -> None:
    shares = np.zeros(len(COLOURS))
    shares[[3, 5]] = 0.6, 0.4
    assert colour_of(shares) == list(COLOURS)[3]
    shares[[3, 5]] = 0.52, 0.48
    assert colour_of(shares) is None
    assert [with_article(name) for name in ("cat", "airplane")] == ["a cat", "an airplane"]


def test_questions_of_yes_and_no_are_answered_rightly() -> None:
    said = set()
    for seed in range(30):
        found = questions(Facts("cat", "red"), ("cat", "dog", "ship"), np.random.default_rng(seed))
        assert found["class"][1] == "a cat" and found["colour"][1] == "red" and found["describe"][1] == "a red cat"
        for kind, name in (("is-class", "a cat"), ("is-colour", "red")):
            question, answer = found[kind]
            assert (answer == "yes") == (f"{name}?" in question or f"{name} in" in question)
            said.add((kind, answer))
    assert len(said) == 4
    assert set(questions(Facts("cat", None), ("cat", "dog"), np.random.default_rng(0))) == {"class", "is-class"}


def test_what_is_written(folder: Path, tmp_path: Path) -> None:
    assert main(["prepare", "conversations", str(folder), str(tmp_path / "out"), "--size", "8"]) == 0
    out = tmp_path / "out"
    reads, draws, both = (json.loads((out / f"{n}.json").read_text()) for n in ("reading", "drawing", "conversations"))
    assert both == [*reads, *draws] and len(reads) == len(draws) == 4
    assert (
        reads[0]["messages"][0]["content"].startswith("<image> ")
        and "<image_gen>" in draws[0]["messages"][1]["content"]
    )
    asked = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    assert len(asked) == 20 and {row["answer"] for row in asked if row["group"] == "colour"} == {"red", "light blue"}
    assert Image.open(out / reads[2]["images"][0]).size == (8, 8)
    from nextscale.datasets.questions import read_questions
    from nextscale.tasks.generation.vargpt_data import read_conversations

    assert len(read_conversations(out / "conversations.json")) == 8
    assert read_questions(out / "questions.jsonl", "answers")[0].answers == ("an apple",)


def test_images_need_classes_with_names(folder: Path, tmp_path: Path) -> None:
    images = open_images(folder / "apple", size=8)
    with pytest.raises(DatasetError, match="0 classes"):
        write_conversations(tmp_path, images)
