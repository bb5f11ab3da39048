"""``nextscale evaluate understanding``"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from nextscale.datasets.questions import Question


def add_arguments(parser: Any) -> None:
    from nextscale.cli.parsing import add_loading

    parser.add_argument("model", type=str, help="name, file or folder of a model that holds conversations")
    parser.add_argument(
        "--benchmark",
        type=Literal["pope", "mme", "mmbench", "seed", "captions", "answers"],
        required=True,
        help="form and scores",
    )
    parser.add_argument("--questions", type=str, required=True, help="the benchmark's file; of MME: its folder")
    parser.add_argument("--images", type=str | None, default=None, help="folder of the images that the file names")
    parser.add_argument(
        "--shapes", type=str | None, default=None, help="folder of the shapes that it names, of a model that describes"
    )
    parser.add_argument("--out", type=str, default="out/understanding", help="folder of answers and scores")
    parser.add_argument("--limit", type=int | None, default=None, help="only the first so many questions")
    parser.add_argument("--batch-size", type=int, default=1, help="questions at once")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer")
    add_loading(parser)


def run(arguments: Any) -> None:
    from nextscale.cli.console import pairs, say
    from nextscale.core.checkpoint import write_json
    from nextscale.datasets.questions import read_questions

    if arguments.batch_size < 1 or (arguments.limit is not None and arguments.limit < 1):
        raise ValueError("--batch-size and --limit must be 1 or more")
    if arguments.shapes is not None:
        from nextscale.cli.evaluate_descriptions import read_shape_questions

        questions = read_shape_questions(arguments)[: arguments.limit]
    else:
        questions = read_questions(arguments.questions, arguments.benchmark, arguments.images)[: arguments.limit]
    answers = _answers(questions, arguments)
    scores = score(arguments.benchmark, questions, answers)
    record = write_json(
        Path(arguments.out) / f"{arguments.benchmark}.json",
        {
            "model": arguments.model,
            "benchmark": arguments.benchmark,
            "questions": len(questions),
            "scores": scores,
            "answers": {
                f"{i} {each.name}": answer for i, (each, answer) in enumerate(zip(questions, answers, strict=True))
            },
        },
    )
    say(pairs([(name, f"{value:.2f}") for name, value in scores.items()]))
    say(f"answers: {record}")


def _answers(questions: Sequence[Question], arguments: Any) -> list[str]:
    """The model's, those of an earlier, interrupted run included."""
    import nextscale
    from nextscale.cli.console import progress
    from nextscale.cli.parsing import loading_options
    from nextscale.core.checkpoint import write_json
    from nextscale.datasets.questions import picture_of, prompt_of

    kept = Path(arguments.out) / f"{arguments.benchmark}-answers.json"
    settings = [arguments.model, str(arguments.questions), arguments.max_new_tokens]
    answers: list[str] = []
    if kept.is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))
        answers = before["answers"][: len(questions)] if before.get("settings") == settings else []
    if len(answers) == len(questions):
        return answers
    model = nextscale.load(arguments.model, **loading_options(arguments))
    if arguments.shapes is not None:
        from nextscale.cli.evaluate_descriptions import answer

        return answer(model, questions, arguments)
    if not hasattr(model, "chat"):
        raise ValueError(f"{arguments.model} is a {type(model).__name__}, which holds no conversation")
    with progress("answering", "questions") as report:
        while len(answers) < len(questions):
            part = questions[len(answers) : len(answers) + arguments.batch_size]
            talks = []
            for question in part:
                image = {"type": "image", "image": picture_of(question)}
                text = {"type": "text", "text": prompt_of(question, arguments.benchmark)}
                talks.append([{"role": "user", "content": [image, text]}])
            answered = model.chat(talks, max_new_tokens=arguments.max_new_tokens, max_images=0)
            answers += [answer.text for answer in answered]
            write_json(kept, {"settings": settings, "answers": answers})
            report(len(answers), len(questions))
    return answers


def score(benchmark: str, questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """The benchmark's scores, with the floor of always giving the commonest answer where there is one."""
    from nextscale.evaluation import understanding

    if benchmark == "captions":
        return understanding.caption_scores(answers, [each.answers for each in questions])
    if benchmark == "answers":
        labels, groups = [each.answers[0] for each in questions], [each.group for each in questions]
        return understanding.answer_scores(answers, labels, groups)
    labels, groups = [each.answers[0] for each in questions], [each.group for each in questions]
    if benchmark == "mme":
        return understanding.mme_scores(answers, labels, groups, [each.pair for each in questions])
    if benchmark == "pope":
        found = understanding.pope_scores(answers, labels)
    else:
        found = understanding.choice_scores(answers, labels, [each.options for each in questions], groups)
    return {**found, "majority": understanding.majority(labels)}
