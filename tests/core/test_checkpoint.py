"""Files of weights: written whole or not at all, read without running code, damage named."""

import argparse
import errno
import json
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nextscale.core.checkpoint import (
    CheckpointError,
    KeyMap,
    assign,
    find_state_dict,
    read_folder,
    read_tensors,
    save_folder,
    strip_prefixes,
    write_atomically,
    write_json,
    write_tensors,
)

BIG = {"x": torch.zeros(100_000)}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing beyond it fails with an error of the operating system, wherever the code that writes is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "torch": lambda path: write_tensors(path, BIG),
    "safetensors": lambda path: write_atomically(path, lambda p: save_file(BIG, p)),
    "json": lambda path: write_json(path, ["x" * 400_000]),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_no_room_leaves_the_old_file_and_no_other(writer: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with file_size_limit(50_000), pytest.raises(OSError, match=r"file could not be written: File too large\. What"):
        WRITERS[writer](path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
    WRITERS[writer](path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("a mistake"), RuntimeError),
    ],
)
def test_an_interrupted_write_leaves_nothing(error: BaseException, raised: type, tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_text("half")
        raise error

    (tmp_path / "file").write_text("old")
    with pytest.raises(raised) as caught:
        write_atomically(tmp_path / "file", write)
    assert (raised is not OSError) == (caught.value is error)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "old"}


def test_folder_round_trip_and_damage(tmp_path: Path) -> None:
    state = {"a": torch.randn(2, 3).T, "b": torch.arange(4)}
    save_folder(tmp_path, state, {"system": "x"})
    read, config = read_folder(tmp_path)
    assert config == {"system": "x"}
    assert {k: v.tolist() for k, v in read.items()} == {k: v.tolist() for k, v in state.items()}
    weights, good = tmp_path / "model.safetensors", (tmp_path / "model.safetensors").read_bytes()
    for place in (0, 9, len(good) // 2, len(good) - 1):  # length, header, data
        weights.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        with pytest.raises(CheckpointError, match="is damaged: its checksum"):
            read_folder(tmp_path)
    weights.write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        read_folder(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        read_folder(tmp_path)
    for text, message in (("{", "not valid JSON"), ("[]", "holds a list, expected an object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        read_folder(tmp_path / "nowhere")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_damage_is_named_wherever_it_is(kind: str, tmp_path: Path) -> None:
    state = {"weight": torch.randn(4, 5), "bias": torch.randn(5)}
    path = tmp_path / ("file.safetensors" if kind == "safetensors" else "file.pth")
    if kind == "safetensors":
        save_file(state, path)
    else:
        content = {"model": state, "args": argparse.Namespace(depth=16, names=["a"]), "epoch": 3}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
        assert read_tensors(path)["args"].depth == 16
    good = path.read_bytes()
    for length in range(0, len(good), 5):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=r"truncated|damaged|empty|refused"):
            read_tensors(path)
    refused = 0
    for place in range(0, len(good), 3):  # a flipped bit may be harmless, and raises nothing else
        path.write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
        try:
            read_tensors(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_an_injected_pickle_is_refused_and_not_run(kind: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.pth", tmp_path / "ran"
    content = {"weight": torch.zeros(2), "payload": Payload(mark)}
    if kind == "bare":
        path.write_bytes(pickle.dumps({"payload": Payload(mark)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"evil\.pth is refused: it needs posix\.system"):
        read_tensors(path)
    assert not mark.exists()


def test_what_is_no_dict_or_not_there(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list, expected a dict"):
        read_tensors(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_tensors(tmp_path / "none.pth")


def test_state_dict_is_found_under_prefixes_and_in_nested_files() -> None:
    flat = {"module._orig_mod.a.weight": torch.zeros(1), "module.b": torch.ones(1), "step": 3}
    nested = (("trainer", "model"), ("state_dict",))
    for content in (flat, {"trainer": {"model": flat, "config": 1}}, {"state_dict": flat, "args": None}):
        assert set(find_state_dict(content, nested, "a.weight")) == {"a.weight", "b"}
    assert strip_prefixes("blocks.0._orig_mod.weight") == "blocks.0.weight"
    with pytest.raises(CheckpointError, match="no entry 'c' was found; the file's first keys are 'module"):
        find_state_dict(flat, nested, "c")


def test_key_map_goes_both_ways() -> None:
    keys = KeyMap([("blocks.*.norm", "h.*.ln"), ("head.linear", "head"), ("levels.*.parts.*", "l.*.p.*")])
    for ours, theirs in (
        ("blocks.12.norm.weight", "h.12.ln.weight"),
        ("head.linear.bias", "head.bias"),
        ("levels.1.parts.20.w", "l.1.p.20.w"),
        ("blocks.1.normal", "blocks.1.normal"),
        ("header.x", "header.x"),
    ):
        assert keys.to_official(ours) == theirs
        assert keys.from_official(theirs) == ours


def test_weights_that_do_not_fit_are_all_named() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    module[0].bias.requires_grad_(False)
    right = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()
    wrong: dict[str, Tensor] = {k: v for k, v in right.items() if k != "1.weight"}
    wrong |= {"0.weight": torch.zeros(3, 4), "extra": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="do not fit a test") as caught:
        assign(module, wrong, "a test")
    for part in ("missing 1.weight (3,)", "unknown extra (1,)", "0.weight has shape (3, 4), expected (3, 2)"):
        assert part in str(caught.value)
    assign(module, right, "a test")
    assert module[0].weight.data_ptr() == right["0.weight"].data_ptr()
    assert [p.requires_grad for p in module.parameters()] == [True, False, True, True]


def test_saved_config_records_the_checksum(tmp_path: Path) -> None:
    save_folder(tmp_path, {"a": torch.zeros(1)}, {"k": 1})
    assert set(json.loads((tmp_path / "config.json").read_text())) == {"k", "sha256"}
