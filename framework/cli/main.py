"""The ``tunefleet`` command. Commands import what they need when they run: help and errors come at once."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tunefleet.cli import adapters, base, users
from tunefleet.cli.arguments import AsJson, Name
from tunefleet.cli.output import note
from tunefleet.cli.serve import serve, with_option_flags
from tunefleet.cli.status import status
from tunefleet.cli.warmup import warmup
from tunefleet.core import DEFAULT_ADAPTER
from tunefleet.errors import TunefleetError

app = typer.Typer(
    name="tunefleet",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A fine-tune per person, served from one warm base model.",
)
app.add_typer(adapters.app, name="adapters")
app.add_typer(users.app, name="users")
app.add_typer(base.app, name="base")
app.command("serve")(with_option_flags(serve))
app.command()(status)
app.command()(warmup)

UserOrBase = Annotated[str, typer.Argument(metavar="USER", help="The user's id; - is the base.")]


def run() -> None:
    """The console script: an error of ours is one line on stderr and exit code 1."""
    try:
        app()
    except TunefleetError as error:
        note(f"tunefleet: {error.message}")
        sys.exit(1)


@app.command()
def chat(
    user: UserOrBase,
    message: Annotated[str | None, typer.Argument(help="Else: standard input, or a conversation.")] = None,
    name: Name = DEFAULT_ADAPTER,
    *,
    version: Annotated[int | None, typer.Option(min=1, help="Instead of the live one.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    fallback: Annotated[bool, typer.Option(help="Let the base answer for a user without adapter.")] = False,
    session: Annotated[str | None, typer.Option(help="What a canary sticks to.")] = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a user's model."""
    from tunefleet.asking import Asking
    from tunefleet.cli.conversation import Conversation

    given = {
        "version": version,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "session_id": session,
    }
    asking = Asking(name=name, **{key: value for key, value in given.items() if value is not None})  # type: ignore[typeddict-item]
    if fallback:
        asking["fallback"] = "base"
    with Conversation(None if user == "-" else user, system, asking, as_json=as_json) as conversation:
        if message is not None:
            conversation.say(message)
        elif sys.stdin.isatty():
            conversation.talk()
        else:
            conversation.say(sys.stdin.read())


@app.command()
def demo() -> None:
    """Show the main job, from upload to scale to zero, with a real model. Takes about a minute."""
    from tunefleet.cli.demo import run_demo

    run_demo()


if __name__ == "__main__":
    run()
