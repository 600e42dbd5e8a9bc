"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

from tunefleet.errors import RequestInvalid

User = Annotated[str, typer.Argument(metavar="USER", help="The user's id.")]
VersionNumber = Annotated[int, typer.Argument(metavar="VERSION", min=1)]
Name = Annotated[str, typer.Option("--name", help="Which of the user's adapters.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")]


def json_object(text: str, option: str) -> dict[str, object]:
    """Raises RequestInvalid, which names the option."""
    import msgspec

    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except msgspec.DecodeError as error:
        raise RequestInvalid(
            f"{option} is no JSON object: {error}", param=option.removeprefix("--")
        ) from error


def confirm(question: str, *, yes: bool) -> None:
    """Asks, where somebody can answer; a no ends the command with exit code 1."""
    import sys

    if not yes and sys.stdin.isatty():
        typer.confirm(question, abort=True, err=True)
