"""Cases to replay, and copies of them with something changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CASES = Path(__file__).parent / "cases"

Change = Callable[[dict[str, Any], dict[str, np.ndarray]], None]


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[str, Change], Path]:
    """``changed(name, change)`` copies a case into a folder of its own, after ``change(meta, arrays)``."""

    def copy(name: str, change: Change) -> Path:
        with np.load(CASES / f"{name}.npz", allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        meta = json.loads(str(arrays.pop("meta")))
        change(meta, arrays)
        return write_case(tmp_path / f"{name}.npz", meta, arrays)

    return copy


def write_case(path: Path, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path:
    np.savez_compressed(path, meta=np.array(json.dumps(meta)), **arrays)
    return path
