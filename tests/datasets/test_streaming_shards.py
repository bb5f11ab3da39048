"""Shards from anywhere: local, over HTTP, out of commands; their counts and their index."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pytest

from nextscale.datasets.errors import NoImagesError, SourceError
from nextscale.datasets.shards import LABELS
from nextscale.datasets.stream_shards import (
    BrokenShard,
    StreamShards,
    count_samples,
    is_stream,
    open_stream_shards,
    read_index,
    read_shard,
    write_index,
)
from nextscale.datasets.streaming import open_stream


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path.endswith("cut.tar"):  # promises more than it sends
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
        else:
            super().do_GET()


@pytest.fixture
def folder(tmp_path, make):
    """Two shards of four samples, plain and compressed."""
    make.tar(tmp_path / "a.tar", make.samples(4))
    make.tar(tmp_path / "b.tar.gz", make.samples(4, 4))
    return tmp_path


@pytest.fixture
def server(folder):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()
        thread.join()


def indices(source, **options):
    images = open_stream(source, size=8, labels=False, **options)
    return sorted(i for batch in islice(images.batches(0, 2), len(images) // 2) for i in batch["index"].tolist())


@pytest.mark.parametrize("url", ["{}/a.tar", "{}/b.tar.gz"])
@pytest.mark.parametrize("form", ["", "pipe", "http"])
def test_a_shard_is_the_same_from_everywhere(folder, make, server, url, form):
    name = url.format({"": folder, "pipe": f"pipe:cat {folder}", "http": server}[form])
    first = 4 if "b.tar" in url else 0
    assert count_samples(name) == (4, None)
    found = list(read_shard(name, LABELS, 1, 3))
    assert found == [(i, f"{first + i:04d}", str((first + i) % 3), make.image(first + i)) for i in (1, 2)]


def test_a_run_over_http(server):
    assert indices(server + "/{a.tar,b.tar.gz}") == list(range(8))


def test_what_fails_while_it_is_fetched(folder, server, make):
    make.tar(folder / "cut.tar", make.samples(4))
    for url in (f"{server}/none.tar", f"{server}/cut.tar", "pipe:false", f"{folder}/none.tar"):
        with pytest.raises(BrokenShard) as error:
            list(read_shard(url, LABELS, 0, 4))
        assert error.value.at < 4 and url in str(error.value)
    with pytest.raises(BrokenShard, match="exit status 22"):
        list(read_shard(f"{server}/none.tar", LABELS, 0, 4))
    with pytest.raises(BrokenShard, match="has 4 samples, 5 were counted"):
        list(read_shard(str(folder / "a.tar"), LABELS, 0, 5))
    # What fails when it is counted is left out, and named.
    images = open_stream(server + "/{a,none}.tar", size=8, labels=False)
    assert len(images) == 4 and "none.tar (from sample 0 on" in next(images.batches(0, 2))["skipped"][0]


def test_counts_are_kept_unless_a_shard_changes_or_is_broken(folder, make, cache):
    source = str(folder / "*.tar*")
    assert open_stream_shards(source).counts == (4, 4)
    (kept,) = cache.glob("*.counts.json")
    kept.write_text(json.dumps({"counts": [4, 3]}))
    assert open_stream_shards(source).counts == (4, 3)
    make.tar(folder / "a.tar", make.samples(5))
    assert open_stream_shards(source).counts == (5, 4)
    assert len(list(cache.glob("*.counts.json"))) == 2
    (folder / "a.tar").write_bytes(b"damaged" * 1000)
    assert open_stream_shards(source).counts == (0, 4)
    assert len(list(cache.glob("*.counts.json"))) == 2


def test_an_index(folder):
    shards = open_stream_shards(str(folder / "*.tar*"))
    write_index(folder / "index" / "train.json", StreamShards((*shards.urls, "https://host/c.tar"), (4, 4, 9)))
    content = json.loads((folder / "index" / "train.json").read_text())
    assert content["wids_version"] == 1
    assert content["shardlist"][0] == {"url": "../a.tar", "nsamples": 4}
    read = read_index(folder / "index" / "train.json")
    assert read.counts == (4, 4, 9) and read.urls[2] == "https://host/c.tar"
    assert [count_samples(url) for url in read.urls[:2]] == [(4, None)] * 2
    write_index(folder / "both.json", shards)
    assert indices(str(folder / "both.json")) == list(range(8))


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("no json", "no index of shards"),
        ('{"shards": []}', "no index of shards"),
        ('{"shardlist": [{"url": "a.tar"}]}', "no index of shards"),
        ('{"shardlist": [{"url": "a.tar", "nsamples": -1}]}', "expected a name, and a number"),
        ('{"shardlist": [{"url": "PIPE:touch x", "nsamples": 1}]}', "holds the command"),
        ('{"shardlist": [{"url": "a", "nsamples": 1}, {"url": "a", "nsamples": 1}]}', "more than once"),
    ],
)
def test_an_index_that_is_none(tmp_path, content, error):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(SourceError, match=error):
        open_stream_shards(str(tmp_path / "index.json"))


def test_what_is_streamed_by_itself(tmp_path):
    assert [is_stream(s) for s in ("https://a/b.tar", "S3://a/b.tar", "pipe:cat a", "a.json")] == [True] * 4
    assert not any(is_stream(s) for s in ("shards/a.tar", "photos", "a/https:/b.tar"))
    (tmp_path / "empty.json").write_text('{"shardlist": []}')
    with pytest.raises(NoImagesError, match="they are empty"):
        open_stream_shards(str(tmp_path / "empty.json"))
