"""Files on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

ANSWER_WITHIN = 10.0
"""Seconds to wait for the hub's first answer."""


class HubError(FileNotFoundError):
    """A file is not here and could not be fetched."""


def cached(repository: str, file: str) -> Path | None:
    """The file's place in the hub's cache on this machine, if it is there. Uses no network."""
    if file.endswith("/"):
        return _cached_folder(repository, file)
    if "*" in file:
        return _cached_match(repository, file)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file)
    return Path(found) if isinstance(found, str) else None


def fetch(repository: str, file: str) -> Path:
    """The file, from the cache or else from the hub; a broken download goes on where it stopped.

    The hub is asked once, without retries, before anything is downloaded: without a network the answer comes
    at once. ``HF_HUB_OFFLINE=1`` and the other variables of huggingface_hub are respected.

    Raises:
        HubError: it is not cached and the hub cannot be reached, or has no such file.
    """
    found = cached(repository, file)
    if found is not None:
        return found
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise HubError(_advice(repository, file, "HF_HUB_OFFLINE forbids the network"))
    try:
        if file.endswith("/"):
            return _fetch_folder(repository, file)
        if "*" in file:
            file = _only(repository, file)
        get_hf_file_metadata(hf_hub_url(repository, file), timeout=ANSWER_WITHIN)
        return Path(hf_hub_download(repository, file, etag_timeout=ANSWER_WITHIN))
    except LocalEntryNotFoundError as error:
        raise HubError(_advice(repository, file, _reason(error))) from error
    except HubError:
        raise
    except (EntryNotFoundError, HfHubHTTPError) as error:
        raise HubError(_advice(repository, file, f"the hub refused it: {_reason(error)}")) from error
    except Exception as error:
        if not _is_connection_error(error):
            raise
        raise HubError(_advice(repository, file, f"the hub cannot be reached: {_reason(error)}")) from error


def _cached_folder(repository: str, folder: str) -> Path | None:
    """A folder (``/``: the whole repository) of which all files are in the cache: its index names them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    inside = folder.lstrip("/")
    try:
        place = Path(snapshot_download(repository, allow_patterns=f"{inside}*", local_files_only=True)) / inside
    except LocalEntryNotFoundError:
        return None
    from nextscale.core.checkpoint import CheckpointError, shards_of

    try:
        parts = shards_of(place)
        return place if parts and all(path.is_file() for path in parts) else None
    except CheckpointError:
        return None


def _fetch_folder(repository: str, folder: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    inside = folder.lstrip("/")
    HfApi().model_info(repository, timeout=ANSWER_WITHIN)
    return Path(snapshot_download(repository, allow_patterns=f"{inside}*", etag_timeout=ANSWER_WITHIN)) / inside


def matching(names: Iterable[str], pattern: str) -> list[str]:
    """Files of weights whose names fit a pattern, such as ``*1024*|*xl*!*draft*``: either of two, but not the last."""
    wanted, _, unwanted = pattern.lower().partition("!")
    return sorted(
        name
        for name in names
        if name.endswith((".pth", ".pt", ".bin", ".safetensors"))
        and any(fnmatch(name.lower(), each) for each in wanted.split("|"))
        and not (unwanted and fnmatch(name.lower(), unwanted))
    )


def _cached_match(repository: str, pattern: str) -> Path | None:
    """The only file in the cache that fits a pattern."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        place = Path(snapshot_download(repository, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    names = [str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()]
    found = matching(names, pattern)
    return place / found[0] if len(found) == 1 else None


def _only(repository: str, pattern: str) -> str:
    """The name of the only file of a repository that fits a pattern.

    Raises:
        HubError: none fits, or several do.
    """
    from huggingface_hub import HfApi

    names = [sibling.rfilename for sibling in HfApi().model_info(repository, timeout=ANSWER_WITHIN).siblings or []]
    found = matching(names, pattern)
    if len(found) != 1:
        listed = ", ".join(found or names[:10]) or "nothing"
        raise HubError(
            f"{len(found)} files in https://huggingface.co/{repository} are named like {pattern}; it holds {listed}. "
            "Download the one you mean and give its path instead of the name"
        )
    return found[0]


def _is_connection_error(error: Exception) -> bool:
    """Whether the network failed: what is raised depends on huggingface_hub's HTTP client."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, OSError) or bool(names & {"TransportError", "RequestException", "HTTPError"})


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _advice(repository: str, file: str, reason: str) -> str:
    if "*" in file:
        return (
            f"a file of https://huggingface.co/{repository} named like {file} is not on this machine ({reason}). "
            "Download it on a machine with a network and give its path instead of the name"
        )
    return (
        f"{file} is not on this machine ({reason}). Download {file} from "
        f"https://huggingface.co/{repository}/resolve/main/{file} on a machine with a network and give its path "
        f"instead of the name, or run `hf download {repository} {file}` once and it is found by name"
    )
