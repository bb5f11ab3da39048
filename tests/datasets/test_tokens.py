"""Token shards come back as they were written, survive a kill, and show damage by file name."""

import json
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from nextscale.datasets import files
from nextscale.datasets.errors import LabelError, TokenShardError
from nextscale.datasets.tokens import TokenWriter, open_tokens

META = {"vocabulary": 4096, "schedule": (1, 2, 3), "classes": ["cat", "dog"]}


def rows(first: int, count: int, length: int = 14) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    index = np.arange(first, first + count)
    return (index[:, None] * 31 + np.arange(length)) % 4096, index % 2, index


def write(folder, count=25, *, shard_size=10, step=4, **options):
    with TokenWriter(folder, metadata=META, shard_size=shard_size, **options) as writer:
        for first in range(writer.written, count, step):
            writer.write(*rows(first, min(step, count - first)))
    return open_tokens(folder, verify=True)


def check(dataset, count):
    assert len(dataset) == count
    batch = dataset.fetch([(0, i) for i in range(count)])
    tokens, labels, index = rows(0, count)
    np.testing.assert_array_equal(batch["tokens"], tokens)
    np.testing.assert_array_equal(batch["label"], labels)
    np.testing.assert_array_equal(batch["index"], index)


def test_round_trip(tmp_path):
    dataset = write(tmp_path / "t")
    check(dataset, 25)
    assert [shard["samples"] for shard in json.loads((tmp_path / "t" / "index.json").read_bytes())["shards"]] == [
        10,
        10,
        5,
    ]
    sample = dataset[(7, 12)]
    assert sample["tokens"].dtype == torch.int64
    assert sample["tokens"].tolist() == rows(12, 1)[0][0].tolist()
    assert (sample["label"], sample["index"]) == (0, 12)
    assert dataset[12]["index"] == 12
    assert (dataset.length, dataset.classes, dataset.num_classes) == (14, ("cat", "dog"), 2)
    assert dataset.label_counts().tolist() == [13, 12]
    assert dataset.metadata["schedule"] == [1, 2, 3]
    check(pickle.loads(pickle.dumps(dataset)), 25)
    with pytest.raises(IndexError):
        dataset[25]


@pytest.mark.parametrize(("vocabulary", "kind"), [(65536, "uint16"), (65537, "int32")])
def test_the_smallest_type_that_holds_the_vocabulary(tmp_path, vocabulary, kind):
    with TokenWriter(tmp_path, metadata={"vocabulary": vocabulary}) as writer:
        writer.write(torch.tensor([[0, vocabulary - 1]]), torch.tensor([-1]), torch.tensor([2**40]))
    assert json.loads((tmp_path / "index.json").read_bytes())["dtype"] == kind
    dataset = open_tokens(tmp_path)
    assert dataset[0]["tokens"].tolist() == [0, vocabulary - 1]
    assert (dataset[0]["label"], dataset[0]["index"]) == (-1, 2**40)
    with pytest.raises(LabelError, match="1 of 1 images"):
        dataset.require_labels()


def test_views_are_drawn_by_seed_epoch_and_place(tmp_path):
    with TokenWriter(tmp_path, metadata={"vocabulary": 100}, shard_size=7) as writer:
        for view in range(3):
            writer.write(
                np.full((10, 2), view) + 10 * (np.arange(10)[:, None] % 2),
                np.arange(10) % 2,
                np.arange(10) * 5,
            )
    dataset = open_tokens(tmp_path, seed=1)
    assert len(dataset) == 10
    drawn = np.stack([dataset.fetch([(epoch, i) for i in range(10)])["tokens"][:, 0] % 10 for epoch in range(60)])
    assert (np.bincount(drawn.ravel(), minlength=3) > 150).all()
    again = [dataset[(5, i)]["tokens"][0] % 10 for i in reversed(range(10))]
    assert again[::-1] == drawn[5].tolist()
    assert dataset[3]["index"] == 15
    assert dataset[3]["label"] == 1
    other = open_tokens(tmp_path, seed=2).fetch([(5, i) for i in range(10)])["tokens"][:, 0] % 10
    assert other.tolist() != drawn[5].tolist()
    last_two = open_tokens(tmp_path, views=[1, 2]).fetch([(e, i) for e in range(9) for i in range(10)])
    assert set((last_two["tokens"][:, 0] % 10).tolist()) == {1, 2}
    assert last_two["index"][:10].tolist() == list(range(0, 50, 5))
    for views in ([3], [], [-1]):
        with pytest.raises(TokenShardError, match="numbers from 0 to 2"):
            open_tokens(tmp_path, views=views)


KILLED = """
import os, signal, sys
import numpy as np
from nextscale.datasets import tokens
folder = sys.argv[1]
metadata = {"vocabulary": 4096, "schedule": (1, 2, 3), "classes": ["cat", "dog"]}
writer = tokens.TokenWriter(folder, metadata=metadata, shard_size=10)
replace = os.replace
count = 0
def counted(*names):
    global count
    count += 1
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
os.replace = counted
index = np.arange(100)
for i in range(0, 100, 4):
    at = index[i:i + 4]
    writer.write((at[:, None] * 31 + np.arange(14)) % 4096, at % 2, at)
"""


