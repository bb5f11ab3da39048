"""VARGPT in conversation: text that streams, images that form scale by scale, many conversations at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from nextscale.core.random import ImageDraws, image_seeds
from nextscale.tasks.generation.vargpt_images import FOLDER, MessageError, Processor
from nextscale.tasks.generation.vargpt_sampling import State
from nextscale.tasks.generation.vargpt_writing import Choice, Written, add, read, writing

if TYPE_CHECKING:
    from nextscale.tasks.generation.vargpt import VARGPT

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Words:
    """Some more text of an answer.

    Attributes:
        row: number of the conversation.
    """

    row: int
    text: str


@dataclass(frozen=True, eq=False)
class Preview:
    """What an image looks like after scale ``index`` of ``scales``; the last one is the image itself.

    Attributes:
        image: in [0, 1], on the CPU.
        seed: that it is drawn from.
    """

    row: int
    index: int
    scales: int
    image: Float[Tensor, "3 height width"]
    seed: int

    @property
    def finished(self) -> bool:
        return self.index + 1 == self.scales


Event = Words | Preview


@dataclass
class Answer:
    """One answer.

    Attributes:
        parts: texts and images in [0, 1], in order.
    """

    parts: list[str | Tensor] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All that was written."""
        return "".join(part for part in self.parts if isinstance(part, str)).strip()

    @property
    def images(self) -> list[Tensor]:
        """All that was drawn."""
        return [part for part in self.parts if isinstance(part, Tensor)]

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message, to go on from; the model sees its images as any other's."""
        kinds = (("text", part) if isinstance(part, str) else ("image", part) for part in self.parts)
        return {"role": "assistant", "content": [{"type": kind, kind: part} for kind, part in kinds]}

    def take(self, event: Event) -> None:
        """Add what an event brought; images when they are finished."""
        if isinstance(event, Preview):
            if event.finished:
                self.parts.append(event.image)
        elif self.parts and isinstance(self.parts[-1], str):
            self.parts[-1] += event.text
        else:
            self.parts.append(event.text)


