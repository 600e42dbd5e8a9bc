"""The body of a GET as a stream that ends only where the object does."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import urllib3.exceptions
from urllib3.response import BaseHTTPResponse

from tunefleet.adapters_store.objects import shown
from tunefleet.adapters_store.s3_errors import UNAVAILABLE, store_error
from tunefleet.errors import StoreError

MIN_BYTES_PER_S = 1024  # slower is no better than down
_GRACE_S = 30.0


class S3Stream(io.RawIOBase):
    """So many bytes of a response, as they are stored: no Content-Encoding is undone.

    Holds a connection; ``close`` gives it back, or ends it where bytes are still to come.
    """

    def __init__(
        self,
        response: BaseHTTPResponse,
        key: str,
        num_bytes: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._response = response
        self._what = f"{shown(key)} can't be read"
        self._num_bytes = self._left = num_bytes
        self._clock = clock
        self._started_s = clock()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self._read(min(len(buffer), self._left)) if self._left else b""
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            if self._left:
                self._response.close()
            self._response.release_conn()
        super().close()

    def _read(self, num_bytes: int) -> bytes:
        try:
            content = self._response.read1(num_bytes, decode_content=False)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise store_error(self._what, _as_http(error)) from error
        if not content:
            raise StoreError(
                f"{self._what}: it ended {self._left} bytes early; try again later", code=UNAVAILABLE
            )
        self._left -= len(content)
        self._check_pace()
        return content

    def _check_pace(self) -> None:
        """The read timeout is for each packet: a store that drips would never meet it."""
        took_s = self._clock() - self._started_s
        if took_s > _GRACE_S and self._num_bytes - self._left < took_s * MIN_BYTES_PER_S:
            raise StoreError(f"{self._what}: the store is too slow; try again later", code=UNAVAILABLE)


def _as_http(error: Exception) -> Exception:
    if isinstance(error, urllib3.exceptions.HTTPError):
        return error
    return urllib3.exceptions.ProtocolError(str(error))
