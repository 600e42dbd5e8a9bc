"""``tunefleet users ...``"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tunefleet import core
from tunefleet.cli.arguments import AsJson, User, Yes, confirm, json_object
from tunefleet.cli.output import print_receipt, print_table, print_user, tell

if TYPE_CHECKING:
    from msgspec import UnsetType

app = typer.Typer(no_args_is_help=True, help="Look at users, set what holds for them, delete them.")


@app.command("list")
def list_users(
    after: Annotated[str | None, typer.Option(help="The last id of the page before.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=500)] = 100,
    *,
    as_json: AsJson = False,
) -> None:
    """List users by id."""
    from tunefleet.client import Client

    with Client() as client:
        users = client.users(after=after, limit=limit)
    tell(users, _print_users, as_json=as_json)


@app.command()
def show(user: User, *, as_json: AsJson = False) -> None:
    """Show a user and their settings."""
    from tunefleet.client import Client

    with Client() as client:
        found = client.user(user)
    tell(found, print_user, as_json=as_json)


@app.command("set")
def set_user(
    user: User,
    *,
    fallback: Annotated[
        Literal["none", "base", "default"] | None,
        typer.Option(help="Who answers them without an adapter; default: as the server's option says."),
    ] = None,
    limits: Annotated[str | None, typer.Option(help="A JSON object; null takes it away.")] = None,
    metadata: Annotated[str | None, typer.Option(help="A JSON object; null takes it away.")] = None,
    as_json: AsJson = False,
) -> None:
    """Change a user's settings; what isn't given stays."""
    from msgspec import UNSET

    from tunefleet.client import Client

    chosen = UNSET if fallback is None else None if fallback == "default" else fallback
    with Client() as client:
        changed = client.update_user(
            user,
            fallback=chosen,
            limits=_object(limits, "--limits"),
            metadata=_object(metadata, "--metadata"),
        )
    tell(changed, print_user, as_json=as_json)


@app.command()
def delete(user: User, *, yes: Yes = False, as_json: AsJson = False) -> None:
    """Delete a user: every adapter, every copy, everywhere and for good."""
    from tunefleet.client import Client

    confirm(f"Delete {user} and all their adapters for good?", yes=yes)
    with Client() as client:
        receipt = client.delete_user(user)
    tell(receipt, print_receipt, as_json=as_json)


@app.command()
def deletion(
    deletion_id: Annotated[str, typer.Argument(metavar="DELETION", help="Of a receipt.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Show how far a deletion is."""
    from tunefleet.client import Client

    with Client() as client:
        receipt = client.deletion(deletion_id)
    tell(receipt, print_receipt, as_json=as_json)


def _print_users(users: list[core.User]) -> None:
    rows = [(user.user_id, user.num_adapters, user.created_at) for user in users]
    print_table(("user", "adapters", "created"), rows)


def _object(text: str | None, option: str) -> dict[str, object] | UnsetType | None:
    """Not given: unset; ``null``: None."""
    from msgspec import UNSET

    if text is None:
        return UNSET
    return None if text.strip() == "null" else json_object(text, option)
