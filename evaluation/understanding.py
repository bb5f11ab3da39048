"""Scores of answers to questions about images: yes and no, letters, captions.

POPE: Li et al. 2023 (arXiv 2305.10355). MME: Fu et al. 2023 (arXiv 2306.13394). MMBench: Liu et al. 2023 (arXiv
2307.06281). SEED-Bench: Li et al. 2023 (arXiv 2307.16125). How answers are read follows lmms-eval.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
"""Categories of MME whose scores add up to its perception score; the others are cognition."""


def read_yes_no(answer: str) -> str:
    """``"yes"``, ``"no"``, or ``"other"`` for what is neither: told by the answer's first four letters."""
    text = answer.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return "yes" if text == "y" else "no"
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def read_letter(answer: str, options: Sequence[str]) -> str:
    """The letter of the option that an answer names; empty where it names none.

    A letter of its own at the beginning counts first, such as ``B``, ``(B)`` or ``B. a dog``; then an option's whole
    text.
    """
    letters = string.ascii_uppercase[: len(options)]
    text = answer.strip()
    match = re.match(rf"\(?([{letters}])(?:[).:,\s]|$)", text) if letters else None
    if match:
        return match[1]
    plain = text.lower().rstrip(".")
    return next((a for a, option in zip(letters, options, strict=True) if option.lower().rstrip(".") == plain), "")


def pope_scores(answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 of "yes", and the share of "yes", in percent.

    Args:
        labels: ``"yes"`` or ``"no"``.
    """
    _same(answers, labels)
    said = [read_yes_no(answer) for answer in answers]
    hits = sum(a == "yes" == b for a, b in zip(said, labels, strict=True))
    yes, wanted = said.count("yes"), list(labels).count("yes")
    precision, recall = hits / yes if yes else 0.0, hits / wanted if wanted else 0.0
    right = sum(a == b for a, b in zip(said, labels, strict=True))
    return {
        "accuracy": 100 * right / len(said),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 200 * precision * recall / (precision + recall) if hits else 0.0,
        "yes": 100 * yes / len(said),
    }


def mme_scores(
    answers: Sequence[str], labels: Sequence[str], groups: Sequence[str], pairs: Sequence[str]
) -> dict[str, float]:
    """Of every category accuracy plus the share of images with both questions right, in percent, 0 to 200; and their
    sums ``perception`` and ``cognition``.

    Raises:
        ValueError: an image has not two questions.
    """
    _same(answers, labels, groups, pairs)
    images: dict[str, dict[str, list[bool]]] = {}
    for answer, label, group, pair in zip(answers, labels, groups, pairs, strict=True):
        images.setdefault(group, {}).setdefault(pair, []).append(read_yes_no(answer) == label)
    scores: dict[str, float] = {}
    for group, found in images.items():
        if odd := [pair for pair, right in found.items() if len(right) != 2]:
            raise ValueError(f"MME asks two questions of each image, {odd[0]} has {len(found[odd[0]])}")
        scores[group] = sum(50.0 * sum(right) + 100.0 * all(right) for right in found.values()) / len(found)
    sums = {"perception": 0.0, "cognition": 0.0}
    for group, score in scores.items():
        sums["perception" if group in PERCEPTION else "cognition"] += score
    return scores | sums


def choice_scores(
    answers: Sequence[str], labels: Sequence[str], options: Sequence[Sequence[str]], groups: Sequence[str]
) -> dict[str, float]:
    """Share of right letters, in percent: of every category and ``accuracy`` over all, with the share of answers that
    name no option (``unread``)."""
    _same(answers, labels, options, groups)
    said = [read_letter(answer, each) for answer, each in zip(answers, options, strict=True)]
    right = [a == b.strip().upper() for a, b in zip(said, labels, strict=True)]
    scores: dict[str, float] = {}
    for group in sorted(set(groups) - {""}):
        own = [each for each, name in zip(right, groups, strict=True) if name == group]
        scores[group] = 100 * sum(own) / len(own)
    return {**scores, "accuracy": 100 * sum(right) / len(right), "unread": 100 * said.count("") / len(said)}


def answer_scores(answers: Sequence[str], labels: Sequence[str], groups: Sequence[str]) -> dict[str, float]:
    """Share of answers that are right word for word, case, articles and punctuation aside, in percent: of every group
    and ``accuracy`` over all; beside each, what always giving the group's commonest answer would reach (``floor``)."""
    _same(answers, labels, groups)
    said, wanted = [_bare(each) for each in answers], [_bare(each) for each in labels]
    right = [a == b for a, b in zip(said, wanted, strict=True)]
    scores, floor = dict[str, float](), 0.0
    for group in sorted(set(groups)):
        own = [i for i, name in enumerate(groups) if name == group]
        least = majority([wanted[i] for i in own])
        floor += least * len(own) / len(groups)
        if group:
            scores |= {group: 100 * sum(right[i] for i in own) / len(own), f"{group} floor": least}
    return {**scores, "accuracy": 100 * sum(right) / len(right), "floor": floor}


def _bare(text: str) -> str:
    return " ".join(word for word in _plain(text).split() if word not in ("a", "an", "the"))


def caption_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU of one to four words and chrF of captions, in percent, by torchmetrics; and CIDEr-D (Vedantam et al. 2015,
    arXiv 1411.5726), times 100, by pycocoevalcap where it is installed.

    Texts are compared in lower case, without punctuation; official figures of COCO split words by Stanford's tokenizer,
    which needs Java.
    """
    from torchmetrics.functional.text import bleu_score, chrf_score

    _same(answers, references)
    said, wanted = [_plain(each) for each in answers], [[_plain(text) for text in each] for each in references]
    scores = {f"bleu-{n}": 100 * float(bleu_score(said, wanted, n_gram=n)) for n in range(1, 5)}
    scores["chrf"] = 100 * float(chrf_score(said, wanted))
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        return scores
    mean, _ = Cider().compute_score(dict(enumerate(wanted)), {i: [text] for i, text in enumerate(said)})
    return {**scores, "cider": 100 * float(mean)}


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def majority(labels: Sequence[str]) -> float:
    """Percent that are right where the commonest answer is always given: the floor to compare with."""
    return 100 * max(list(labels).count(label) for label in set(labels)) / len(labels)


def _same(answers: Sequence[object], *others: Sequence[object]) -> None:
    if not answers or any(len(each) != len(answers) for each in others):
        counts = ", ".join(str(len(each)) for each in (answers, *others))
        raise ValueError(f"there must be as many answers as questions, and one at least; got {counts}")
