"""What commands print: tables and colour on a terminal, plain lines elsewhere, JSON when asked."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec

from tunefleet.core import Version


def print_json(value: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table with headings on a terminal; tab-separated lines without headings elsewhere."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(map(str, row)))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, header_style="bold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text: brackets in names are no markup
    Console().print(table)


def print_pairs(pairs: Sequence[tuple[str, object]]) -> None:
    """One fact per line."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        print(f"{name:<{width}}  {value}")


def print_version(version: Version) -> None:
    print_pairs(
        [
            ("user", version.user_id),
            ("adapter", version.name),
            ("version", f"{version.version}{' (live)' if version.live else ''}"),
            ("digest", version.digest),
            ("base", version.base),
            ("rank", version.rank),
            ("target modules", ", ".join(version.target_modules)),
            ("size", f"{version.size_bytes:,} bytes"),
            ("created", version.created_at),
            ("metadata", msgspec.json.encode(version.metadata).decode()),
        ]
    )
    print_warnings(version.warnings)


def print_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        note(f"warning: {warning}")


def note(text: str) -> None:
    """For people, beside the output."""
    print(text, file=sys.stderr, flush=True)
