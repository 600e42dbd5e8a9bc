"""A file of a version on its way out of the store."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import BinaryIO

from tunefleet.adapters_store.threads import Runner
from tunefleet.errors import StoreError

CHUNK_BYTES = 256 * 1024


class StoredFile:
    """A file of a version, streamed as it was uploaded.

    Iterate once, or ``aclose``. Bytes are hashed on the way: if the store's copy is not what was uploaded,
    StoreError comes instead of the last chunk, so nobody ever holds a complete wrong file.
    """

    def __init__(self, stream: BinaryIO, size_bytes: int, sha256: str, run: Runner) -> None:
        self.size_bytes = size_bytes
        self.sha256 = sha256
        self._stream = stream
        self._run = run

    async def __aiter__(self) -> AsyncIterator[bytes]:
        hasher = hashlib.sha256()
        try:
            chunk = await self._run(lambda: self._stream.read(CHUNK_BYTES))
            while chunk:
                hasher.update(chunk)
                following = await self._run(lambda: self._stream.read(CHUNK_BYTES))
                if not following and hasher.hexdigest() != self.sha256:
                    raise StoreError("the stored file is not what was uploaded", code="object_corrupt")
                yield chunk
                chunk = following
        finally:
            self._stream.close()

    async def aclose(self) -> None:
        self._stream.close()
