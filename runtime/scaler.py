"""How many replicas there should be. Pure: loads and times come in as arguments."""

from __future__ import annotations

import math
from typing import NamedTuple


class Load(NamedTuple):
    """What the scaler looks at."""

    num_requests: int  # running and waiting on replicas, and held for one
    num_replicas: int  # READY and STARTING
    idle_s: float  # time since the last request ended


def wanted_replicas(
    load: Load, *, min_replicas: int, max_replicas: int, idle_timeout_s: float, target_concurrency: int
) -> int:
    """Replicas for this load: ``target_concurrency`` requests each at most; fewer only after idling."""
    needed = math.ceil(load.num_requests / target_concurrency)
    floor = min_replicas if load.num_requests == 0 and load.idle_s >= idle_timeout_s else load.num_replicas
    return min(max(needed, floor, min_replicas), max_replicas)
