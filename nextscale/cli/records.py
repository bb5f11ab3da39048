"""What makes a result repeatable: the settings and versions behind it, as JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_record(path: Path, settings: Mapping[str, Any], files: Mapping[str, Any]) -> Path:
    """Write the settings that reproduce a result; returns the path, numbered if the name was taken."""
    import torch

    from nextscale import __version__
    from nextscale.pictures import write_file

    content = {
        "settings": dict(settings),
        "files": dict(files),
        "versions": {"nextscale": __version__, "torch": torch.__version__},
    }
    return write_file(path, (json.dumps(content, indent=2) + "\n").encode())
