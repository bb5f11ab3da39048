"""``nextscale chat``"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HELP = """Write a message and press Enter; an empty line sends nothing.
  /image FILE   add an image to the next message
  /draw TEXT    have an image drawn of it, whether or not the model would begin one
  /new          begin a new conversation
  /quit         leave (Ctrl-D too)
Ctrl-C stops an answer; what was written and drawn so far is kept."""


def add_arguments(parser: Any) -> None:
    from nextscale.cli.parsing import add_loading

    parser.add_argument("model", type=str, help="name, file or folder; `nextscale list` shows names")
    parser.add_argument("--message", type=str | None, default=None, help="say this, print the answer, and leave")
    parser.add_argument("--image", nargs="+", type=str, default=None, help="images that go with the first message")
    parser.add_argument("--draw", action="store_true", help="answer the message with an image in any case")
    parser.add_argument("--out", type=str, default="out/chat", help="folder for images and chat.json; files are kept")
    group = parser.add_argument_group("answers")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--max-new-tokens", type=int, default=512, help="most tokens of text in an answer")
    group.add_argument("--max-images", type=int, default=1, help="most images in an answer")
    group.add_argument("--temperature", type=float, default=0.0, help="of text; 0 takes the likeliest word")
    group.add_argument("--top-p", type=float, default=0.0, help="of text; 0: off")
    group.add_argument("--guidance", type=float | None, default=None, help="of images; unless given, the model's own")
    group.add_argument("--previews", action="store_true", help="save every image after each of its scales too")
    add_loading(parser)


def run(arguments: Any) -> None:
    from nextscale.cli.parsing import loading_options

    if arguments.max_new_tokens < 1 or arguments.max_images < 0:
        raise ValueError("--max-new-tokens must be 1 or more, --max-images 0 or more")
    if arguments.message is None and (arguments.draw or not sys.stdin.isatty()):
        first = sys.stdin.read() if not arguments.draw and not sys.stdin.isatty() else ""
        if not first.strip():
            raise ValueError("there is no message: give --message, or write one to the standard input")
        arguments.message = first
    import nextscale

    model = nextscale.load(arguments.model, **loading_options(arguments))
    if not hasattr(model, "chat"):
        raise ValueError(f"{arguments.model} is a {type(model).__name__}, which holds no conversation")
    talk = Talk(model, arguments)
    images = list(arguments.image or [])
    if arguments.message is not None:
        talk.say(arguments.message, images, arguments.draw)
        return
    print(HELP)
    for text, drawing, added in _lines(images):
        if text is None:
            talk.begin()
            continue
        try:
            talk.say(text, added, drawing)
        except ValueError as error:  # the conversation goes on
            print(f"nextscale: {' '.join(str(error).split())}", file=sys.stderr)


def _lines(images: list[str]) -> Iterator[tuple[str | None, bool, list[str]]]:
    """Messages typed, whether they ask for an image, and the images with them; None: a new conversation."""
    while True:
        try:
            line = input("\nyou> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/image":
            from nextscale.tasks.generation.vargpt_images import MessageError, open_image

            try:
                open_image(rest)
            except MessageError as error:
                print(f"nextscale: {error}", file=sys.stderr)
                continue
            images.append(rest)
            print(f"{len(images)} image{'s' if len(images) > 1 else ''} will go with the next message")
        elif command == "/new":
            images.clear()
            yield None, False, []
        elif command.startswith("/") and command != "/draw":
            print(HELP)
        elif line:
            yield (rest if command == "/draw" else line), command == "/draw", list(images)
            images.clear()


class Talk:
    """A conversation, with its images saved as they come and its record after every answer."""

    def __init__(self, model: Any, arguments: Any) -> None:
        self.model, self.arguments, self.out = model, arguments, Path(arguments.out)
        self.begin()

    def begin(self) -> None:
        """Forget what was said."""
        self.messages: list[dict[str, Any]] = []
        self.record: list[dict[str, Any]] = []

    def say(self, text: str, images: list[str], drawing: bool) -> None:
        """Say something and print the answer as it comes; a message that cannot be read is taken back."""
        from nextscale.tasks.generation.vargpt_chat import Answer, Preview

        parts = [{"type": "image", "image": image} for image in images]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        answer, files, stopped, forming = Answer(), [], False, None
        events = self._events([*self.messages, message], drawing)
        try:
            for event in events:
                if isinstance(event, Preview):
                    forming = None if event.finished else event
                    if event.finished or self.arguments.previews:
                        files.append(self._save(event))
                else:
                    print(event.text, end="", flush=True)
                answer.take(event)
        except KeyboardInterrupt:
            stopped = True
            if forming is not None:  # what there is of the image is kept
                files.append(self._save(forming, "unfinished"))
        print("\n(stopped)" if stopped else "")
        for file in files:
            print(f"image: {file}")
        self.messages.append(message)
        if answer.parts:
            self.messages.append(answer.message)
        self.record += [
            {"role": "user", "text": text, "images": images},
            {"role": "assistant", "text": answer.text, "images": [str(file) for file in files], "stopped": stopped},
        ]
        self._write()

    def _events(self, messages: list[dict[str, Any]], drawing: bool) -> Iterator[Any]:
        options = self.arguments
        # Every answer of a conversation draws anew.
        seed = options.seed + len(self.record)
        if drawing:
            return self.model.draw_answer([messages], seed=seed, guidance=options.guidance)
        return self.model.answer(
            [messages],
            max_new_tokens=options.max_new_tokens,
            max_images=options.max_images,
            seed=seed,
            temperature=options.temperature,
            top_p=options.top_p,
            guidance=options.guidance,
        )

    def _save(self, event: Any, stem: str | None = None) -> Path:
        from nextscale.pictures import save_pngs

        return save_pngs(event.image[None], self.out, stem=stem or ("image" if event.finished else "preview"))[0]

    def _write(self) -> None:
        from nextscale.core.checkpoint import write_json

        write_json(self.out / "chat.json", {"model": self.arguments.model, "messages": self.record})
