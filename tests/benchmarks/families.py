"""The families of figures, in the order in which they are measured."""

from __future__ import annotations

from tests.benchmarks import (
    agreement,
    latency,
    lookup,
    memory,
    open_loop,
    recovery,
    renewal,
    router,
    store,
    storm,
    throughput,
    waking,
    working_set,
)
from tests.benchmarks.figures import Family

FAMILIES: dict[str, Family] = {
    "throughput": throughput.measure,
    "latency": latency.measure,
    "working_set": working_set.measure,
    "storm": storm.measure,
    "open_loop": open_loop.measure,
    "waking": waking.measure,
    "recovery": recovery.measure,
    "renewal": renewal.measure,
    "agreement": agreement.measure,
    "memory": memory.measure,
    "router": router.measure,
    "store": store.measure,
    "lookup": lookup.measure,
}
