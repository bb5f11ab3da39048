"""Reading and writing weights: safely, atomically, and with a message when a file is not what it should be."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HARMLESS_CLASSES = (argparse.Namespace,)
"""Classes without behaviour that training files hold beside the weights; nothing else is unpickled."""

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class CheckpointError(ValueError):
    """A file of weights cannot be used: it is damaged, unsafe, or of another model."""


# --- writing ------------------------------------------------------------------------------------------


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then move it there in one step.

    An interruption, or a disk that runs full, leaves the old file as it was and no part of the new one.

    Raises:
        OSError: the file could not be written; the message names the path and the cause.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        write(Path(name))
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        reason = system_error(error)
        if reason is None:
            raise
        raise OSError(f"{path} could not be written: {reason}. What was there before is unchanged") from error
    return path


def system_error(error: BaseException) -> str | None:
    """What the operating system said, if that is behind an error; serialisation libraries wrap it."""
    if not isinstance(error, Exception):
        return None
    link: BaseException | None = error
    told = None
    while link is not None:
        if isinstance(link, OSError):
            if link.strerror:
                return link.strerror
            told = told or str(link)
        link = link.__cause__ or link.__context__
    if told is not None:
        return told
    found = re.search(r"([^:]+) \(os error \d+\)", str(error))  # as safetensors words it
    return found.group(1).strip() if found else None


def write_tensors(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write nested dicts and lists of tensors and plain values atomically, for :func:`read_tensors`."""

    def write(temporary: Path) -> None:
        # Through a file of Python's: given a path, PyTorch does not say that the disk is full.
        with temporary.open("wb") as file:
            torch.save(dict(content), file)

    return write_atomically(path, write)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(text: str, path: str | Path) -> Path:
    """Write UTF-8 text atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    return write_atomically(path, write)


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON atomically."""
    return write_text(json.dumps(value, indent=2) + "\n", path)


def save_folder(folder: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """Write ``model.safetensors`` and ``config.json`` (with the weights' checksum) into a folder."""
    from safetensors.torch import save_file

    folder = Path(folder)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    weights = write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path))
    write_json(folder / CONFIG_FILE, {**config, "sha256": _sha256(weights)})
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading ------------------------------------------------------------------------------------------


def read_folder(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and configuration written by :func:`save_folder`.

    Raises:
        CheckpointError: a file is missing, damaged, or differs from its checksum.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {CONFIG_FILE}: it is not a folder saved by this library") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG_FILE} holds a {type(config).__name__}, expected an object")
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise CheckpointError(f"{folder} holds no {WEIGHTS_FILE}")
    expected = config.pop("sha256", None)
    if expected is not None and _sha256(weights) != expected:
        raise CheckpointError(
            f"{weights} is damaged: its checksum is not the one {CONFIG_FILE} records (a truncated copy or "
            "flipped bits). Copy or download it again"
        )
    return read_tensors(weights), config


