"""tunefleet: a fine-tune per person, served from one warm base model.

Public names load on first use, so that ``import tunefleet`` stays instant and the base install needs no
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunefleet.async_client import AsyncClient as AsyncClient
    from tunefleet.client import Client as Client
    from tunefleet.fleet import Fleet as Fleet

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "Fleet", "__version__"]

_HOMES = {
    "Fleet": "tunefleet.fleet",
    "Client": "tunefleet.client",
    "AsyncClient": "tunefleet.async_client",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'tunefleet' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
