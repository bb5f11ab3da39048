"""``nextscale prepare index``"""

from __future__ import annotations

from typing import Any


def add_arguments(parser: Any) -> None:
    parser.add_argument(
        "source",
        type=str,
        help="webdataset shards: a pattern with {0000..0099} of local names, URLs or commands (pipe:)",
    )
    parser.add_argument("out", type=str, help="the index, a .json file; name it as data.source")


def run(arguments: Any) -> None:
    from nextscale.cli.console import note, progress, say
    from nextscale.datasets.stream_shards import StreamShards, count_samples, stream_urls, write_index

    if not arguments.out.endswith(".json"):
        raise ValueError(f"{arguments.out}: an index is a .json file; name it so")
    urls = stream_urls(arguments.source)
    if any(url.lower().startswith("pipe:") for url in urls):
        raise ValueError(
            f"{arguments.source} is a command, which an index must not hold: give URLs, or name it as data.source"
        )
    counts: list[int] = []
    with progress("counting", "shards") as report:
        for done, url in enumerate(urls, 1):
            count, damage = count_samples(url)
            counts.append(count)
            if damage is not None:
                note(f"a shard is broken: {damage}")
            report(done, len(urls))
    if not sum(counts):
        raise ValueError(f"none of the {len(urls)} shards of {arguments.source} has a sample that can be read")
    write_index(arguments.out, StreamShards(urls, tuple(counts)))
    say(f"{sum(counts):,} samples in {len(urls)} shards: {arguments.out}")
