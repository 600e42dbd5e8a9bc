"""How far an upload is: a bar on a terminal, a line elsewhere. On standard error, beside the output."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tunefleet.cli.output import note

if TYPE_CHECKING:
    from tunefleet.calls import Progress


@contextlib.contextmanager
def upload_progress(path: Path) -> Iterator[Progress]:
    with _bar(path) if sys.stderr.isatty() else _line(path) as progress:
        yield progress


@contextlib.contextmanager
def _bar(path: Path) -> Iterator[Progress]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn(f"uploading {escape(path.name)}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("", total=None)
        yield lambda num_sent, num_total: bars.update(bar, completed=num_sent, total=num_total)


@contextlib.contextmanager
def _line(path: Path) -> Iterator[Progress]:
    told = False

    def tell(num_sent: int, num_total: int) -> None:
        nonlocal told
        if not told:
            told = True
            note(f"uploading {path.name}: {num_total:,} bytes")

    yield tell
