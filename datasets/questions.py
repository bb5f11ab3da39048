"""Questions about images, from the files that benchmarks of vision-language models come in."""

import base64
import binascii
import csv
import io
import json
import string
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DatasetError

FORMATS = ("pope", "mme", "mmbench", "seed", "captions", "answers")


class QuestionError(DatasetError):
    """A file of questions is not of the benchmark's form, or an image is missing."""


@dataclass(frozen=True)
class Question:
    """One question.

    `image` is a file, or the bytes of one. `options` are the answers to choose from, in the order of their letters
    ("yes" and "no" count as none). `answers` are what is right: one, or several captions. `group` is the category;
    `pair` what belongs together (MME asks each image twice).
    """

    name: str
    image: Path | bytes
    text: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    group: str = ""
    pair: str = ""


def read_questions(path: str | Path, form: str, images: str | Path | None = None) -> list[Question]:
    """The questions of a benchmark's file (of MME: its folder).

    pope: lines of JSON with question_id, image, text, label. mme: a folder per category with images and, beside each
    or in questions_answers_YN, a .txt of lines "question TAB answer". mmbench: a table (.tsv) with index, image
    (base64), question, hint, A to D, answer, category. seed: JSON with questions of choice_a to choice_d, answer and
    data_id. captions: JSON as COCO has it (images, annotations), or a list of image and captions. answers: lines of
    JSON with image, question, answer and, if you like, group: any questions with one short answer each.

    `images` is the folder of the images where the file only names them; by default the file's own.

    Raises QuestionError.
    """
    path = Path(path).expanduser()
    if form not in FORMATS:
        raise QuestionError(f"the form of the questions is {form!r}; expected one of {', '.join(FORMATS)}")
    if not path.exists():
        raise QuestionError(f"{path}: no such file or folder")
    folder = Path(images).expanduser() if images is not None else path if path.is_dir() else path.parent
    try:
        found = list(_READERS[form](path, folder))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise QuestionError(f"{path} is not of the form of {form} ({type(error).__name__}: {error})") from None
    if not found:
        raise QuestionError(f"{path} holds no question")
    missing = [each.image for each in found if isinstance(each.image, Path) and not each.image.is_file()]
    if missing:
        raise QuestionError(f"{len(missing)} of {len(found)} images are missing, the first is {missing[0]}")
    return found


def _pope(path: Path, folder: Path) -> Iterator[Question]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if line.strip():
            entry = json.loads(line)
            name = str(entry.get("question_id", number))
            yield Question(name, folder / entry["image"], entry["text"], (entry["label"].lower(),))


def _mme(path: Path, folder: Path) -> Iterator[Question]:
    for category in sorted(each for each in path.iterdir() if each.is_dir()):
        for file in sorted(category.rglob("*.txt")):
            places = [parent / (file.stem + end) for parent in (file.parent, category / "images") for end in _ENDS]
            image = next((place for place in places if place.is_file()), places[0])
            for line in file.read_text(encoding="utf-8").splitlines():
                if line.strip():
                    text, _, answer = line.strip().rpartition("\t")
                    if answer.lower() not in ("yes", "no"):
                        raise QuestionError(f"{file}: {line!r} does not end in a tab and Yes or No")
                    name = f"{category.name}/{file.stem}"
                    yield Question(name, image, text, (answer.lower(),), group=category.name, pair=name)


_ENDS = (".jpg", ".png", ".jpeg")


def _mmbench(path: Path, folder: Path) -> Iterator[Question]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8", newline="") as file:
        kept: dict[str, bytes] = {}
        for row in csv.DictReader(file, delimiter="\t"):
            try:
                # A row may name the row that has its image.
                kept[row["index"]] = kept.get(row["image"]) or base64.b64decode(row["image"], validate=True)
            except binascii.Error:
                raise QuestionError(f"{path}: the image of question {row['index']} is not base64") from None
            options = tuple(row[letter] for letter in "ABCD" if row.get(letter))
            hint = row.get("hint") or ""
            text = f"{hint}\n{row['question']}".strip()
            group = row.get("category") or ""
            yield Question(row["index"], kept[row["index"]], text, (row["answer"],), options, group)


def _seed(path: Path, folder: Path) -> Iterator[Question]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    kinds = {number: name for name, number in content.get("question_type", {}).items()}
    for entry in content["questions"]:
        if entry.get("data_type", "image") != "image":
            continue
        options = tuple(entry[f"choice_{letter}"] for letter in "abcd" if entry.get(f"choice_{letter}"))
        group = str(kinds.get(entry.get("question_type_id"), ""))
        name = str(entry["question_id"])
        yield Question(name, folder / entry["data_id"], entry["question"], (entry["answer"],), options, group)


def _captions(path: Path, folder: Path) -> Iterator[Question]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        texts: dict[Any, list[str]] = {}
        for entry in content["annotations"]:
            texts.setdefault(entry["image_id"], []).append(entry["caption"])
        entries = [(each["file_name"], texts[each["id"]]) for each in content["images"] if each["id"] in texts]
    else:
        entries = [(each["image"], each["captions"]) for each in content]
    for file, captions in entries:
        yield Question(str(file), folder / file, "", tuple(captions))


def _answers(path: Path, folder: Path) -> Iterator[Question]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if line.strip():
            entry = json.loads(line)
            group = str(entry.get("group", ""))
            yield Question(str(number), folder / entry["image"], entry["question"], (entry["answer"],), group=group)


_READERS = {"answers": _answers, "pope": _pope, "mme": _mme, "mmbench": _mmbench, "seed": _seed, "captions": _captions}


def prompt_of(question: Question, form: str) -> str:
    """What a model is asked, as lmms-eval words it."""
    if form == "captions":
        return "Describe the image in one sentence."
    if form == "answers":
        return question.text
    text = question.text.strip().replace(" Please answer yes or no.", "")
    if not question.options:
        return f"{text}\nAnswer the question using a single word or phrase."
    lines = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, question.options, strict=False)]
    return "\n".join([text, *lines, "Answer with the option's letter from the given choices directly."])


def picture_of(question: Question) -> Any:
    """The image, for the model: its file, or a Pillow image."""
    if isinstance(question.image, Path):
        return question.image
    from PIL import Image

    try:
        return Image.open(io.BytesIO(question.image)).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise QuestionError(f"the image of question {question.name} cannot be read ({type(error).__name__})") from None
