"""Next-scale autoregressive vision models: one core, every system.

>>> import nextscale
>>> model = nextscale.load("var-d16")  # doctest: +SKIP
>>> images = model.generate(["golden retriever", "volcano"], n=2, seed=0)  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["__version__", "list_models", "load"]

if TYPE_CHECKING:
    from nextscale.loading import load
    from nextscale.models import list_models

_HOMES = {"load": "nextscale.loading", "list_models": "nextscale.models"}


def __getattr__(name: str) -> Any:
    # PyTorch takes seconds to import: it is, when a model is asked for, not when the package is named.
    if name not in _HOMES:
        raise AttributeError(f"module 'nextscale' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
