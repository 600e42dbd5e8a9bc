"""What a machine's host process tells, as people see it."""

from __future__ import annotations

import functools
import platform
from collections.abc import Collection
from importlib import metadata

from tunefleet import __version__
from tunefleet.answers import FleetStatus, TierUsage
from tunefleet.config import Options, context_length
from tunefleet.core import Manifest, ReplicaState
from tunefleet.messages import Status

PACKAGES = ("torch", "transformers")


def fleet_status(machine: Status, manifest: Manifest, options: Options) -> FleetStatus:
    return FleetStatus(
        version=__version__,
        versions=_versions(),
        base=manifest.name,
        base_id=manifest.base_id,
        max_model_len=context_length(options, manifest),
        at_zero=all(replica.state is ReplicaState.NEW for replica in machine.replicas),
        replicas=machine.replicas,
        num_held=machine.num_held,
        tiers=_tiers(machine, options),
        host_pid=machine.pid,
        parked_pid=machine.parked_pid,
        pss_bytes=machine.pss_bytes,
        starts=machine.starts,
        errors=machine.errors,
    )


def _tiers(machine: Status, options: Options) -> dict[str, TierUsage]:
    return {
        "device": TierUsage(
            num_adapters=sum(replica.num_adapters for replica in machine.replicas),
            used_bytes=sum(replica.adapter_bytes for replica in machine.replicas),
            max_bytes=options.device_adapter_bytes * len(machine.replicas),
        ),
        "host": _usage(machine.host_tier.values(), options.host_cache_bytes),
        "disk": _usage(machine.disk_tier.values(), options.disk_cache_bytes),
    }


def _usage(sizes: Collection[int], max_bytes: int) -> TierUsage:
    return TierUsage(num_adapters=len(sizes), used_bytes=sum(sizes), max_bytes=max_bytes)


@functools.cache
def _versions() -> dict[str, str]:
    """Of what is installed; a router doesn't import it."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
