"""``tunefleet adapters ...``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunefleet.cli.output import print_json, print_table, print_version, print_warnings
from tunefleet.core import DEFAULT_ADAPTER
from tunefleet.errors import RequestInvalid

app = typer.Typer(no_args_is_help=True, help="Upload, list, check and promote users' adapters.")

User = Annotated[str, typer.Argument(metavar="USER", help="The user's id.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A PEFT folder, or a tar or zip of one.")]
Name = Annotated[str, typer.Option("--name", help="Which of the user's adapters.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def push(
    user: User,
    folder: Folder,
    name: Name = DEFAULT_ADAPTER,
    *,
    promote: Annotated[bool, typer.Option(help="Let it answer from now on.")] = True,
    metadata: Annotated[str | None, typer.Option(help="A JSON object to keep with it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter as the user's next version."""
    from tunefleet.client import Client

    with Client() as client:
        version = client.adapters.push(user, folder, name=name, promote=promote, metadata=_metadata(metadata))
    if as_json:
        print_json(version)
        return
    print(f"{user} {name} version {version.version}{' is live' if version.live else ''}: {version.digest}")
    print_warnings(version.warnings)


@app.command("list")
def list_versions(user: User, name: Name = DEFAULT_ADAPTER, *, as_json: AsJson = False) -> None:
    """List the versions of a user's adapter, newest first."""
    from tunefleet.client import Client

    with Client() as client:
        versions = client.adapters.list(user, name=name)
    if as_json:
        print_json(versions)
        return
    rows = [
        (found.version, "live" if found.live else "-", found.digest[:12], found.rank, found.created_at)
        for found in versions
    ]
    print_table(("version", "live", "digest", "rank", "created"), rows)


@app.command()
def show(user: User, name: Name = DEFAULT_ADAPTER, *, as_json: AsJson = False) -> None:
    """Show the version that answers."""
    from tunefleet.client import Client

    with Client() as client:
        version = client.adapters.live(user, name=name)
    if as_json:
        print_json(version)
    else:
        print_version(version)


@app.command()
def promote(
    user: User,
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1)],
    name: Name = DEFAULT_ADAPTER,
    *,
    if_live: Annotated[int | None, typer.Option(min=1, help="Only if this version is live now.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a version the one that answers."""
    from tunefleet.client import Client

    with Client() as client:
        promoted = client.adapters.promote(user, version, name=name, if_live=if_live)
    if as_json:
        print_json(promoted)
    else:
        print(f"{user} {name} version {promoted.version} is live: {promoted.digest}")


@app.command()
def check(
    folder: Folder,
    base_model: Annotated[str | None, typer.Option(help="As for `tunefleet serve`.")] = None,
    max_rank: Annotated[int | None, typer.Option(min=1, help="As max_adapter_rank of the server.")] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Check an adapter without a server: would an upload be taken?"""
    from tunefleet.cli.check import print_check

    print_check(folder, base_model, max_rank, as_json=as_json)


def _metadata(text: str | None) -> dict[str, object] | None:
    import msgspec

    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except msgspec.DecodeError as error:
        raise RequestInvalid(f"--metadata is no JSON object: {error}", param="metadata") from error
