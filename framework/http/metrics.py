"""``/metrics``, for Prometheus."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

from tunefleet.answers import FleetStatus
from tunefleet.errors import TunefleetError

if TYPE_CHECKING:
    from tunefleet.fleet import Fleet

HOST_WAIT_S = 3.0  # a scrape that gets no answer in time loses the router's own metrics too

_log = logging.getLogger("tunefleet.http")


async def metrics(fleet: Fleet, request: Request) -> Response:
    """Sums over all tenants, of no user and no adapter: open to all, as /healthz is. Wakes nothing."""
    if not fleet.is_open:
        return Response(status_code=503, headers={"retry-after": "1"})
    measured = fleet.generations.metrics
    status = await _status(fleet)
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    measured.machine.note(status)
    return Response(encode(measured.registry), headers={"content-type": content_type})


async def _status(fleet: Fleet) -> FleetStatus | None:
    try:
        async with asyncio.timeout(HOST_WAIT_S):
            return await fleet.status()
    except (TunefleetError, TimeoutError) as error:
        _log.warning("the host process doesn't tell its status: %s", error)
        return None
