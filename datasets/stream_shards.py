"""Webdataset shards that are read as streams, each from its beginning on: local files, URLs, the output of commands.

webdataset opens them (`gopen`); the archives are read by this package's own strict reader, so that a sample has the
same number here and in an indexed shard, and damage is told apart from the end.
"""

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from .errors import DatasetError, NoImagesError, ShardError, SourceError, listed
from .files import replace_file
from .packing import cache_folder
from .shards import Side, samples_in
from .sources import expand_braces, find

SCHEMES = ("http", "https", "ftps", "sftp", "s3", "gs", "hf", "pipe")
"""Beginnings of names that are no local files; what fetches them is curl, the AWS, Google or Hugging Face tools."""

_REMOTE = re.compile(rf"({'|'.join(SCHEMES)}):", re.IGNORECASE)
_CHUNK = 2**20
_ENDS_WITHIN = 30.0  # seconds
_WIDS = {"__kind__": "wids-shard-index-v1", "wids_version": 1}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamShards:
    """Shards and how many samples each has; `damage`: what is wrong with them, as far as counting has shown."""

    urls: tuple[str, ...]
    counts: tuple[int, ...]
    damage: tuple[str, ...] = ()


def is_stream(source: str) -> bool:
    """Whether a source can only be streamed: a URL, a command (`pipe:`), or an index of shards (.json)."""
    return _REMOTE.match(source) is not None or source.endswith(".json")


def open_stream_shards(source: str) -> StreamShards:
    """The shards behind a pattern of URLs, commands or local names, or in a .json index.

    Without an index the samples are counted, for which every shard is read once (of local, uncompressed ones only
    the headers); the counts are kept in the cache folder.

    Raises SourceError, NoImagesError (no shard has a sample), OSError.
    """
    if source.endswith(".json") and not _REMOTE.match(source):
        shards = read_index(source)
    else:
        shards = _counted(stream_urls(source))
    if not sum(shards.counts):
        raise NoImagesError(f"no sample in {listed(shards.urls, 3)}: {listed(shards.damage, 3) or 'they are empty'}")
    return shards


def stream_urls(source: str) -> tuple[str, ...]:
    """The shards that a pattern with `{0000..0099}` stands for. Raises SourceError."""
    if not _REMOTE.match(source):
        found = find(source, labels=False)
        if found.kind != "tar":
            raise SourceError(f"{source} is no webdataset shard (.tar, .tar.gz, .tgz), which alone can be streamed")
        return tuple(found.files)
    urls = expand_braces(source)
    if len(set(urls)) < len(urls):
        raise SourceError(f"{source} names the same shard more than once")
    return tuple(urls)


# --- an index: which shards there are, and how many samples each has --------------------------------------


def read_index(path: str | os.PathLike[str]) -> StreamShards:
    """A shard index in the JSON form of webdataset's `wids`: `shardlist`, a list of {url, nsamples}.

    Names without a scheme are relative to the index. Commands are refused: a file of data does not say what to run.
    Raises SourceError, OSError.
    """
    try:
        content = json.loads(Path(path).read_bytes())
        listing = content["shardlist"]
        urls, counts = [entry["url"] for entry in listing], [entry["nsamples"] for entry in listing]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceError(
            f"{path} is no index of shards ({error!r}): it must hold a shardlist of objects with url and nsamples"
        ) from None
    for url, count in zip(urls, counts, strict=True):
        if not isinstance(url, str) or not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise SourceError(
                f"{path}: url {url!r} with nsamples {count!r}; expected a name, and a number of at least 0"
            )
        if url.lower().startswith("pipe:"):
            raise SourceError(f"{path} holds the command {url!r}: commands are run only if data.source names them")
    if len(set(urls)) < len(urls):
        raise SourceError(f"{path} names the same shard more than once")
    folder = Path(path).resolve().parent
    urls = [url if _REMOTE.match(url) else str(folder / url.removeprefix("file:")) for url in urls]
    return StreamShards(tuple(urls), tuple(counts))


def write_index(path: str | os.PathLike[str], shards: StreamShards) -> None:
    """Write an index that `read_index` and webdataset's `wids` read; local names relative to it. Raises OSError."""
    place = Path(path).resolve()
    names = [url if _REMOTE.match(url) else os.path.relpath(Path(url).resolve(), place.parent) for url in shards.urls]
    listing = [{"url": name, "nsamples": count} for name, count in zip(names, shards.counts, strict=True)]
    place.parent.mkdir(parents=True, exist_ok=True)
    replace_file(place, json.dumps({**_WIDS, "shardlist": listing}, indent=1).encode())


def count_samples(url: str) -> tuple[int, str | None]:
    """(samples that can be read, what is wrong with the shard or None)."""
    count = 0
    try:
        with opened(url) as file:
            # Of a plain file the bytes of images are passed over; what is decompressed or fetched must flow by.
            total = Path(url).stat().st_size if file.plain else None
            for _ in samples_in(url, file, total, ((), _nothing), sys.maxsize):
                count += 1
    except (DatasetError, OSError) as error:
        return count, f"{url} (from sample {count} on: {error})"
    return count, None


