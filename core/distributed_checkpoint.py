"""Checkpoints of distributed runs: a folder to which each process writes its part, while training goes on.

``torch.distributed.checkpoint`` writes and reads the tensors, as safetensors files: neither they nor what lies beside
them (``state.pt``, plain values) can run code when they are read. A folder has a hidden name until all of it is on the
disk; it is read on any number of processes, by each only what it needs.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.core.checkpoint import CheckpointError, read_tensors, system_error, write_tensors
from nextscale.core.processes import Processes

STATE_FILE = "state.pt"


class FolderWriter:
    """Writes one checkpoint at a time, in the background; its methods are called by all processes alike."""

    def __init__(self, processes: Processes, completed: Callable[[], None]) -> None:
        """Args:

        completed: called in the main process when a checkpoint is whole.
        """
        self._processes, self._group, self._completed = processes, processes.new_group(), completed
        self._running: tuple[Path, Path, Future[Any]] | None = None
        self._error: OSError | None = None

    def start(self, path: Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        """Copy tensors to host memory and write them from there, while the caller goes on.

        Args:
            tensors: whole, or this process's part of them.
            content: plain values and small tensors, the main process's.

        Raises:
            OSError: the one before could not be written, or this one not begun.
        """
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save

        self.finish()
        hidden = path.with_name(f".{path.name}.tmp")
        error = None
        if self._processes.main:
            try:
                shutil.rmtree(hidden, ignore_errors=True)
                hidden.mkdir(parents=True)
                write_tensors(hidden / STATE_FILE, content)
            except OSError as failed:
                error = _failure(path, failed)
                shutil.rmtree(hidden, ignore_errors=True)
        self._processes.raise_first(error)
        writer = HuggingFaceStorageWriter(str(hidden), save_distributed=True)
        future = async_save(dict(tensors), storage_writer=writer, process_group=self._group)
        assert isinstance(future, Future)
        self._running = path, hidden, future

    def poll(self) -> bool:
        """Give what is written its name, without waiting; False where that failed."""
        if self._running is not None and self._running[2].done():
            self._complete()
        return self._error is None

    def finish(self) -> None:
        """Wait for what is being written.

        Raises:
            OSError: a process could not write its part; all raise.
        """
        if self._running is not None:
            self._complete()
        error, self._error = self._error, None
        self._processes.raise_first(error)

    def _complete(self) -> None:
        from torch.distributed.checkpoint.api import CheckpointException

        assert self._running is not None
        (path, hidden, future), self._running = self._running, None
        try:
            future.result()
            if self._processes.main:
                if path.exists():
                    shutil.rmtree(path)
                os.replace(hidden, path)
                _sync(path.parent)
                self._completed()
        except (Exception, CheckpointException) as error:  # the latter is none of the former
            if self._processes.main:
                shutil.rmtree(hidden, ignore_errors=True)
            self._error = _failure(path, error)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _failure(path: Path, error: BaseException) -> OSError:
    """In one sentence."""
    return OSError(f"{path} could not be written: {_reason(error)}. What was there before is unchanged")


def _reason(error: BaseException) -> str:
    """What went wrong first; what the library for checkpoints says is a report of all processes."""
    wrapped: list[BaseException] = [failed[0] for failed in getattr(error, "failures", {}).values()]
    told = [system_error(failed) for failed in (*wrapped, error)]
    return next(filter(None, told), str(wrapped[0] if wrapped else error))


class FolderReader:
    """A checkpoint's folder.

    Attributes:
        content: plain values, as they were given to :meth:`FolderWriter.start`.
        shapes: of all tensors, by name.

    Raises:
        CheckpointError: parts are missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError
        from torch.distributed.checkpoint import HuggingFaceStorageReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.path = path
        self.content = read_tensors(path / STATE_FILE)
        self._reader = HuggingFaceStorageReader(str(path))
        try:
            found = self._reader.read_metadata().state_dict_metadata
        except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): remove it, to go on from the one before") from None
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, entry in found.items():
            assert isinstance(entry, TensorStorageMetadata)
            held = sum(chunk.sizes.numel() for chunk in entry.chunks)
            self.shapes[name] = tuple(entry.size)
            if held != entry.size.numel():
                raise CheckpointError(
                    f"{path} holds {held} of the {entry.size.numel()} numbers of {name}: a file of it is missing. "
                    "Remove it, to go on from the one before"
                )
        if missing := set(self.content.get("tensors", ())) - set(self.shapes):
            raise CheckpointError(
                f"{path} lacks {len(missing)} tensors, {sorted(missing)[0]} among them: a file of it is missing. "
                "Remove it, to go on from the one before"
            )

    def read(self, targets: dict[str, Tensor]) -> None:
        """Fill tensors, whole ones or this process's part of them, in place.

        Raises:
            CheckpointError: a file is damaged.
        """
        from torch.distributed.checkpoint import load
        from torch.distributed.checkpoint.api import CheckpointException

        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process alone may read too
            try:
                load(dict(targets), storage_reader=self._reader, no_dist=True)
            except CheckpointException as error:
                raise CheckpointError(f"{self.path} is damaged ({_reason(error)})") from None
