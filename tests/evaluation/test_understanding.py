"""Scores of answers about images, and the files that questions come in."""

import base64
import io
import json

import pytest
from PIL import Image

from nextscale.cli.evaluate_understanding import score
from nextscale.datasets.questions import QuestionError, picture_of, prompt_of, read_questions
from nextscale.evaluation.understanding import (
    answer_scores,
    caption_scores,
    choice_scores,
    majority,
    mme_scores,
    pope_scores,
    read_letter,
    read_yes_no,
)


def test_yes_and_no_are_read():
    assert [read_yes_no(each) for each in ("Yes.", "no", "Yes, it is", "n", "There is", "")] == [
        "yes", "no", "yes", "no", "other", "other",
    ]  # fmt: skip


def test_letters_are_read():
    options = ("a dog", "a cat", "a bird")
    answers = ("B", "(C)", "A. a dog", "a cat.", "D", "A dog maybe", "")
    assert [read_letter(each, options) for each in answers] == ["B", "C", "A", "B", "", "A", ""]


def test_pope():
    scores = pope_scores(["yes", "yes", "no", "perhaps"], ["yes", "no", "no", "yes"])
    assert scores == pytest.approx({"accuracy": 50, "precision": 50, "recall": 50, "f1": 50, "yes": 50})
    assert pope_scores(["no"], ["yes"])["f1"] == 0


def test_mme():
    answers, labels = ["yes", "no", "yes", "yes"], ["yes", "no", "yes", "no"]
    scores = mme_scores(answers, labels, ["count"] * 4, ["a", "a", "b", "b"])
    assert scores == {"count": 125, "perception": 125, "cognition": 0}
    with pytest.raises(ValueError, match="two questions"):
        mme_scores(["yes"], ["yes"], ["count"], ["a"])


def test_choices_and_captions():
    options = [("x", "y")] * 3
    scores = choice_scores(["A", "y", "?"], ["A", "B", "A"], options, ["one", "one", "two"])
    assert scores == pytest.approx({"one": 100, "two": 0, "accuracy": 200 / 3, "unread": 100 / 3})
    same = caption_scores(["A cat on the red mat."], [["a cat on the red mat", "a dog"]])
    assert same["bleu-4"] == pytest.approx(100) and same["chrf"] == pytest.approx(100)
    assert majority(["a", "b", "a", "a"]) == 75
    with pytest.raises(ValueError, match="as many answers"):
        choice_scores([], [], [], [])


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_files_of_all_forms(tmp_path, image):
    encoded = io.BytesIO()
    Image.new("RGB", (3, 3)).save(encoded, "PNG")
    (tmp_path / "pope.json").write_text(
        json.dumps({"question_id": 1, "image": "a.png", "text": "Is it?", "label": "yes"})
    )
    (tmp_path / "mme" / "count").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "mme" / "count" / "x.png")
    lines = "Is it one? Please answer yes or no.\tYes\nIs it two? Please answer yes or no.\tNo\n"
    (tmp_path / "mme" / "count" / "x.txt").write_text(lines)
    table = ["index\timage\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory"]
    table.append(f"1\t{base64.b64encode(encoded.getvalue()).decode()}\tWhat?\t\tdog\tcat\t\t\tB\tanimals")
    (tmp_path / "mmbench.tsv").write_text("\n".join(table))
    entry = {"question_id": "1", "question": "What?", "choice_a": "x", "choice_b": "y", "answer": "A",
             "data_id": "a.png", "data_type": "image", "question_type_id": 1}  # fmt: skip
    (tmp_path / "seed.json").write_text(json.dumps({"question_type": {"Scene": 1}, "questions": [entry]}))
    coco = {"images": [{"id": 3, "file_name": "a.png"}], "annotations": [{"image_id": 3, "caption": "a cat"}]}
    (tmp_path / "captions.json").write_text(json.dumps(coco))
    said = {"pope": ["yes"], "mme": ["yes", "no"], "mmbench": ["B"], "seed": ["A"], "captions": ["a cat"]}
    names = {
        "pope": "pope.json",
        "mme": "mme",
        "mmbench": "mmbench.tsv",
        "seed": "seed.json",
        "captions": "captions.json",
    }
    for form, answers in said.items():
        questions = read_questions(tmp_path / names[form], form)
        assert len(questions) == len(answers) and picture_of(questions[0]) is not None
        scores = score(form, questions, answers)
        assert max(scores.values()) == (200 if form == "mme" else pytest.approx(100))
        assert prompt_of(questions[0], form).count("Please answer") == 0


@pytest.mark.parametrize(("form", "text"), [("pope", "{"), ("seed", "[]"), ("captions", "[{}]"), ("pope", "")])
def test_files_that_are_wrong(tmp_path, form, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(QuestionError, match=r"not of the form|no question"):
        read_questions(tmp_path / "bad.json", form)


def test_images_that_are_missing(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps({"image": "no.png", "text": "Is it?", "label": "yes"}))
    with pytest.raises(QuestionError, match=r"no\.png"):
        read_questions(tmp_path / "q.json", "pope")


def test_short_answers_are_right_word_for_word() -> None:
    scores = answer_scores(["A cat.", "yes", "no", "the  Dog"], ["a cat", "no", "no", "a cat"], ["c", "y", "y", "c"])
    assert scores == {"c": 50, "c floor": 100, "y": 50, "y floor": 100, "accuracy": 50, "floor": 100}
    assert answer_scores(["a"], ["an"], [""]) == {"accuracy": 100, "floor": 100}
    with pytest.raises(ValueError, match="as many"):
        answer_scores(["a"], [], [])


def test_cider_of_captions() -> None:
    pytest.importorskip("pycocoevalcap")
    references = [["a dog runs"], ["the cat sits on the mat", "cat on mat"], ["birds fly"]]
    right = caption_scores([each[0] for each in references], references)["cider"]
    wrong = caption_scores(["a plane", "a plane", "a plane"], references)["cider"]
    assert right > 100 > 50 > wrong >= 0