def _counted(urls: tuple[str, ...]) -> StreamShards:
    key = hashlib.sha256("\n".join(_identity(url) for url in urls).encode()).hexdigest()[:32]
    place = cache_folder() / f"{key}.counts.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        counts = json.loads(place.read_bytes())["counts"]
        if len(counts) == len(urls) and all(isinstance(count, int) for count in counts):
            return StreamShards(urls, tuple(counts))
    if any(_REMOTE.match(url) for url in urls):
        _log.warning(
            "counting the samples of %d shards, for which each is fetched once; an index spares that "
            "(nextscale prepare index)",
            len(urls),
        )
    found = [count_samples(url) for url in urls]
    damage = tuple(text for _, text in found if text is not None)
    counts = [count for count, _ in found]
    if not damage:  # what fails today may be whole tomorrow
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(place, json.dumps({"counts": counts}).encode())
    return StreamShards(urls, tuple(counts), damage)


def _identity(url: str) -> str:
    if _REMOTE.match(url):
        return url
    stat = os.stat(url)
    return f"{os.path.abspath(url)}|{stat.st_size}|{stat.st_mtime_ns}"


def _nothing(extension: str, data: bytes) -> str:
    return ""


NO_SIDE: Side = ((), _nothing)
"""Images alone."""


# --- reading one ----------------------------------------------------------------------------------------


class BrokenShard(ShardError):
    """A shard breaks off; `at`: its first sample that cannot be read."""

    def __init__(self, message: str, at: int) -> None:
        super().__init__(message)
        self.at = at


def read_shard(url: str, side: Side, first: int, last: int) -> Iterator[tuple[int, str, str, bytes]]:
    """(number in the shard, name, text, bytes of the image file) of the samples `first` to `last` - 1.

    Raises BrokenShard where the shard is not there, breaks off, or has fewer.
    """
    number = 0
    try:
        with opened(url) as file:
            for name, text, _, _, image in islice(samples_in(url, file, None, side, first), last):
                if number >= first:
                    yield number, name, text, image
                number += 1
    except (DatasetError, OSError) as error:
        raise BrokenShard(str(error), number) from error
    if number < last:
        raise BrokenShard(f"{url} has {number} samples, {last} were counted. Write its index again.", number)


class Forward:
    """A stream that is read forwards only, decompressed on the way if it begins as gzip does.

    `plain`: it is a local file without compression, so passing over bytes costs nothing.
    """

    def __init__(self, raw: Any, seekable: bool) -> None:
        import gzip

        head = raw.read(2)
        if seekable:
            raw.seek(0)
        else:
            raw = _Rejoined(head, raw)
        packed = head == b"\x1f\x8b"
        self._raw: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        self.plain = seekable and not packed
        self._position = 0

    def read(self, size: int = -1, /) -> bytes:
        data: bytes = self._raw.read(size)
        self._position += len(data)
        return data

    def seek(self, offset: int, /) -> int:
        """Forwards only; behind the end, reading gives nothing."""
        if self.plain:
            self._position = self._raw.seek(offset)
        while self._position < offset and self.read(min(offset - self._position, _CHUNK)):
            pass
        return self._position


class _Rejoined:
    """A stream with its first bytes, that were looked at, put back."""

    def __init__(self, head: bytes, raw: Any) -> None:
        self._head, self._raw = head, raw

    def read(self, size: int = -1) -> bytes:
        head = self._head if size < 0 else self._head[:size]
        self._head = self._head[len(head) :]
        wanted = size if size < 0 else size - len(head)
        rest: bytes = self._raw.read(wanted) if wanted else b""
        if wanted and not rest:
            self._ended()
        return head + rest

    def _ended(self) -> None:
        """A command closes its output a moment before it ends: only then is it known whether it failed."""
        if (process := getattr(self._raw, "proc", None)) is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_ENDS_WITHIN)
            self._raw.check_status()


@contextmanager
def opened(url: str) -> Iterator[Forward]:
    """A shard to be read from its beginning. Raises OSError, also later, while it is read."""
    if not _REMOTE.match(url):
        with open(url, "rb") as file:
            yield Forward(file, True)
        return
    raw = _fetched(url)
    try:
        try:
            yield Forward(raw, False)
        except OSError as error:  # of the command, with all its arguments and not much else
            status = getattr(getattr(raw, "proc", None), "returncode", None)
            ended = f"what fetches it ended with exit status {status}" if status is not None else str(error)
            raise OSError(f"{url} cannot be read: {ended}") from error
    finally:
        if (process := getattr(raw, "proc", None)) is not None:
            process.terminate()  # else closing would wait for a server that sends nothing any more
        with suppress(OSError):  # a command that is closed before its end has failed, which is no matter
            raw.close()


def _fetched(url: str) -> IO[bytes]:
    from webdataset.gopen import Pipe, gopen

    if url.lower().startswith("s3:"):
        return Pipe(["aws", "s3", "cp", url, "-"], mode="rb", bufsize=_CHUNK)
    return gopen(url, "rb", _CHUNK)
