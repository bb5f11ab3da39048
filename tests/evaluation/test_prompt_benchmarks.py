"""Benchmarks of prompts: their lists are read, images lie where the official scripts look, GenEval's rules."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextscale.evaluation.geneval import Detection, Verdict, cut_out, judge, kept, relations_of, summary
from nextscale.evaluation.prompt_benchmarks import BENCHMARKS, PromptListError, Task, to_pictures

RED, BLUE = (255, 0, 0), (0, 0, 255)


def pictures(count: int, side: int = 4) -> list[Image.Image]:
    return [Image.new("RGB", (side, side), (40 * number, 0, 0)) for number in range(count)]


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_lists_and_layouts(tmp_path: Path) -> None:
    entry = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(entry) + "\n\n" + json.dumps(entry) + "\n")
    geneval = BENCHMARKS["geneval"]
    tasks = geneval.read(tmp_path / "metadata.jsonl")
    assert [task.key for task in tasks] == ["00000", "00001"]
    assert tasks[0].prompt == "a photo of a bench"
    out = tmp_path / "geneval"
    geneval.write(out, tasks[1], pictures(4), write)
    assert json.loads((out / "00001/metadata.jsonl").read_text()) == entry
    assert sorted(path.name for path in (out / "00001/samples").iterdir()) == [f"{n:05d}.png" for n in range(4)]
    assert geneval.drawn(out, tasks[1])
    assert not geneval.drawn(out, tasks[0])

    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/posescript7.txt").write_text("a long text\n")
    (tmp_path / "prompts/12.txt").write_text("another")
    dpg = BENCHMARKS["dpg"]
    tasks = dpg.read(tmp_path / "prompts")
    assert [(task.key, task.prompt) for task in tasks] == [("12", "another"), ("posescript7", "a long text")]
    dpg.write(tmp_path / "dpg", tasks[1], pictures(4), write)
    whole = Image.open(tmp_path / "dpg/posescript7.png")
    assert whole.size == (8, 8)
    assert [whole.getpixel(place) for place in ((0, 0), (4, 0), (0, 4), (4, 4))] == [(40 * n, 0, 0) for n in range(4)]
    apart = dpg.images(tmp_path / "dpg", tasks[1])
    assert [np.asarray(part).tobytes() for part in apart] == [np.asarray(part).tobytes() for part in pictures(4)]

    (tmp_path / "hps").mkdir()
    (tmp_path / "hps/anime.json").write_text(json.dumps(["a fox", "an owl"]))
    hps = BENCHMARKS["hps"]
    tasks = hps.read(tmp_path / "hps")
    hps.write(tmp_path / "drawn", tasks[1], pictures(1), write)
    assert Image.open(tmp_path / "drawn/anime/00001.jpg").format == "JPEG"
    with pytest.raises(ValueError, match="2 images of a prompt were given, hps takes 1"):
        hps.write(tmp_path / "drawn", tasks[1], pictures(2), write)

    (tmp_path / "lines.txt").write_text("one\n\n two \n")
    assert [task.prompt for task in BENCHMARKS["list"].read(tmp_path / "lines.txt")] == ["one", "two"]
    (tmp_path / "lines.jsonl").write_text('{"prompt": "one", "more": 1}\n')
    assert BENCHMARKS["list"].read(tmp_path / "lines.jsonl") == [Task("00000", "one", {"more": 1})]


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("geneval", "a.jsonl", '{"prompt": "x"}', "line 1, has no prompt, tag and include"),
        ("geneval", "a.jsonl", "{", "line 1, is no JSON"),
        ("geneval", "a.jsonl", "[1]", "line 1, is no JSON object"),
        ("geneval", "a.jsonl", "", "holds no prompt"),
        ("list", "a.jsonl", '{"text": "x"}', "line 1, has no entry prompt"),
        ("dpg", "a.txt", "x", "is not the benchmark's folder of NAME.txt"),
    ],
)
def test_lists_that_are_none(name: str, file: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(PromptListError, match=message):
        BENCHMARKS[name].read(tmp_path / file)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"give the benchmark's evaluation_metadata\.jsonl"):
        BENCHMARKS["geneval"].read(tmp_path / "nothing")
    (tmp_path / "style.json").write_text('{"a": 1}')
    with pytest.raises(PromptListError, match="is no list of prompts"):
        BENCHMARKS["hps"].read(tmp_path)
    (tmp_path / "style.json").write_text("{")
    with pytest.raises(PromptListError, match="is no JSON"):
        BENCHMARKS["hps"].read(tmp_path)
    (tmp_path / "5.png").write_bytes(b"no picture")
    with pytest.raises(PromptListError, match="cannot be read as a picture"):
        BENCHMARKS["dpg"].images(tmp_path, Task("5", ""))
    Image.new("RGB", (5, 4)).save(tmp_path / "5.png")
    with pytest.raises(PromptListError, match="5 x 4 pixels is not 4 images"):
        BENCHMARKS["dpg"].images(tmp_path, Task("5", ""))


def test_pictures_are_rounded() -> None:
    (picture,) = to_pictures(np.full((1, 3, 2, 1), 0.5, np.float32))
    assert picture.size == (1, 2)
    assert picture.getpixel((0, 0)) == (128, 128, 128)


# --- GenEval ------------------------------------------------------------------------------------------


def found(name: str, left: float, top: float = 0, confidence: float = 0.95) -> Detection:
    return Detection(name, confidence, (left, top, left + 10, top + 10))


def colours(pictures: object, name: str) -> list[str]:
    """What the middle of each picture is, in the place of a classifier."""
    assert isinstance(pictures, list)
    return ["red" if picture.getpixel((5, 5)) == RED else "blue" for picture in pictures]


IMAGE = Image.new("RGB", (100, 100), BLUE)
IMAGE.paste(RED, (0, 0, 50, 100))


@pytest.mark.parametrize(
    ("details", "detections", "reason"),
    [
        ({"tag": "single_object", "include": [{"class": "cat", "count": 1}]}, [found("cat", 0, confidence=0.4)], None),
        ({"tag": "single_object", "include": [{"class": "cat", "count": 1}]}, [found("cat", 0, confidence=0.3)],
         "expected cat >= 1, found 0"),
        ({"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]},
         [found("cat", 0), found("cat", 20), found("cat", 40, confidence=0.8)], None),
        ({"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]},
         [found("cat", 0), found("cat", 20), found("cat", 40)], "expected cat < 3, found 3"),
        ({"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}, [found("cat", 0)], None),
        ({"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]},
         [found("cat", 70), found("cat", 0, confidence=0.9)], "expected red cat >= 1, found blue"),
        ({"tag": "position", "include": [{"class": "dog", "count": 1},
                                         {"class": "cat", "count": 1, "position": ["left of", 0]}]},
         [found("dog", 60), found("cat", 0)], None),
        ({"tag": "position", "include": [{"class": "dog", "count": 1},
                                         {"class": "cat", "count": 1, "position": ["above", 0]}]},
         [found("dog", 60), found("cat", 0)], "expected cat above target, found left of"),
        ({"tag": "position", "include": [{"class": "dog", "count": 1},
                                         {"class": "cat", "count": 1, "position": ["above", 0]}]},
         [found("cat", 0)], "no target for cat to be above"),
    ],
)  # fmt: skip
def test_rules(details: dict[str, object], detections: list[Detection], reason: str | None) -> None:
    verdict = judge(IMAGE, details, detections, colours)
    assert verdict.correct == (reason is None)
    assert reason is None or any(reason in each for each in verdict.reasons)


def test_only_the_most_confident_count() -> None:
    many = [found("cat", place, confidence=0.5 + place / 100) for place in range(20)]
    objects = kept(many, "single_object")["cat"]
    assert len(objects) == 16
    assert objects[0].confidence == pytest.approx(0.69)


def test_relations() -> None:
    assert relations_of((0, 0, 10, 10), (0, 50, 10, 60)) == {"above"}
    assert relations_of((50, 50, 60, 60), (0, 0, 10, 10)) == {"right of", "below"}
    assert relations_of((0, 0, 10, 10), (1, 1, 11, 11)) == set()


def test_surroundings_are_grey() -> None:
    mask = np.zeros((100, 100), bool)
    mask[:, :5] = True
    cut = cut_out(IMAGE, Detection("cat", 1.0, (0, 0, 10, 10), mask))
    assert (cut.size, cut.getpixel((0, 0)), cut.getpixel((9, 0))) == ((10, 10), RED, (0x99, 0x99, 0x99))


def test_summary() -> None:
    right, wrong = Verdict(True), Verdict(False, ("no",))
    figures = summary([("a", 0, right), ("a", 0, wrong), ("a", 1, wrong), ("a", 1, wrong), ("b", 2, right)])
    assert figures == {"overall": 0.625, "tags": {"a": 0.25, "b": 1.0}, "images": 0.4, "prompts": 2 / 3}