def read_tensors(path: str | Path) -> dict[str, Any]:
    """The content of a ``.safetensors`` file or of a PyTorch file, memory-mapped, without running code.

    Returns:
        A flat state dict, or the nested dict a training file holds.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated or damaged, or would need code to be executed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty")
    with torch.serialization.safe_globals(list(HARMLESS_CLASSES)):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            refused = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"class[^\w]+([\w.]+)", str(error))
            what = f"needs {refused.group(1)}" if refused else "is not a plain PyTorch file of tensors"
            raise CheckpointError(
                f"{path} is refused: it {what}, and loading that could run code. Files of tensors and plain "
                "containers are read; ask the file's author for such a file or for safetensors"
            ) from None
        except MemoryError:
            raise
        except Exception as error:  # damage surfaces anywhere in the reader: as an index, a type, an assertion
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{path} is damaged or not a PyTorch file ({reason}). If it was downloaded, compare its size "
                "with the source's and download it again"
            ) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dict of weights")
    return dict(content)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}). Copy or download it again") from None


def shards_of(folder: str | Path) -> list[Path]:
    """The files that a state dict cut into several is in, as its ``*.index.json`` names them; empty without one.

    Raises:
        CheckpointError: the index is damaged, or names files outside the folder.
    """
    folder = Path(folder)
    indexes = sorted(folder.glob("*.index.json"))
    if not indexes:
        return []
    try:
        names = sorted(set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{indexes[0]} is no index of a state dict ({error})") from None
    if wrong := [name for name in names if name != Path(str(name)).name]:
        raise CheckpointError(f"{indexes[0]} names {wrong[0]!r}, which is not a file of its folder")
    return [folder / name for name in names]


def read_sharded(folder: str | Path) -> dict[str, Any]:
    """A state dict cut into several files; see :func:`shards_of`.

    Raises:
        FileNotFoundError: a file is missing.
        CheckpointError: one is damaged, or there is no index.
    """
    shards = shards_of(folder)
    if not shards:
        raise CheckpointError(f"{folder} holds no *.index.json that names the parts of a state dict")
    return {name: value for shard in shards for name, value in read_tensors(shard).items()}


def find_state_dict(content: Mapping[str, Any], nested: Iterable[tuple[str, ...]], key: str) -> dict[str, Tensor]:
    """The flat state dict inside a file's content, without the prefixes that wrappers add.

    Args:
        nested: paths of keys under which training files keep it.
        key: an entry that the state dict must have, to recognise it.

    Raises:
        CheckpointError: no such state dict is there.
    """
    for path in ((), *nested):
        part: Any = content
        for name in path:
            part = part.get(name) if isinstance(part, Mapping) else None
        if isinstance(part, Mapping):
            flat = {strip_prefixes(str(name)): value for name, value in part.items() if isinstance(value, Tensor)}
            if key in flat:
                return flat
    keys = ", ".join(repr(name) for name in list(content)[:6])
    raise CheckpointError(f"no entry {key!r} was found; the file's first keys are {keys}")


def strip_prefixes(name: str) -> str:
    """Without the prefixes of DistributedDataParallel and torch.compile."""
    while name.startswith(("module.", "_orig_mod.")):
        name = name.split(".", 1)[1]
    return name.replace("._orig_mod.", ".").replace("._fsdp_wrapped_module.", ".")


_SAMPLES = 4096


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """A short digest of weights, alike in float32 and bfloat16: of up to some thousand numbers of every tensor."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        flat = value.detach().flatten()
        few = flat[:: max(len(flat) // _SAMPLES, 1)].cpu().bfloat16()
        digest.update(f"{name} {tuple(value.shape)}".encode() + few.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


# --- names --------------------------------------------------------------------------------------------


class KeyMap:
    """A two-way mapping between this library's parameter names and a published layout's.

    Rules are pairs ``(ours, theirs)`` of name prefixes, with ``*`` for a number; the first that matches is
    applied to a name's beginning and the rest of the name is kept. A name without a rule is kept whole.
    """

    def __init__(self, rules: Iterable[tuple[str, str]]) -> None:
        rules = list(rules)
        self._forward = [(_pattern(ours), _template(theirs)) for ours, theirs in rules]
        self._backward = [(_pattern(theirs), _template(ours)) for ours, theirs in rules]

    def to_official(self, name: str) -> str:
        return self._apply(name, self._forward)

    def from_official(self, name: str) -> str:
        return self._apply(name, self._backward)

    @staticmethod
    def _apply(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
        for pattern, template in rules:
            if match := pattern.match(name):
                return match.expand(template) + name[match.end() :]
        return name


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\*", r"(\d+)") + r"(?=\.|$)")


def _template(text: str) -> str:
    numbers = iter(range(1, 10))
    return re.sub(r"\*", lambda _: f"\\g<{next(numbers)}>", text)


class _Undrawn(TorchFunctionMode):
    """Leaves tensors as they are where a module would fill them with random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def weightless() -> Iterator[None]:
    """Modules made inside have parameters with a shape but no values, for :func:`assign` to set.

    To draw initial values on the meta device would cost nothing but for the import of PyTorch's compiler: a second or
    more, longer than reading the weights takes.
    """
    with torch.device("meta"), _Undrawn():
        yield


def assign(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict strictly, taking its tensors over instead of copying them.

    Raises:
        CheckpointError: keys are missing, unknown, or of another shape; all are named.
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    persistent = module.state_dict()
    problems = [f"missing {key} {tuple(own[key].shape)}" for key in persistent if key not in state]
    problems += [f"unknown {key} {tuple(value.shape)}" for key, value in state.items() if key not in persistent]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in persistent
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"the weights do not fit {what}: {shown}")
    trainable = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    module.load_state_dict(dict(state), strict=True, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trainable[name])
