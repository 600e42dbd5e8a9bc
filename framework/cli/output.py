"""What commands print: tables and colour on a terminal, plain lines elsewhere, JSON when asked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from tunefleet.core import Adapter, Canary, Pin, Receipt, User

T = TypeVar("T")


def print_json(value: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def tell(value: T, show: Callable[[T], None], *, as_json: bool) -> None:
    """As JSON where that was asked for, else as ``show`` prints it."""
    if as_json:
        print_json(value)
    else:
        show(value)


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


def print_adapter(adapter: Adapter) -> None:
    print_pairs(
        [
            ("user", adapter.user_id),
            ("adapter", adapter.name),
            ("version", f"{adapter.version}{' (live)' if adapter.live else ''}"),
            ("digest", adapter.digest),
            ("base", adapter.base),
            ("rank", adapter.rank),
            ("target modules", ", ".join(adapter.target_modules)),
            ("size", f"{adapter.size_bytes:,} bytes"),
            ("created", adapter.created_at),
            ("metadata", _json(adapter.metadata)),
            ("canary", told_canary(adapter.canary)),
            ("pin", told_pin(adapter.pin)),
        ]
    )
    print_warnings(adapter.warnings)


def told_canary(canary: Canary | None) -> str:
    return f"version {canary.version} answers {canary.percent:g} %" if canary else "none"


def told_pin(pin: Pin | None) -> str:
    return f"{pin.tier}{f' until {pin.until}' if pin.until else ''}" if pin else "none"


def print_user(user: User) -> None:
    print_pairs(
        [
            ("user", user.user_id),
            ("adapters", user.num_adapters),
            ("created", user.created_at),
            ("fallback", user.fallback or "as the server's option says"),
            ("limits", _json(user.limits)),
            ("metadata", _json(user.metadata)),
        ]
    )


def print_receipt(receipt: Receipt) -> None:
    """What went where, and what stayed and why."""
    still = "goes on by itself" if receipt.status == "pending" else receipt.finished_at or "-"
    removed = ", ".join(f"{num} {place}" for place, num in receipt.removed.items() if num)
    print_pairs(
        [
            ("deletion", receipt.deletion_id),
            ("status", receipt.status),
            ("removed", removed or "nothing"),
            *(("kept", sentence) for sentence in receipt.kept),
            ("requested", receipt.requested_at),
            ("finished", still),
        ]
    )
    if receipt.status == "pending":
        note(f"look again with `tunefleet users deletion {receipt.deletion_id}`")


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def print_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        note(f"warning: {warning}")


def note(text: str) -> None:
    """For people, beside the output."""
    print(text, file=sys.stderr, flush=True)
