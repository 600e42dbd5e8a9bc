"""Where a process of the machine's side listens: the one place that knows what an address means."""

from __future__ import annotations

import asyncio
from typing import TypeVar
from urllib.parse import urlsplit

from tunefleet.runtime.wire import Connection

In = TypeVar("In")


async def dial(address: str, connection: Connection[In]) -> None:
    """Opens a connection to ``tcp://host:port``, or to a Unix socket by its path.

    Everybody else passes addresses on as they are, so that a replica may be on another machine. TCP is for
    networks where every peer is trusted: the protocol has neither keys nor encryption.

    Raises:
        OSError: nobody listens there.
    """
    loop = asyncio.get_running_loop()
    parts = urlsplit(address)
    if parts.scheme == "tcp" and parts.hostname and parts.port:
        await loop.create_connection(lambda: connection, parts.hostname, parts.port)
    else:
        await loop.create_unix_connection(lambda: connection, address)
