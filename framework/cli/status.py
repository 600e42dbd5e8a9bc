"""``tunefleet status``: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from tunefleet.answers import FleetStatus, TierUsage
from tunefleet.cli.arguments import AsJson
from tunefleet.cli.output import print_pairs, print_table, tell
from tunefleet.core import LoggedError, ReplicaInfo

REPLICA_COLUMNS = ("replica", "state", "device", "for", "running", "waiting", "slots", "KV", "start")


def status(
    *,
    once: Annotated[bool, typer.Option("--once", help="Print it once, also on a terminal.")] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Between two looks, on a terminal.")
    ] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show what runs where, on a terminal until Ctrl-C. Wakes nothing."""
    from tunefleet.client import Client

    with Client() as client:
        found = client.status()
        if once or as_json or not sys.stdout.isatty():
            tell(found, _print_status, as_json=as_json)
            return
        from tunefleet.cli.status_view import watch

        watch(client.status, found, interval)


def facts(found: FleetStatus) -> list[tuple[str, str]]:
    """One by one, all but the replicas."""
    return [
        ("base", found.base_id),
        ("context", f"{found.max_model_len} tokens"),
        ("versions", ", ".join(f"{name} {version}" for name, version in _versions(found).items())),
        ("replicas", "zero: nothing on the device" if found.at_zero else str(len(found.replicas))),
        ("queue", f"{found.num_held} held for a replica, {_num_waiting(found)} waiting in replicas"),
        *((f"{name} tier", _told_tier(tier)) for name, tier in found.tiers.items()),
        ("standby", ", ".join(f"{who} {size:,} bytes" for who, size in found.pss_bytes.items()) or "-"),
        *(("error", told_error(error)) for error in found.errors),
    ]


def replica_cells(replica: ReplicaInfo, now: float) -> tuple[object, ...]:
    """One per column of ``REPLICA_COLUMNS``."""
    kv_usage = replica.kv_tokens / replica.max_kv_tokens if replica.max_kv_tokens else 0.0
    start_s = replica.stages.get("start")
    return (
        replica.replica_id,
        replica.state.value,
        replica.device,
        _told_duration(now - replica.since),
        replica.num_running,
        replica.num_waiting,
        f"{replica.num_adapters}/{replica.num_slots}",
        f"{kv_usage:.0%}",
        "-" if start_s is None else f"{start_s:.2f} s",
    )


def told_error(error: LoggedError) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(error.at))
    return f"{at} {error.message}"


def _told_duration(seconds: float) -> str:
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _told_tier(tier: TierUsage) -> str:
    return f"{tier.num_adapters} adapters, {tier.used_bytes:,} of {tier.max_bytes:,} bytes"


def _versions(found: FleetStatus) -> dict[str, str]:
    return {"tunefleet": found.version, **found.versions}


def _num_waiting(found: FleetStatus) -> int:
    return sum(replica.num_waiting for replica in found.replicas)


def _print_status(found: FleetStatus) -> None:
    print_pairs(facts(found))
    if found.replicas:
        now = time.time()
        print_table(REPLICA_COLUMNS, [replica_cells(replica, now) for replica in found.replicas])
