"""``tunefleet adapters promote | rollback | canary | pin``: what answers, and what stays at hand."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from tunefleet.cli.arguments import AsJson, Name, User, VersionNumber
from tunefleet.cli.output import tell, told_canary, told_pin
from tunefleet.core import DEFAULT_ADAPTER, Adapter, Version

IfLive = Annotated[int | None, typer.Option(min=1, help="Only if this version is live now.")]


def promote(
    user: User,
    version: VersionNumber,
    name: Name = DEFAULT_ADAPTER,
    *,
    if_live: IfLive = None,
    as_json: AsJson = False,
) -> None:
    """Make a version the one that answers."""
    from tunefleet.client import Client

    with Client() as client:
        promoted = client.adapters.promote(user, version, name=name, if_live=if_live)
    tell(promoted, _print_live, as_json=as_json)


def rollback(
    user: User,
    name: Name = DEFAULT_ADAPTER,
    *,
    to: Annotated[int | None, typer.Option(min=1, help="A version that was live before.")] = None,
    if_live: IfLive = None,
    as_json: AsJson = False,
) -> None:
    """Go back to what was live before; again: one further."""
    from tunefleet.client import Client

    with Client() as client:
        live = client.adapters.rollback(user, to, if_live, name=name)
    tell(live, _print_live, as_json=as_json)


def canary(
    user: User,
    version: Annotated[int | None, typer.Argument(metavar="VERSION", min=1)] = None,
    percent: Annotated[float | None, typer.Argument(metavar="PERCENT", help="Of sessions.")] = None,
    name: Name = DEFAULT_ADAPTER,
    *,
    end: Annotated[bool, typer.Option("--end", help="The live version answers all again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Let a version answer a share of the sessions."""
    from tunefleet.client import Client

    if end == (percent is not None) or end == (version is not None):
        raise typer.BadParameter("give VERSION and PERCENT, or --end")
    with Client() as client:
        if version is None or percent is None:
            adapter = client.adapters.end_canary(user, name=name)
        else:
            adapter = client.adapters.canary(user, version, percent, name=name)
    tell(adapter, _print_canary, as_json=as_json)


def pin(
    user: User,
    name: Name = DEFAULT_ADAPTER,
    *,
    tier: Annotated[Literal["disk", "host"], typer.Option(help="Down to the disk, or memory.")] = "host",
    until: Annotated[str | None, typer.Option(help="A time, as 2030-01-31T12:00:00Z.")] = None,
    off: Annotated[bool, typer.Option("--off", help="It may be evicted again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Keep an adapter at hand on every machine, whoever else calls."""
    from tunefleet.client import Client

    with Client() as client:
        if off:
            adapter = client.adapters.unpin(user, name=name)
        else:
            adapter = client.adapters.pin(user, tier, until, name=name)
    tell(adapter, _print_pin, as_json=as_json)


def _print_live(version: Version) -> None:
    print(f"{_whose(version)} version {version.version} is live: {version.digest}")


def _print_canary(adapter: Adapter) -> None:
    print(f"{_whose(adapter)} canary: {told_canary(adapter.canary)}")


def _print_pin(adapter: Adapter) -> None:
    print(f"{_whose(adapter)} pin: {told_pin(adapter.pin)}")


def _whose(version: Version) -> str:
    return f"{version.user_id} {version.name}"
