"""Predictions from elsewhere: found by usual names, described, and refused where they are missing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from nextscale.datasets.depth_encodings import (
    KITTI,
    encode_depth,
)
from nextscale.datasets.depth_pairs import MissingFilesError
from nextscale.datasets.depth_predictions import open_predictions, save_prediction
from nextscale.datasets.errors import DatasetError

NAMES = ["2011_09_26_drive_0002_sync/image_02/0000000069", "2011_09_26_drive_0009_sync/image_02/0000000001"]


@pytest.mark.parametrize(
    ("files", "naming"),
    [
        ([f"{name}.npy" for name in NAMES], "nested"),
        ([f"{name.replace('/', '_')}.npy" for name in NAMES], "flat"),
        ([f"{name.split('/')[0]}_{name.split('/')[2]}.npy" for name in NAMES], "short"),
        (["0000000069.npy", "0000000001.npy"], "last"),
        (["0000000000.npy", "0000000001.npy"], "ten digits"),
        (["000000.npy", "000001.npy"], "six digits"),
        (["0.npy", "1.npy"], "number"),
    ],
)
def test_predictions_are_found_by_usual_names(tmp_path: Path, files: list[str], naming: str) -> None:
    for number, file in enumerate(files):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / file, np.full((2, 3), number + 1.0))
    found = open_predictions(tmp_path, NAMES)
    assert found.naming == naming and found.read(1).tolist() == [[2, 2, 2], [2, 2, 2]] and found.kind == "depth"


def test_predictions_say_what_they_hold(tmp_path: Path) -> None:
    for name in NAMES:
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_depth(np.full((2, 3), 4.0), KITTI))
    assert open_predictions(tmp_path, NAMES).read(0)[0, 0] == 4
    assert open_predictions(tmp_path, NAMES, scale=512).read(0)[0, 0] == 2
    (tmp_path / "predictions.json").write_text(json.dumps({"kind": "disparity", "scale": 1024}))
    said = open_predictions(tmp_path, NAMES)
    assert said.kind == "disparity" and said.read(0)[0, 0] == 1
    assert open_predictions(tmp_path, NAMES, kind="depth").kind == "depth"
    for text, message in (
        ("{", "not valid JSON"),
        ('{"sacle": 1}', "must be an object"),
        ('{"scale": -1}', "scale of"),
    ):
        (tmp_path / "predictions.json").write_text(text)
        with pytest.raises(DatasetError, match=message):
            open_predictions(tmp_path, NAMES)


def test_missing_predictions_are_listed(tmp_path: Path) -> None:
    save_prediction(tmp_path, NAMES[0], np.array([[np.inf, np.nan]]))
    assert not np.isfinite(open_predictions(tmp_path, NAMES[:1]).read(0)).any()
    with pytest.raises(MissingFilesError, match=r"1 of 2 predictions are missing.*0009_sync/image_02/0000000001\.npy"):
        open_predictions(tmp_path, NAMES)
    shutil.rmtree(tmp_path)
    with pytest.raises(DatasetError, match="does not exist"):
        open_predictions(tmp_path, NAMES)
    tmp_path.mkdir()
    with pytest.raises(DatasetError, match="holds no prediction"):
        open_predictions(tmp_path, NAMES)


def test_one_array_of_all(tmp_path: Path) -> None:
    np.save(tmp_path / "all.npy", np.arange(12, dtype=np.float32).reshape(2, 2, 3))
    assert open_predictions(tmp_path / "all.npy", NAMES).read(1)[0, 0] == 6
    with pytest.raises(DatasetError, match=r"expected floats \(1, height, width\)"):
        open_predictions(tmp_path / "all.npy", NAMES[:1])
