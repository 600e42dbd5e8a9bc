"""How ``tunefleet status`` looks on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tunefleet.answers import FleetStatus
from tunefleet.cli.status import REPLICA_COLUMNS, facts, replica_cells
from tunefleet.errors import TunefleetError

STATE_STYLES = {"ready": "green", "starting": "yellow", "new": "yellow", "draining": "magenta"}


class Rates:
    """Tokens per second of each replica, between two looks at its counter."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, float], int] = {}  # replica and its start -> tokens
        self._seen_at = 0.0

    def look(self, found: FleetStatus, now: float) -> dict[str, float]:
        """By replica; one that is seen for the first time is not in it.

        Args:
            now: monotonic seconds.
        """
        counters = {
            (replica.replica_id, replica.started_at): replica.num_tokens for replica in found.replicas
        }
        elapsed_s = now - self._seen_at
        rates = {
            key[0]: (num_tokens - self._seen[key]) / elapsed_s
            for key, num_tokens in counters.items()
            if key in self._seen and elapsed_s > 0
        }
        self._seen, self._seen_at = counters, now
        return rates


def watch(look: Callable[[], FleetStatus], found: FleetStatus, interval_s: float) -> None:
    """Looks again and again, until Ctrl-C. A server that is gone meanwhile may come back."""
    rates, trouble = Rates(), ""
    with Live(console=Console(highlight=False), auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            tokens_per_s = rates.look(found, time.monotonic())
            live.update(_page(found, tokens_per_s, trouble, time.time()), refresh=True)
            time.sleep(interval_s)
            try:
                found, trouble = look(), ""
            except TunefleetError as error:
                trouble = error.message


def _page(found: FleetStatus, tokens_per_s: dict[str, float], trouble: str, now: float) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    for name, value in facts(found):
        grid.add_row(Text(name, style="dim"), Text(value, style="red" if name == "error" else ""))
    parts: list[RenderableType] = [grid]
    if found.replicas:
        parts.append(_replicas(found, tokens_per_s, now))
    parts.append(Text(trouble or "Ctrl-C ends this view", style="red" if trouble else "dim"))
    return Group(*parts)


def _replicas(found: FleetStatus, tokens_per_s: dict[str, float], now: float) -> Table:
    table = Table(*REPLICA_COLUMNS, "tokens/s", box=None, header_style="bold")
    for replica in found.replicas:
        rate = tokens_per_s.get(replica.replica_id)
        cells = [*replica_cells(replica, now), "-" if rate is None else f"{rate:.0f}"]
        styles = ["", STATE_STYLES.get(replica.state.value, "")] + [""] * (len(cells) - 2)
        table.add_row(*(Text(str(cell), style=style) for cell, style in zip(cells, styles, strict=True)))
    return table
