"""``tunefleet warmup``"""

from __future__ import annotations

from typing import Annotated

import typer

from tunefleet.answers import Warm
from tunefleet.cli.arguments import AsJson, Name
from tunefleet.cli.output import tell
from tunefleet.core import DEFAULT_ADAPTER


def warmup(
    user: Annotated[str | None, typer.Argument(metavar="[USER]", help="Whose adapter to load.")] = None,
    name: Name = DEFAULT_ADAPTER,
    *,
    as_json: AsJson = False,
) -> None:
    """Wait until a replica is ready, and the user's adapter on its device."""
    from tunefleet.client import Client

    with Client() as client:
        warm = client.warmup(user, name=name)
    tell(warm, _print_warm, as_json=as_json)


def _print_warm(warm: Warm) -> None:
    print(f"ready after {warm.seconds:.2f} s: {warm.adapter_digest}")
