"""The index of a folder of token shards."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from .errors import TokenShardError, listed

INDEX = "index.json"
FORMAT, VERSION = "nextscale-tokens", 1
SHARD_NAME = re.compile(r"tokens-\d{5,}\.safetensors")


def read_index(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked content of a folder's index.json. Raises TokenShardError."""
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise TokenShardError(
            f"{folder} holds no {INDEX}: it is no folder of token shards, or nothing was written yet"
        ) from None
    except (ValueError, RecursionError) as error:
        raise TokenShardError(f"{path} is damaged ({error}): make the tokens again") from error
    try:
        good = (
            index["format"] == FORMAT
            and isinstance(index["metadata"], dict)
            and isinstance(index["complete"], bool)
            and index["dtype"] in ("uint16", "int32", "float16")
            and all(
                SHARD_NAME.fullmatch(shard["file"])
                and isinstance(shard["samples"], int)
                and isinstance(shard["bytes"], int)
                and isinstance(shard["sha256"], str)
                for shard in index["shards"]
            )
            and (isinstance(index["length"], int) or not index["shards"])
        )
        version = index["version"]
    except (KeyError, TypeError):
        good, version = False, None
    if good and version != VERSION:
        raise TokenShardError(
            f"{path} has layout version {version}, this program reads {VERSION}: make the tokens again"
        )
    if not good:
        raise TokenShardError(f"{path} is no index of token shards, or is damaged: make the tokens again")
    return dict(index)


def check_sizes(folder: Path, index: dict[str, Any]) -> None:
    """Compare every shard's size with the index. Raises TokenShardError, which names all that differ."""
    wrong = []
    for shard in index["shards"]:
        path = folder / shard["file"]
        if not path.exists():
            wrong.append(f"{path} is missing")
        elif (size := path.stat().st_size) != shard["bytes"]:
            wrong.append(f"{path} has {size} bytes instead of {shard['bytes']}")
    if wrong:
        raise TokenShardError("; ".join(wrong) + ". Copy the folder again, or make the tokens again (resume=False).")


def check_contents(folder: Path, index: dict[str, Any]) -> None:
    """Compare every shard's SHA-256 with the index. Raises TokenShardError, which names all that differ."""
    wrong = []
    for shard in index["shards"]:
        with (folder / shard["file"]).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                wrong.append(str(folder / shard["file"]))
    if wrong:
        raise TokenShardError(
            f"the contents of {listed(wrong)} are not what was written (SHA-256 differs). "
            "Copy the folder again, or make the tokens again (resume=False)."
        )
