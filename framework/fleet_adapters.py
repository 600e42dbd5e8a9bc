"""``fleet.adapters``: the store's adapters of the default tenant, in process."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tunefleet import uploads
from tunefleet.arriving import ArrivingFile, arriving
from tunefleet.core import ADAPTER_FILES, DEFAULT_ADAPTER, Adapter, PinTier, Receipt, Version

if TYPE_CHECKING:
    from tunefleet.calls import Progress
    from tunefleet.fleet import Fleet


class FleetAdapters:
    """``fleet.adapters``; lives as long as its fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def push(
        self,
        user_id: str,
        path: str | Path,
        *,
        name: str = DEFAULT_ADAPTER,
        promote: bool = True,
        metadata: Mapping[str, object] | None = None,
        progress: Progress | None = None,
        idempotency_key: str | None = None,
    ) -> Version:
        """Uploads a PEFT folder, or a tar or zip of one, as the user's next version.

        The same bytes as the newest version change nothing. Nothing is sent anywhere, so ``progress`` is told
        once, at the end.

        Raises:
            AdapterInvalid: what is wrong with it.
        """
        async with uploads.adapter_folder(Path(path), self._fleet.options) as folder:
            pushed = await self._fleet.store.push(
                user_id,
                folder,
                name=name,
                promote=promote,
                metadata=dict(metadata or {}),
                idempotency_key=idempotency_key,
            )
        if progress is not None:
            progress(pushed.version.size_bytes, pushed.version.size_bytes)
        return pushed.version

    async def list(self, user_id: str, *, name: str = DEFAULT_ADAPTER) -> list[Version]:
        """All versions, newest first."""
        found: list[Version] = []
        while page := await self.versions(user_id, name=name, after=found[-1].version if found else None):
            found += page
        return found

    async def versions(
        self, user_id: str, *, name: str = DEFAULT_ADAPTER, after: int | None = None, limit: int = 100
    ) -> builtins.list[Version]:
        """A page of versions, newest first; ``after`` is the last number of the page before."""
        return await self._fleet.store.versions(user_id, name=name, after=after, limit=limit)

    async def show(self, user_id: str, *, name: str = DEFAULT_ADAPTER) -> Adapter:
        """The version that answers, with the adapter's canary and pin."""
        return await self._fleet.store.adapter(user_id, name=name)

    async def live(self, user_id: str, *, name: str = DEFAULT_ADAPTER) -> Version:
        """The version that answers."""
        return await self.show(user_id, name=name)

    async def promote(
        self, user_id: str, version: int, *, name: str = DEFAULT_ADAPTER, if_live: int | None = None
    ) -> Version:
        """Makes a version live: the one that answers from now on."""
        return await self._fleet.store.promote(user_id, version, name=name, if_live=if_live)

    async def rollback(
        self, user_id: str, to: int | None = None, if_live: int | None = None, *, name: str = DEFAULT_ADAPTER
    ) -> Version:
        """Makes live what was live before, or ``to``, which must have been; again: one further back."""
        return await self._fleet.store.rollback(user_id, name=name, to=to, if_live=if_live)

    async def canary(
        self, user_id: str, version: int, percent: float, *, name: str = DEFAULT_ADAPTER
    ) -> Adapter:
        """Lets a version answer a share of the sessions."""
        return await self._fleet.store.set_canary(user_id, version, percent, name=name)

    async def end_canary(self, user_id: str, *, name: str = DEFAULT_ADAPTER) -> Adapter:
        """The live version answers all sessions again."""
        return await self._fleet.store.clear_canary(user_id, name=name)

    async def pin(
        self,
        user_id: str,
        tier: PinTier = "host",
        until: str | None = None,
        *,
        name: str = DEFAULT_ADAPTER,
    ) -> Adapter:
        """Keeps what answers at hand on every machine, down to ``tier``; ``until`` an RFC 3339 time."""
        return await self._fleet.store.set_pin(user_id, tier, until=until, name=name)

    async def unpin(self, user_id: str, *, name: str = DEFAULT_ADAPTER) -> Adapter:
        """It may be evicted again."""
        return await self._fleet.store.clear_pin(user_id, name=name)

    async def delete(self, user_id: str, version: int, *, name: str = DEFAULT_ADAPTER) -> Receipt:
        """Removes a version that doesn't answer from everywhere."""
        return await self._fleet.store.delete_version(user_id, version, name=name)

    async def download(
        self, user_id: str, version: int | None, into: str | Path, *, name: str = DEFAULT_ADAPTER
    ) -> None:
        """Writes a version's files, None: the live one's, into a folder, byte for byte as uploaded."""
        number = (await self.live(user_id, name=name)).version if version is None else version
        with arriving(Path(into)) as folder:
            for file in ADAPTER_FILES:
                stored = await self._fleet.store.open_file(user_id, number, file, name=name)
                with ArrivingFile(folder / file) as arrived:
                    async for chunk in stored:
                        arrived.write(chunk)
                    arrived.check(stored.sha256)
