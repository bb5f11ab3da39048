"""How often a small VARGPT answers rightly, and how often what it draws is what it was asked for.

    python benchmarks/small_chat.py MODEL --questions data/talks-test/questions.jsonl --classifier FILE --out FOLDER

Answers: as `nextscale evaluate understanding` scores them, beside always giving the commonest answer of each kind of
question. Drawings: the share that a classifier (a TorchScript file: images in [0, 1] -> (features, logits)) takes for
the class asked for, beside the same share of a class-conditional model's. "Above chance" is that share less one over
the number of classes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nextscale
from nextscale.core.checkpoint import write_json
from nextscale.datasets.conversations import with_article
from nextscale.datasets.questions import picture_of, prompt_of, read_questions
from nextscale.evaluation.classifier import load_classifier
from nextscale.evaluation.understanding import answer_scores
from nextscale.pictures import contact_sheet, save_png


def answered(model: Any, path: str, limit: int | None, batch: int) -> dict[str, float]:
    """Percent of right answers by kind of question, and the floors."""
    questions, answers = read_questions(path, "answers")[:limit], list[str]()
    for start in range(0, len(questions), batch):
        talks = []
        for question in questions[start : start + batch]:
            image = {"type": "image", "image": picture_of(question)}
            text = {"type": "text", "text": prompt_of(question, "answers")}
            talks.append([{"role": "user", "content": [image, text]}])
        answers += [answer.text for answer in model.chat(talks, max_new_tokens=12, max_images=0)]
    return answer_scores(answers, [each.answers[0] for each in questions], [each.group for each in questions])


def agreement(images: Tensor, labels: Tensor, classifier: Any) -> float:
    """Percent of images that are taken for their class."""
    parts = [classifier(part)[1].argmax(1).cpu() for part in images.split(100)]
    return 100 * float((torch.cat(parts) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--questions", required=True, help="lines of JSON; see `nextscale prepare conversations`")
    parser.add_argument("--classifier", help="without it nothing is drawn")
    parser.add_argument("--reference", default="var-cifar10", help="class-conditional model to compare with")
    parser.add_argument("--class-names", nargs="+", help="in the classifier's order; the reference's own by default")
    parser.add_argument("--limit", type=int, help="questions")
    parser.add_argument("--per-class", type=int, default=50, help="images drawn")
    parser.add_argument("--guidance", type=float, help="of the model; unless given, its own")
    parser.add_argument("--top-p", type=float, default=0.96, help="of both")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--out", required=True, help="folder of the report and a sheet")
    options = parser.parse_args()

    model, out = nextscale.load(options.model), Path(options.out)
    report: dict[str, Any] = {"answers": answered(model, options.questions, options.limit, options.batch_size)}
    for name, value in report["answers"].items():
        print(f"{name}: {value:.1f} %")
    if options.classifier:
        classifier, reference = load_classifier(options.classifier), nextscale.load(options.reference)
        names = options.class_names or list(reference.config.class_names or ())
        labels = torch.arange(len(names)).repeat_interleave(options.per_class)
        prompts = [f"draw {with_article(names[label])}." for label in labels.tolist()]
        given = {} if options.guidance is None else {"guidance": options.guidance}
        drawn = model.generate(prompts, batch_size=options.batch_size, top_k=0, top_p=options.top_p, **given)
        others = reference.generate(labels.tolist(), batch_size=options.batch_size, top_k=0, top_p=options.top_p)
        chance = 100 / len(names)
        own, beside = agreement(drawn, labels, classifier), agreement(others, labels, classifier)
        report["drawings"] = {"agreement": own, options.reference: beside, "chance": chance}
        report["drawings"]["above chance, of the reference's"] = (own - chance) / (beside - chance)
        print(f"drawn as asked: {own:.1f} %, {options.reference} {beside:.1f} %, chance {chance:.1f} %")
        print(f"above chance: {(own - chance) / (beside - chance):.2f} times the reference")
        shown = drawn.unflatten(0, (len(names), -1))[:, :8].flatten(0, 1)
        captions = [name for name in names for _ in range(min(8, options.per_class))]
        sheet = contact_sheet(shown, columns=min(8, options.per_class), labels=captions, scale=2)
        save_png(sheet, out / "drawn.png", overwrite=True)
    print(write_json(out / "chat.json", report))


if __name__ == "__main__":
    main()
