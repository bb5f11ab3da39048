"""Every command and every piece of Python in the documentation runs, and every picture and link is there.

In README.md and docs/*.md the ``$`` lines of ``console`` blocks and the ``python`` blocks are run from top to bottom,
each document in a folder of its own that holds the files it names (see conftest.py); the Python of one document shares
its variables. Lines below a command are its output, where an ellipsis stands for anything. Comments above a block say
what a reader need not know:

    <!-- test: append OPTIONS -->        the block's commands run with these too, to be short
    <!-- test: parse-only: REASON -->    not run; the options must exist
    <!-- test: fails -->                 the block's commands end with an error
    <!-- test: write NAME -->            the block is a file of the reader's
"""

import contextlib
import io
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pytest

from nextscale.cli import COMMANDS, main, module

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"console", "python", "yaml", "text", "bibtex"}
ELSEWHERE = {"git", "hf", "pip", "tensorboard"}
"""Programs that are not the library's: never run here."""


@dataclass
class Block:
    """A fenced block: its language, its content, the line it starts on, and what the comments above it say."""

    language: str
    content: str
    line: int
    append: list[str] = field(default_factory=list)
    parse_only: str = ""
    fails: bool = False
    write: str = ""


@dataclass
class Command:
    words: list[str]
    output: str


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a document.

    Raises ValueError for a comment that is not understood, or that no block follows.
    """
    lines = text.split("\n")
    orders: list[str] = []
    number = 0
    while number < len(lines):
        line = lines[number]
        if order := re.fullmatch(r"<!-- test: (.*) -->", line):
            orders.append(order[1])
        elif line.startswith("```"):
            end = lines.index("```", number + 1)
            block = Block(line[3:], "\n".join(lines[number + 1 : end]), number + 1)
            for text_of_order in orders:
                obey(block, text_of_order)
            orders = []
            yield block
            number = end
        elif line.strip() and orders:
            raise ValueError(f"line {number + 1}: {orders} stands above no block")
        number += 1


def obey(block: Block, order: str) -> None:
    word, _, rest = order.partition(" ")
    if word == "append" and rest:
        block.append = shlex.split(rest)
    elif word == "parse-only:" and rest:
        block.parse_only = rest
    elif word == "write" and rest:
        block.write = rest
    elif order == "fails":
        block.fails = True
    else:
        raise ValueError(f"line {block.line}: {order!r} is not understood")


def commands(content: str) -> list[Command]:
    """The ``$`` lines of a console block, each with the lines below it."""
    found: list[Command] = []
    for line in content.replace("\\\n", " ").split("\n"):
        if line.startswith("$ "):
            found.append(Command(shlex.split(line[2:], comments=True), ""))
        elif found:
            found[-1].output += line + "\n"
        else:
            raise ValueError(f"output without a command: {line!r}")
    return found


def run(words: list[str]) -> int:
    """Run a command in this process; returns its exit status."""
    match words:
        case ["nextscale", *arguments]:
            return main(arguments)
        case ["python", "-m", "nextscale.parity", *arguments]:
            return import_module("nextscale.parity.__main__").main(arguments)
        case ["python", script, *arguments] if (ROOT / script).is_file():
            done = subprocess.run([sys.executable, str(ROOT / script), *arguments], capture_output=True, text=True)
            print(done.stdout, done.stderr)
            return done.returncode
    raise ValueError(f"the test cannot run {words[0]!r}: mark the block parse-only")


def parse(words: list[str]) -> None:
    """Check that a command's options exist, without running it.

    Raises AssertionError, ValueError.
    """
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    match words:
        case ["accelerate", "launch", *rest]:
            launcher = import_module("accelerate.commands.launch").launch_command_parser()
            options = launcher.parse_args(rest)
            assert options.module, "start the command line as a module"
            parse(["python", "-m", options.training_script, *options.training_script_args])
        case ["torchrun", *rest]:
            options = import_module("torch.distributed.run").parse_args(rest)
            assert options.module, "start the command line as a module"
            parse(["python", "-m", options.training_script, *options.training_script_args])
        case ["python", "-m", "nextscale.cli", *arguments] | ["nextscale", *arguments]:
            command = module(next(word for word in arguments if word in COMMANDS))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(command, "run", lambda arguments: None)
                assert main(arguments) == 0
        case ["python", script, *arguments] if (ROOT / script).is_file():
            help_text = subprocess.run(
                [sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True, timeout=60
            ).stdout
            for word in arguments:
                assert not word.startswith("--") or re.search(rf"{re.escape(word)}\b", help_text), (
                    f"{script} has no {word}"
                )
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text()
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), (
                f"no such target: {targets}"
            )
        case [program, *_]:
            assert program in ELSEWHERE, f"what is {program}?"


def matches(expected: str, output: str) -> bool:
    """Whether lines appear in an output, in their order; an ellipsis stands for anything."""
    pieces = [re.escape(piece) for piece in " ".join(expected.split()).split("…")]
    return re.search(".*".join(pieces), " ".join(output.split())) is not None


def run_console(block: Block) -> None:
    for command in commands(block.content):
        said = io.StringIO()
        if block.parse_only:
            parse(command.words)
            continue
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = run([*command.words, *block.append])
        output = said.getvalue()
        assert bool(status) == block.fails, f"{shlex.join(command.words)} ended with {status}:\n{output}"
        assert matches(command.output, output), f"{shlex.join(command.words)} said\n{output}\nnot\n{command.output}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_everything_in_it_runs(document: Path, reader: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    text = document.read_text(encoding="utf-8")
    folder = reader(text)
    page = types.ModuleType(f"page_{document.stem.lower()}")
    monkeypatch.setitem(sys.modules, page.__name__, page)
    for block in blocks(text):
        place = f"{document.relative_to(ROOT)}:{block.line}"
        assert block.language in LANGUAGES, f"{place}: a block of {block.language!r}; there are {sorted(LANGUAGES)}"
        try:
            if block.write:
                (folder / block.write).write_text(block.content + "\n", encoding="utf-8")
            elif block.language == "console":
                run_console(block)
            elif block.language == "python":
                # As far down as in the document, so that a traceback names its line.
                exec(compile("\n" * block.line + block.content, str(document), "exec"), page.__dict__)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{place}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_it_refers_to_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose)
    local = [target for target in targets if not re.match(r"https?://|#", target)]
    missing = [target for target in local if not (document.parent / target.partition("#")[0]).exists()]
    assert not missing
    images = re.findall(r"!\[(.*?)\]", prose) + re.findall(r'<img[^>]*?alt="(.*?)"', prose)
    assert len(images) == len(re.findall(r"!\[|<img", prose)), "every picture says what it shows"
    assert all(len(alternative) > 10 for alternative in images)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_its_sections_that_are_linked_exist(document: Path) -> None:
    for target, section in re.findall(r"\]\(([^)\s#]*)#([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        other = (document.parent / target if target else document).read_text(encoding="utf-8")
        titles = re.findall(r"^#+ (.*)$", other, re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert section in anchors, f"{target}#{section} is none of {sorted(anchors)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_figure_is_left_open(document: Path) -> None:
    assert re.findall(r"\{\{\w*\}?\}?", document.read_text(encoding="utf-8")) == []


def test_the_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in DOCUMENTS[1:] if f"(docs/{path.name})" not in text] == []


def test_the_readme_says_which_systems_work() -> None:
    from nextscale.systems import SYSTEMS

    rows = re.findall(
        r"^\| \[([\w-]+)\]\(\S+\) \|(.*)\|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) == 15
    working = {name.lower() for name, rest in rows if "not yet" not in rest}
    # LiteVAR is a way to compress the others' models, not a kind of file.
    tokenizers = {"kl", *(name for name in SYSTEMS if name.endswith("-vq"))}
    others = {"raster", "describer"}  # a baseline, and what describes SAR3D's and G3PT's objects
    assert working - {"litevar"} == set(SYSTEMS) - tokenizers - others


def test_a_block_is_read_with_its_orders() -> None:
    text = "<!-- test: append --num 1 -->\n\n```console\n$ nextscale list \\\n    var\nnames…\n```\n"
    (block,) = blocks(text)
    assert (block.append, block.line) == (["--num", "1"], 3)
    (command,) = commands(block.content)
    assert (command.words, command.output) == (["nextscale", "list", "var"], "names…\n")
    with pytest.raises(ValueError, match="above no block"):
        list(blocks("<!-- test: fails -->\nText.\n"))
    with pytest.raises(ValueError, match="not understood"):
        list(blocks("<!-- test: skip -->\n```python\n```\n"))


def test_an_option_that_does_not_exist_is_found() -> None:
    with pytest.raises(AssertionError):
        parse(["nextscale", "list", "--colour"])
    with pytest.raises(AssertionError, match="no such target"):
        parse(["make", "coffee"])
    assert not matches("8 images in out", "9 images in out")
    assert matches("8 images in out: … to b.png", "8 images in out: a.png\nto b.png")
