"""What holds for every test: one thread, fixed seeds, no network, no window, no settings of the user."""

import os
import random
import socket
import sys
import tempfile
from collections.abc import Iterator

import pytest

# Before any library reads them, and inherited by the processes that tests start. One thread gives the same
# sums in the same order on every machine, and leaves the cores to the other test processes.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# A file that happens to lie in the user's cache must not decide how a test ends.
_hub = tempfile.TemporaryDirectory(prefix="nextscale-tests-")
os.environ["HF_HOME"] = _hub.name

from hypothesis import settings  # noqa: E402

# No deadline: the first call of a kernel is slow. Derandomised: a failure is the same on every machine.
settings.register_profile("nextscale", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("nextscale")


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """The global generators start every test from the same place; PyTorch's where it is loaded."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Connections leave this machine in no test; those between its own processes may be made."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        local = self.family == socket.AF_UNIX or (
            isinstance(address, tuple) and address[0] in {"127.0.0.1", "::1", "localhost"}
        )
        if not local:
            raise OSError(f"tests stay on this machine; one of them wanted to reach {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", local_only)
    yield