class Chats:
    """What :class:`nextscale.tasks.generation.vargpt.VARGPT` offers in conversation."""

    home: Path | None
    _processor: Processor | None = None

    @property
    def processor(self) -> Processor:
        """Tokenizer and images; read from the model's folder where none was set.

        Raises:
            FileNotFoundError: the model has no folder, or it holds no tokenizer.
        """
        if self._processor is None:
            if self.home is None:
                raise FileNotFoundError("the model was not loaded from a folder: set model.processor to its Processor")
            self._processor = Processor.load(cast("VARGPT", self).config, self.home)
        return self._processor

    @processor.setter
    def processor(self, processor: Processor) -> None:
        self._processor = processor

    def save_processor(self, folder: Path, inside: str = FOLDER) -> None:
        """Write the tokenizer beside a saved model, if there is one, in a folder there or beside it."""
        if self._processor is None and self.home is None:
            return
        try:
            self.processor.save(folder / inside)
        except FileNotFoundError:
            return  # loaded without one

    # --- conversations -------------------------------------------------------------------------------------

    def chat(self, messages: Messages | Sequence[Messages], **options: Any) -> Any:
        """Answer one conversation, or several at once.

        Args:
            messages: of transformers' chat templates, or a list of such conversations.
            options: of :meth:`answer`.

        Returns:
            An :class:`Answer`, or one for each conversation.

        Raises:
            MessageError: a message is empty, an image cannot be read, or a conversation is too long.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast("list[Messages]", [messages] if single or not messages else list(messages))
        answers = [Answer() for _ in conversations]
        for event in self.answer(conversations, previews=False, **options):
            answers[event.row].take(event)
        return answers[0] if single else answers

    @torch.inference_mode()
    def answer(
        self,
        conversations: Sequence[Messages],
        *,
        max_new_tokens: int = 512,
        max_images: int = 1,
        seed: int | Sequence[int] = 0,
        temperature: float = 0.0,
        top_p: float = 0.0,
        guidance: float | Sequence[float] | None = None,
        draw: Mapping[str, Any] | None = None,
        previews: bool = True,
    ) -> Iterator[Event]:
        """Answers as they come. Stop whenever you like: what came is there.

        Args:
            max_new_tokens: most tokens of text in an answer.
            max_images: most images in an answer; where it is reached the answer ends, as published models' do after
                one. 0: none is drawn.
            seed: conversation i draws from ``seed + i``, text and images apart, so that it is answered the same alone
                and in any batch; or one seed per conversation.
            temperature, top_p: of text; temperature 0 takes the likeliest word.
            guidance, draw: see :meth:`VARGPT.steps` and :meth:`VARGPT.emitter`.
            previews: show images after every scale, not only when they are finished.
        """
        if max_new_tokens < 1 or max_images < 0:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens} and max_images {max_images}; expected 1 or more, 0 or more"
            )
        model = cast("VARGPT", self)
        marks = model.config.marks
        seeds = image_seeds(seed, len(conversations))
        state, last = self._read(conversations)
        choose = Choice(seeds, temperature, top_p=top_p)
        rows = list(range(len(conversations)))
        left = dict.fromkeys(rows, max_new_tokens)
        shown: dict[int, tuple[list[int], str]] = {row: ([], "") for row in rows}
        for drawn in range(max_images + 1):
            stops = [*marks.eos, marks.start]
            words = writing(model, state, last, choose, max(left[row] for row in rows), stops)
            written: Written | None = None
            while written is None:
                try:
                    place, token = next(words)
                except StopIteration as end:
                    written = end.value
                    break
                row = rows[place]
                left[row] -= 1
                if token not in stops:
                    shown[row], text = self._more(shown[row], token)
                    if text:
                        yield Words(row, text)
            going = [i for i, tokens in enumerate(written.tokens) if tokens and tokens[-1] == marks.start]
            if drawn == max_images or not going:
                return
            rows, last, choose = [rows[i] for i in going], written.last[going], choose.select(going)
            state = state.select(going)
            # Another image of the conversation is another draw.
            own = [seeds[row] + 1_000_003 * drawn for row in rows]
            draws, scales = ImageDraws(own), len(model.config.schedule)
            for step in model.steps(state, draws=draws, guidance=guidance, emitter=model.emitter(**(draw or {}))):
                if previews or step.index + 1 == scales:
                    images = self._picture(step.total)
                    for row, image, number in zip(rows, images, own, strict=True):
                        yield Preview(row, step.index, scales, image, number)
            if drawn + 1 == max_images:
                return
            last = self._leave(state)
            shown.update({row: ([], "") for row in rows})

    def _read(self, conversations: Sequence[Messages]) -> tuple[State, Tensor]:
        """Conversations, and the hidden state behind which each answer comes."""
        model, prompt = cast("VARGPT", self), self.processor.read(conversations)
        device = model.device
        pixels = None if prompt.pixels is None else prompt.pixels.to(device)
        state, states = read(model, prompt.ids.to(device), prompt.mask.to(device), pixels, prompt.grids.to(device))
        return state, states[:, -1]

    def _more(self, shown: tuple[list[int], str], token: int) -> tuple[tuple[list[int], str], str]:
        """All tokens and text so far, and what of it is new; half a character waits for its other half."""
        tokens, before = [*shown[0], token], shown[1]
        text = self.processor.decode(tokens)
        if text.endswith("\ufffd"):
            return (tokens, before), ""
        return (tokens, text), text[len(before) :]

    def _leave(self, state: State) -> Tensor:
        """End the image, as training has it: what fills it up, then its end; gives the last hidden state."""
        model = cast("VARGPT", self)
        config, rows = model.config, len(state)
        state.next = state.mask.sum(1)
        fill = torch.zeros(rows, config.places - config.schedule.length, model.to_language.expand.in_features)
        end = model.language.embedding(torch.full((rows, 1), config.marks.end, device=model.device))
        x = torch.cat((model.to_language(fill.to(model.device, model.dtype)), end), dim=1)
        counts = torch.ones(x.shape[:2], dtype=torch.bool, device=model.device)
        return add(model, state, x, counts)[:, -1]

    def _picture(self, total: Tensor) -> Float[Tensor, "batch 3 height width"]:
        tokenizer = cast("VARGPT", self).tokenizer
        image: Tensor = (tokenizer.decode_features(total) + 1) / 2
        return image.float().cpu()

    @torch.inference_mode()
    def draw_answer(
        self,
        conversations: Sequence[Messages],
        *,
        seed: int | Sequence[int] = 0,
        guidance: float | Sequence[float] | None = None,
        draw: Mapping[str, Any] | None = None,
    ) -> Iterator[Preview]:
        """One image for each conversation, whether the model would begin one or not; as it forms."""
        model, seeds = cast("VARGPT", self), image_seeds(seed, len(conversations))
        state, scales = self._begin_image(conversations), len(model.config.schedule)
        emitter = model.emitter(**(draw or {}))
        for step in model.steps(state, draws=ImageDraws(seeds), guidance=guidance, emitter=emitter):
            for row, (image, own) in enumerate(zip(self._picture(step.total), seeds, strict=True)):
                yield Preview(row, step.index, scales, image, own)

    def _begin_image(self, conversations: Sequence[Messages]) -> State:
        """Conversations whose answers have come to the start of an image."""
        model, rows = cast("VARGPT", self), len(conversations)
        state, _ = self._read(conversations)
        start = model.language.embedding(torch.full((rows, 1), model.config.marks.start, device=model.device))
        add(model, state, start, torch.ones(rows, 1, dtype=torch.bool, device=model.device))
        return state

    # --- images alone --------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Messages | Sequence[str | Messages],
        n: int | None = None,
        seed: int | Sequence[int] = 0,
        *,
        batch_size: int = 4,
        guidance: float | Sequence[float] | None = None,
        progress: Callable[[int, int], None] | None = None,
        **draw: Any,
    ) -> Float[Tensor, "n 3 height width"]:
        """Images in [0, 1], on the CPU: answers that begin with an image, whether the model would begin one or not.

        Args:
            prompt: what the user says, conversations (such as one with an image to change), or several of either,
                repeated to ``n`` images.
            n: number of images; None: as many as there are prompts.
            seed: image i is drawn from ``seed + i``, so it comes out the same alone and in any batch.
            guidance: see :meth:`VARGPT.steps`.
            progress: called with (scales done, scales in all) over all batches.
            draw: top_k, top_p, temperature; see :meth:`VARGPT.emitter`.

        Raises:
            ValueError: there is no prompt, ``n`` is below 1, or the number of seeds is another.
        """
        model = cast("VARGPT", self)
        one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], Mapping))
        prompts: list[Any] = [prompt] if one else list(prompt)
        if not prompts:
            raise MessageError("the list of prompts is empty; give at least one")
        n = len(prompts) if n is None else n
        seeds, images = image_seeds(seed, n), []
        done, total = 0, len(model.config.schedule) * -(-n // batch_size)
        for begin in range(0, n, batch_size):
            texts = [i % len(prompts) for i in range(begin, min(begin + batch_size, n))]
            different = sorted(set(texts))
            talks = [prompts[i] if not isinstance(prompts[i], str) else _asked(prompts[i]) for i in different]
            with torch.inference_mode():
                state = self._begin_image(talks).select([different.index(text) for text in texts])
                draws = ImageDraws(seeds[begin : begin + batch_size])
                for step in model.steps(state, draws=draws, guidance=guidance, emitter=model.emitter(**draw)):
                    done, sum_of_scales = done + 1, step.total
                    if progress is not None:
                        progress(done, total)
                images.append(self._picture(sum_of_scales))
        return torch.cat(images)


def _asked(text: str) -> Messages:
    return [{"role": "user", "content": text}]
