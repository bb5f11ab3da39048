"""What describers are asked and answer: prompts with the mark of a shape, answers written by transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from nextscale.core.random import image_seeds
from nextscale.tasks.generation.vargpt_images import save_tokenizer
from nextscale.tasks.shapes.describing_shapes import Given, read_shapes

if TYPE_CHECKING:
    from nextscale.tasks.shapes.describing import Describer

SHAPE = "<shape>"
"""What stands in a text for a shape."""
PATCH, START, END = "<point_patch>", "<point_start>", "<point_end>"
"""Published names of the tokens that stand for one token of a shape, and around all of them."""
FOLDER = "words"
"""Where a saved model keeps its tokenizer of words."""
TEMPLATE = (
    "{{ 'A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human\\'s questions. ' }}"
    "{% for message in messages %}{{ message['role'].upper() }}: {{ message['content'] }}"
    "{{ ' ' if message['role'] == 'user' else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""Vicuna's, for tokenizers that bring no chat template."""
Messages = Sequence[Mapping[str, str]]
Talk = tuple[str, list[dict[str, str]]]
"""A conversation: the name of the shape that it is about, and messages."""


class QuestionError(ValueError):
    """What a describer is asked cannot be read as it is."""


@dataclass(frozen=True)
class Words:
    """Numbers of the tokens that mean something beside words.

    Attributes:
        patch: stands for one token of a shape.
        start, end: before and behind a shape.
        eos: tokens that end an answer.
        empty: fills up shorter texts of a batch.
    """

    patch: int
    start: int
    end: int
    eos: tuple[int, ...]
    empty: int


def add_words(vocabulary: Any) -> Words:
    """Add a shape's marks to a tokenizer of transformers; their numbers.

    Raises:
        ValueError: the tokenizer has no token that ends a text.
    """
    if vocabulary.eos_token_id is None:
        raise ValueError("the language model's tokenizer has no token that ends a text: set its eos_token")
    vocabulary.add_special_tokens(
        {"additional_special_tokens": [*vocabulary.additional_special_tokens, PATCH, START, END]}
        if hasattr(vocabulary, "additional_special_tokens")
        else {"extra_special_tokens": [PATCH, START, END]}
    )
    patch, start, end = (int(number) for number in vocabulary.convert_tokens_to_ids([PATCH, START, END]))
    empty = vocabulary.eos_token_id if vocabulary.pad_token_id is None else vocabulary.pad_token_id
    return Words(patch, start, end, (vocabulary.eos_token_id,), empty)