@pytest.mark.parametrize(("kill_at", "safe"), [(5, 20), (6, 20)])
def test_a_killed_writer_continues_after_its_last_complete_shard(tmp_path, kill_at, safe):
    """Killed before the third shard is in place, and between the shard and the index."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "t"), str(kill_at)], check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(TokenShardError, match=r"not complete .20 samples"):
        open_tokens(tmp_path / "t")
    writer = TokenWriter(tmp_path / "t", metadata=META, shard_size=10)
    assert writer.written == safe
    check(write(tmp_path / "t", 35), 35)
    assert not list((tmp_path / "t").glob(".*"))


def test_an_exception_keeps_what_is_complete_and_a_full_disk_breaks_nothing(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt), TokenWriter(tmp_path, metadata=META, shard_size=10) as writer:
        writer.write(*rows(0, 13))
        raise KeyboardInterrupt
    assert TokenWriter(tmp_path, metadata=META).written == 10

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device while writing .*tokens-00001"):
            write(tmp_path)
    check(write(tmp_path), 25)


def test_writing_more_and_starting_over(tmp_path):
    write(tmp_path, 25)
    check(write(tmp_path, 40), 40)
    check(write(tmp_path, 8, resume=False), 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "tokens-00000.safetensors"]


def test_other_metadata_are_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(TokenShardError, match="another classes, schedule: choose another folder"):
        TokenWriter(tmp_path, metadata={"vocabulary": 4096, "schedule": [1, 2]})


def test_truncated_missing_and_flipped_shards_are_named(tmp_path):
    write(tmp_path)
    first, second, third = sorted(tmp_path.glob("*.safetensors"))
    whole = second.read_bytes()
    second.write_bytes(whole[:-10])
    moved = third.rename(tmp_path / "away")
    with pytest.raises(TokenShardError, match=r"00001\.safetensors has .* instead of .*00002\.safetensors is missing"):
        open_tokens(tmp_path)
    moved.rename(third)
    flipped = bytearray(whole)
    flipped[-3] ^= 4
    second.write_bytes(flipped)
    open_tokens(tmp_path)
    with pytest.raises(TokenShardError, match=r"contents of .*00001\.safetensors are not what was written"):
        open_tokens(tmp_path, verify=True)
    data = bytearray(first.read_bytes())
    data[9:60] = bytes(51)
    first.write_bytes(data)
    with pytest.raises(TokenShardError, match=r"00000\.safetensors is damaged"):
        open_tokens(tmp_path)


def test_damaged_or_foreign_index(tmp_path):
    with pytest.raises(TokenShardError, match=r"no index\.json"):
        open_tokens(tmp_path)
    write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_bytes())
    (tmp_path / "index.json").write_text(json.dumps(index)[:50])
    with pytest.raises(TokenShardError, match="damaged"):
        open_tokens(tmp_path)
    for change in (
        {"format": "other"},
        {"shards": [{"file": "../x", "samples": 1, "bytes": 1, "sha256": ""}]},
    ):
        (tmp_path / "index.json").write_text(json.dumps(index | change))
        with pytest.raises(TokenShardError, match="no index of token shards"):
            open_tokens(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(index | {"version": 9}))
    with pytest.raises(TokenShardError, match="layout version 9"):
        open_tokens(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "labels", "indices", "message"),
    [
        ([[0, 4096]], [0], [0], "leave the vocabulary 0 to 4095"),
        ([[0, -1]], [0], [0], "tokens -1 to 0"),
        ([0, 1], [0], [0], r"must be \(N, L\)"),
        ([[0, 1]], [0, 1], [0], r"must be \(N, L\)"),
        ([[0.5, 1]], [0], [0], "must be integers"),
        ([[0, 1, 2]], [0], [0], "3 tokens a sample, but 2"),
    ],
)
def test_what_cannot_be_written(tmp_path, tokens, labels, indices, message):
    writer = TokenWriter(tmp_path, metadata=META)
    writer.write([[0, 1]], [0], [0])
    with pytest.raises(ValueError, match=message):
        writer.write(tokens, labels, indices)


@pytest.mark.parametrize("metadata", [{}, {"vocabulary": "many"}, {"vocabulary": 0}, {"vocabulary": 2, "x": {1, 2}}])
def test_metadata_must_say_the_vocabulary_in_json(tmp_path, metadata):
    with pytest.raises(ValueError, match=r"vocabulary|JSON"):
        TokenWriter(tmp_path, metadata=metadata)


def test_continuous_tokens_are_kept_in_half_precision(tmp_path):
    values = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    with TokenWriter(tmp_path, metadata={"values": "float16"}, shard_size=2) as writer:
        with pytest.raises(ValueError, match="tokens must be floating-point numbers, labels and indices integers"):
            writer.write(np.zeros((1, 3), np.int64), [0], [0])
        with pytest.raises(ValueError, match="beyond what float16 holds"):
            writer.write(np.full((1, 3), 1e6), [0], [0])
        writer.write(values, np.arange(5), np.arange(5))
    dataset = open_tokens(tmp_path, verify=True)
    batch = dataset.fetch(range(5))
    assert batch["tokens"].dtype == torch.float32
    np.testing.assert_array_equal(batch["tokens"].numpy(), values.astype(np.float16).astype(np.float32))
    with pytest.raises(ValueError, match="metadata\\['values'\\] is 'float8'"):
        TokenWriter(tmp_path / "other", metadata={"values": "float8"})
