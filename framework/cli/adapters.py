"""``tunefleet adapters ...``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunefleet.cli import releases
from tunefleet.cli.arguments import AsJson, Name, User, VersionNumber, Yes, confirm, json_object
from tunefleet.cli.output import print_adapter, print_receipt, print_table, print_warnings, tell
from tunefleet.core import DEFAULT_ADAPTER, Version
from tunefleet.errors import RequestInvalid

app = typer.Typer(no_args_is_help=True, help="Upload, look at, release and delete users' adapters.")
app.command()(releases.promote)
app.command()(releases.rollback)
app.command()(releases.canary)
app.command()(releases.pin)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A PEFT folder, or a tar or zip of one.")]


@app.command()
def push(
    user: User,
    folder: Folder,
    name: Name = DEFAULT_ADAPTER,
    *,
    promote: Annotated[bool, typer.Option(help="Let it answer from now on.")] = True,
    metadata: Annotated[str | None, typer.Option(help="A JSON object to keep with it.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="Sent again, it uploads nothing twice.")] = None,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter as the user's next version."""
    from tunefleet.cli.progress import upload_progress
    from tunefleet.client import Client

    kept = None if metadata is None else json_object(metadata, "--metadata")
    with Client() as client, upload_progress(folder) as progress:
        version = client.adapters.push(
            user,
            folder,
            name=name,
            promote=promote,
            metadata=kept,
            progress=progress,
            idempotency_key=idempotency_key,
        )
    tell(version, _print_pushed, as_json=as_json)


@app.command("list")
def list_versions(user: User, name: Name = DEFAULT_ADAPTER, *, as_json: AsJson = False) -> None:
    """List the versions of a user's adapter, newest first."""
    from tunefleet.client import Client

    with Client() as client:
        versions = client.adapters.list(user, name=name)
    tell(versions, _print_versions, as_json=as_json)


@app.command()
def show(user: User, name: Name = DEFAULT_ADAPTER, *, as_json: AsJson = False) -> None:
    """Show the version that answers, and the adapter's canary and pin."""
    from tunefleet.client import Client

    with Client() as client:
        adapter = client.adapters.show(user, name=name)
    tell(adapter, print_adapter, as_json=as_json)


@app.command()
def download(
    user: User,
    first: Annotated[str, typer.Argument(metavar="[VERSION]", help="Else: the live one.")],
    second: Annotated[Path | None, typer.Argument(metavar="DIR", show_default=False)] = None,
    name: Name = DEFAULT_ADAPTER,
) -> None:
    """Write a version's files into a folder, byte for byte as they were uploaded."""
    from tunefleet.client import Client

    version = None if second is None else _version(first)
    folder = Path(first) if second is None else second
    with Client() as client:
        client.adapters.download(user, version, folder, name=name)
    print(folder)


@app.command()
def delete(
    user: User,
    version: VersionNumber,
    name: Name = DEFAULT_ADAPTER,
    *,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete a version that doesn't answer, everywhere and for good."""
    from tunefleet.client import Client

    confirm(f"Delete version {version} of {user} {name} for good?", yes=yes)
    with Client() as client:
        receipt = client.adapters.delete(user, version, name=name)
    tell(receipt, print_receipt, as_json=as_json)


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


def _print_pushed(version: Version) -> None:
    live = " is live" if version.live else ""
    print(f"{version.user_id} {version.name} version {version.version}{live}: {version.digest}")
    print_warnings(version.warnings)


def _print_versions(versions: list[Version]) -> None:
    rows = [
        (found.version, "live" if found.live else "-", found.digest[:12], found.rank, found.created_at)
        for found in versions
    ]
    print_table(("version", "live", "digest", "rank", "created"), rows)


def _version(text: str) -> int:
    if text.isascii() and text.isdecimal() and int(text) > 0:
        return int(text)
    raise RequestInvalid(f"VERSION must be a number from 1 on, not {text!r}", param="version")
