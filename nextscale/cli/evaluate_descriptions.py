"""``nextscale evaluate understanding`` of models that describe shapes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nextscale.datasets.questions import Question, QuestionError


def read_shape_questions(arguments: Any) -> list[Question]:
    """Lines of JSON with shape (a name), question, answer and group.

    Raises:
        QuestionError: the file is of another form, or another benchmark was asked for.
    """
    if arguments.benchmark != "answers":
        raise QuestionError(f"--shapes goes with --benchmark answers, not {arguments.benchmark}")
    found = []
    try:
        for line in Path(arguments.questions).read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            group = str(entry.get("group", ""))
            found.append(Question(entry["shape"], b"", entry["question"], (entry["answer"],), group=group))
    except (ValueError, KeyError, TypeError) as error:
        raise QuestionError(
            f"{arguments.questions} is not of the form of answers about shapes ({type(error).__name__}: {error})"
        ) from None
    if not found:
        raise QuestionError(f"{arguments.questions} holds no question")
    return found


def answer(model: Any, questions: Sequence[Question], arguments: Any) -> list[str]:
    """A describer's answers, each shape encoded once.

    Raises:
        ValueError: the model is another, or a shape is not there.
    """
    import torch

    from nextscale.cli.console import progress
    from nextscale.tasks.shapes.describing import Describer
    from nextscale.tasks.shapes.describing_data import ENCODED, open_shapes

    if not isinstance(model, Describer):
        raise ValueError(f"{arguments.model} is a {type(model).__name__}, which describes no shapes")
    shapes = open_shapes(arguments.shapes, model)
    numbers = {name: number for number, name in enumerate(shapes.names)}
    if missing := [each.name for each in questions if each.name not in numbers]:
        raise ValueError(f"{arguments.shapes} lacks {len(missing)} shapes that are asked about, such as {missing[0]}")
    wanted = sorted({numbers[each.name] for each in questions})
    tokens: dict[int, torch.Tensor] = {}
    with progress("reading", "shapes") as report:
        for start in range(0, len(wanted), ENCODED):
            part = wanted[start : start + ENCODED]
            tokens |= dict(zip(part, model.encode(shapes.read([(0, number) for number in part])), strict=True))
            report(len(tokens), len(wanted))
    answers: list[str] = []
    size = arguments.batch_size
    with progress("answering", "questions") as report:
        while len(answers) < len(questions):
            some = questions[len(answers) : len(answers) + size]
            given = torch.stack([tokens[numbers[each.name]] for each in some])
            texts = [each.text for each in some]
            answers += model.answer(given, texts, [0] * len(some), arguments.max_new_tokens, batch_size=size)
            report(len(answers), len(questions))
    return answers
