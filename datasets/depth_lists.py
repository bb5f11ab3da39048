"""Lists of samples: those that ship, and those a user has as text files."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import DatasetError


@cache
def shipped() -> dict[str, Any]:
    """The splits that come with the library (``depth_splits.json`` says what they are)."""
    content: dict[str, Any] = json.loads((Path(__file__).parent / "depth_splits.json").read_bytes())
    return content


def read_list(path: str | os.PathLike[str]) -> list[list[str]]:
    """The words of each line of a text file, plain or gzipped; empty lines and those that begin with # are left out.

    Raises:
        DatasetError: it is no text, or holds nothing. OSError: it cannot be read.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise DatasetError(f"{path} is no text file, or is damaged ({error})") from error
    rows = [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not rows:
        raise DatasetError(f"{path} lists nothing")
    return rows


@dataclass(frozen=True)
class Frame:
    """A frame of KITTI's raw recordings.

    Attributes:
        day: such as 2011_09_26. drive: such as 0002. number: of the frame. camera: 2 (left) or 3.
        improved: whether there is improved ground truth for it.
    """

    day: str
    drive: str
    number: int
    camera: int = 2
    improved: bool = True

    @property
    def sequence(self) -> str:
        return f"{self.day}_drive_{self.drive}_sync"


def kitti_frames(split: str) -> list[Frame]:
    """A shipped KITTI list: ``eigen_test`` (697) or ``eigen_val`` (800)."""
    content = shipped()
    without = set(content.get(f"kitti_{split}_without_improved", ()))
    frames: list[Frame] = []
    for place, numbers in content[f"kitti_{split}"]:
        day, drive = place.split()
        for number in numbers:
            frames.append(Frame(day, drive, number, improved=len(frames) not in without))
    return frames


def kitti_list(path: str | os.PathLike[str]) -> list[Frame]:
    """A KITTI list of the user's, as BTS (``image depth|None [focal]``) or monodepth2 (``drive frame l|r``) write them.

    Raises:
        DatasetError: a line is of neither form; the message gives the first.
    """
    frames = []
    for words in read_list(path):
        try:
            if len(words) == 3 and words[2] in ("l", "r"):
                day, sequence = words[0].split("/")
                frames.append(Frame(day, sequence.split("_")[4], int(words[1]), 2 if words[2] == "l" else 3))
            else:
                day, sequence, camera, _, file = words[0].strip("/").split("/")
                improved = len(words) > 1 and words[1] != "None"
                frames.append(
                    Frame(day, sequence.split("_")[4], int(file.split(".")[0]), int(camera[-1]), improved=improved)
                )
        except (ValueError, IndexError):
            raise DatasetError(
                f"{path}: line {' '.join(words)!r} is neither `DAY/DRIVE/image_0N/data/FRAME.png DEPTH|None` nor "
                "`DAY/DRIVE FRAME l|r`"
            ) from None
    return frames
