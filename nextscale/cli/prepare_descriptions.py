"""``nextscale prepare descriptions``"""

from __future__ import annotations

from typing import Any


def add_arguments(parser: Any) -> None:
    parser.add_argument("shapes", type=str, help="folder of procedural objects that `nextscale prepare shapes` wrote")
    parser.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="folder of descriptions.json and questions.jsonl; the same, if none",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is asked")


def run(arguments: Any) -> None:
    import json
    from pathlib import Path

    from nextscale.cli.console import say
    from nextscale.core.checkpoint import write_text
    from nextscale.datasets.objects_captions import descriptions

    talks, questions = descriptions(arguments.shapes, arguments.seed)
    out = Path(arguments.out or arguments.shapes)
    said = write_text(json.dumps(talks, indent=1), out / "descriptions.json")
    asked = write_text("".join(f"{json.dumps(row)}\n" for row in questions), out / "questions.jsonl")
    say(f"{said}: {len(talks):,} conversations; {asked}: {len(questions):,} questions")
