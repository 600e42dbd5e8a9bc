"""This router's machine, as its store's background work sees it."""

from __future__ import annotations

from collections.abc import Sequence

from tunefleet.messages import Forgotten, HeldAdapter
from tunefleet.open_requests import OpenRequests, Owner
from tunefleet.runtime.dispatch import Dispatcher


class RouterMachine:
    """Copies on the machine, and this router's own requests. Closes nothing; see ``watching.MachineSide``."""

    def __init__(self, dispatcher: Dispatcher, open_requests: OpenRequests) -> None:
        self._dispatcher = dispatcher
        self._open_requests = open_requests

    async def forget(self, digest: str, keys: Sequence[str] = ()) -> Forgotten:
        return await self._dispatcher.forget(digest, keys)

    async def hold(self, adapters: Sequence[HeldAdapter]) -> None:
        self._dispatcher.hold(adapters)

    async def end_streams(self, tenant: str, user_id: str) -> int:
        num_ended = await self._open_requests.end(Owner(tenant, user_id))
        await self._dispatcher.forget_user(tenant, user_id)
        return num_ended

    async def known_copies(self) -> set[str]:
        """Digests that the machine has anywhere."""
        status = await self._dispatcher.status()
        on_devices = (digest for replica in status.replicas for digest in replica.digests)
        return {*status.disk_tier, *status.host_tier, *on_devices}