class Speech:
    """What :class:`nextscale.tasks.shapes.describing.Describer` offers in words."""

    home: Path | None
    _vocabulary: Any = None

    @property
    def vocabulary(self) -> Any:
        """The language model's tokenizer; read from the model's folder where none was set.

        Raises:
            FileNotFoundError: the model has no folder, or it holds no tokenizer.
        """
        if self._vocabulary is None:
            place = None if self.home is None else self.home / FOLDER
            if place is None or not place.is_dir():
                raise FileNotFoundError(
                    f"{self.home or 'the model'} has no folder {FOLDER!r} with its language model's tokenizer: set "
                    "model.vocabulary"
                )
            from transformers import AutoTokenizer

            self._vocabulary = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        return self._vocabulary

    @vocabulary.setter
    def vocabulary(self, vocabulary: Any) -> None:
        self._vocabulary = vocabulary

    def save_words(self, folder: Path) -> None:
        """Write the language model's tokenizer beside a saved model, if there is one."""
        try:
            vocabulary = self.vocabulary
        except FileNotFoundError:
            return
        save_tokenizer(vocabulary, folder / FOLDER)

    # --- prompts -----------------------------------------------------------------------------------------

    def render(self, messages: Messages, answering: bool = True) -> str:
        """The text of a conversation.

        Raises:
            QuestionError: there is no message, one is empty, or not one shape is spoken of.
        """
        if not messages or any(not message["content"].replace(SHAPE, "").strip() for message in messages):
            raise QuestionError("a message is empty: ask something")
        count = sum(message["content"].count(SHAPE) for message in messages)
        if count != 1:
            raise QuestionError(f"the conversation has {count} marks {SHAPE}; it is about one shape")
        if any(mark in message["content"] for message in messages for mark in (PATCH, START, END)):
            raise QuestionError(f"write {SHAPE} for the shape, and none of {PATCH}, {START}, {END}")
        given = [{**m, "content": m["content"].replace(SHAPE, f"{START}{PATCH}{END}")} for m in messages]
        template = None if getattr(self.vocabulary, "chat_template", None) else TEMPLATE
        text: str = self.vocabulary.apply_chat_template(
            given, tokenize=False, add_generation_prompt=answering, chat_template=template
        )
        return text

    def spell(self, text: str, first: bool = True) -> list[int]:
        """Numbers of the tokens, the mark of a shape repeated for each of its tokens.

        Args:
            first: a conversation begins with the text; where its template begins with the token of beginnings, none is
                added.
        """
        model = cast("Describer", self)
        begin = self.vocabulary.bos_token
        special = first and not (begin and text.startswith(begin))
        ids = self.vocabulary(text, add_special_tokens=special)["input_ids"]
        if special and ids and ids[-1] in model.config.words.eos:
            ids = ids[:-1]  # some tokenizers end every text, and here an answer is to come
        patch = model.config.words.patch
        return [n for number in ids for n in [number] * (model.places if number == patch else 1)]

    def pad(self, rows: Sequence[Sequence[int]], left: bool = True) -> tuple[Tensor, Tensor]:
        """Texts of various length as one batch, and 1 where they are."""
        empty, longest = cast("Describer", self).config.words.empty, max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), empty)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            place = slice(longest - len(row), None) if left else slice(len(row))
            ids[number, place], mask[number, place] = torch.tensor(row), 1
        return ids, mask

    # --- answers -----------------------------------------------------------------------------------------

    def describe(
        self,
        shape: Given | Sequence[Given],
        question: str | Sequence[str] | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 0.0,
        seed: int | Sequence[int] = 0,
        batch_size: int = 4,
    ) -> Any:
        """What a shape, or several, are, in words.

        Args:
            shape: a mesh: file, ``trimesh.Trimesh``, :class:`nextscale.tasks.shapes.objects.Shape` or
                :class:`nextscale.datasets.shapes_files.Mesh`; or what the tokenizer reads of one: points with normals,
                or views.
            question: asked of all, or one for each; None: the configuration's.
            max_new_tokens: of an answer.
            temperature, top_p: 0 takes the likeliest word.
            seed: answer i is drawn from ``seed + i``, as are the points or views of mesh i; or one seed for each.

        Returns:
            A text, or one for each shape.

        Raises:
            MeshError: a mesh cannot be read.
            QuestionError: a question is empty, or too long for the model.
        """
        model = cast("Describer", self)
        single = not isinstance(shape, list | tuple)
        shapes: list[Any] = [shape] if single else list(cast("Sequence[Given]", shape))
        if question is None or isinstance(question, str):
            question = [question or model.config.question] * len(shapes)
        asked = list(question)
        if not shapes or len(asked) != len(shapes):
            raise QuestionError(
                f"{len(asked)} questions were given for {len(shapes)} shapes: give one, or one for each"
            )
        seeds = image_seeds(seed, len(shapes))
        tokens = [
            model.encode(read_shapes([each], model.tokenizer, [own])) for each, own in zip(shapes, seeds, strict=True)
        ]
        answers = self.answer(torch.cat(tokens), asked, seeds, max_new_tokens, temperature, top_p, batch_size)
        return answers[0] if single else answers

    @torch.inference_mode()
    def answer(
        self,
        tokens: Tensor,
        questions: Sequence[str],
        seeds: Sequence[int],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 0.0,
        batch_size: int = 4,
    ) -> list[str]:
        """Answers to questions about shapes that were encoded; see :meth:`describe`."""
        model, words = cast("Describer", self), cast("Describer", self).config.words
        if max_new_tokens < 1 or temperature < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, temperature {temperature}; expected 1, 0 or more")
        rows = [
            self.spell(self.render([{"role": "user", "content": text if SHAPE in text else f"{SHAPE} {text}"}]))
            for text in questions
        ]
        if (longest := max(len(row) for row in rows)) >= model.config.length:
            raise QuestionError(
                f"the question has {longest:,} tokens, the model reads {model.config.length:,} with its answer: "
                "shorten it"
            )
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            options |= {"temperature": temperature, "top_p": top_p or 1.0, "top_k": 0}
            batch_size = 1  # so that an answer depends on its own seed alone
        found = list[str]()
        for start in range(0, len(rows), batch_size):
            part = slice(start, start + batch_size)
            ids, mask = (each.to(model.device) for each in self.pad(rows[part]))
            x = model.embed(ids, model.codes(tokens[part]))
            devices = [model.device] if model.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seeds[start])
                written: Int[Tensor, "batch some"] = model.language.text.generate(
                    inputs_embeds=x,
                    attention_mask=mask,
                    pad_token_id=words.empty,
                    eos_token_id=list(words.eos),
                    **options,
                )
            found += [self.vocabulary.decode(row, skip_special_tokens=True).strip() for row in written.tolist()]
        return found


def read_talks(path: str | Path) -> list[Talk]:
    """Conversations about shapes: a JSON file, a list of ``messages`` (role and content, one of them with the mark
    ``<shape>``) and ``shape``, a name; names and messages.

    Raises:
        QuestionError: the file is no such file; the sample that is wrong is named.
        FileNotFoundError: there is no such file.
    """
    path = Path(path).expanduser()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        found = [
            (str(e["shape"]), [{"role": str(m["role"]), "content": str(m["content"])} for m in e["messages"]])
            for e in entries
        ]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise QuestionError(f"{path} holds no conversations about shapes ({type(error).__name__}: {error})") from None
    for number, (_, messages) in enumerate(found):
        if not any(message["role"] == "assistant" for message in messages):
            raise QuestionError(f"{path}, sample {number} has no answer: nothing could be learned from it")
    if not found:
        raise QuestionError(f"{path} holds no conversation")
    return found
