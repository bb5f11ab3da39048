"""Runs a function in several processes that form a process group, on the CPU, without importing anything twice."""

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

LIMIT = float(os.environ.get("NEXTSCALE_TEST_SECONDS", "200"))
"""How long processes may take before they count as hanging."""

LIBRARIES = (
    "accelerate",
    "safetensors.torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
)


def warm_up() -> None:
    """Import once what every forked process needs."""
    for name in LIBRARIES:
        import_module(name)


def launch(count: int, function: Callable[[int], Any], seconds: float = LIMIT) -> list[Any]:
    """What ``function(rank)`` returns in each of ``count`` forked processes; of an error, "TYPE: MESSAGE".

    To be called before this process has threads of its own: in one that only imports and launches.

    Raises:
        TimeoutError: a process hangs; all are killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.TemporaryDirectory() as folder:
        told = [Path(folder) / str(rank) for rank in range(count)]
        children = []
        for rank in range(count):
            child = os.fork()
            if child == 0:
                os.environ |= {k: str(v) for k, v in {**group, "RANK": rank, "LOCAL_RANK": rank}.items()}
                os.environ["ACCELERATE_USE_CPU"] = "true"
                _child(function, rank, told[rank])
            children.append(child)
        _wait(set(children), time.monotonic() + seconds)
        return [json.loads(path.read_text()) if path.exists() else None for path in told]


def _wait(children: set[int], limit: float) -> None:
    while children:
        children -= {child for child in children if os.waitpid(child, os.WNOHANG)[0]}
        if children and time.monotonic() > limit:
            for child in children:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise TimeoutError(f"{len(children)} processes hang")
        time.sleep(0.02)


def _child(function: Callable[[int], Any], rank: int, told: Path) -> None:
    try:
        result = function(rank)
    except BaseException as error:
        if os.environ.get("SHOW_ERRORS"):
            traceback.print_exc()
        result = f"{type(error).__name__}: {error}"
    told.write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing of the parent's is to be cleaned up


def run_program(program: Path, folder: Path, timeout: float = 20 * LIMIT) -> Any:
    """Run a scenario program in a fresh interpreter: ``python PROGRAM FOLDER``; what it wrote to ``results.json``."""
    import subprocess

    done = subprocess.run([sys.executable, str(program), str(folder)], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())
