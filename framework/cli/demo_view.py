"""How the demo looks: live columns on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from tunefleet.cli.demo import Column

MIN_COLUMN_WIDTH = 28
COLORS = ("cyan", "magenta", "yellow", "green")


class TerminalView:
    """Columns that grow side by side."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)

    def headline(self, text: str) -> None:
        self._console.print()
        self._console.rule(Text(text, style="bold"), align="left")

    def line(self, text: str) -> None:
        self._console.print(Text(f"  {text}"))

    @contextlib.contextmanager
    def columns(self, columns: list[Column]) -> Iterator[None]:
        view = _Growing(columns)
        with Live(view, console=self._console, refresh_per_second=12):
            yield


class LogView:
    """Whole answers, one after the other."""

    def headline(self, text: str) -> None:
        print(f"\n{text}", flush=True)

    def line(self, text: str) -> None:
        print(f"  {text}", flush=True)

    @contextlib.contextmanager
    def columns(self, columns: list[Column]) -> Iterator[None]:
        yield
        for column in columns:
            print(f"  [{column.title}] {facts(column)}", flush=True)
            print("    " + column.text.strip().replace("\n", "\n    "), flush=True)


def facts(column: Column) -> str:
    """Who answered, and how fast."""
    if column.served is None:
        return "..."
    digest, cold = column.served.adapter_digest[:12], column.served.cold_start.value
    return f"{digest}, first token after {column.first_token_s:.2f} s, cold start: {cold}"


class _Growing:
    """Renders anew at each refresh: side by side where they fit, else one below the other."""

    def __init__(self, columns: list[Column]) -> None:
        self._columns = columns

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        panels = [_panel(column, COLORS[index % len(COLORS)]) for index, column in enumerate(self._columns)]
        if options.max_width < MIN_COLUMN_WIDTH * len(panels):
            yield from panels
            return
        grid = Table.grid(expand=True)
        for _ in panels:
            grid.add_column(ratio=1)
        grid.add_row(*panels)
        yield grid


def _panel(column: Column, color: str) -> Panel:
    body = Group(Text(column.text.strip() or "..."), Text(f"\n{facts(column)}", style="dim"))
    return Panel(body, title=Text(column.title, style="bold"), border_style=color)
