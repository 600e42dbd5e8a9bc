"""``stream_client URL USERS COUNT SPREAD_S [CORE]``: people who stream one answer after another.

In a process of its own. They begin one after another within SPREAD_S seconds, or all at once. As 32 tokens
come at the same moment, a token costs this process microseconds: what it takes would count as the router's.

Prints, as JSON, for each user a list of [sent, first token received], in seconds of the machine's monotonic
clock, which other processes can compare with theirs.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from urllib.parse import urlsplit

import uvloop

BODY = json.dumps(
    {"messages": [{"role": "user", "content": "hello"}], "stream": True, "temperature": 0}
).encode()
TEXT = re.compile(rb'"content":"[^"]')
END = b"0\r\n\r\n"  # of a chunked body


async def main(url: str, num_users: int, count: int, spread_s: float) -> None:
    found = await asyncio.gather(
        *(_user(url, f"user-{index}", count, spread_s * index / num_users) for index in range(num_users))
    )
    print(json.dumps({f"user-{index}": times for index, times in enumerate(found)}))


async def _user(url: str, user_id: str, count: int, delay_s: float) -> list[tuple[float, float]]:
    await asyncio.sleep(delay_s)
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    transport, reader = await loop.create_connection(_Reader, parts.hostname, parts.port)
    request = _request(parts.netloc, user_id)
    times = []
    for _ in range(count):
        answer = reader.expect()
        sent = time.monotonic()
        transport.write(request)
        times.append((sent, await answer))
    transport.close()
    return times


def _request(host: str, user_id: str) -> bytes:
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: {host}",
        f"X-User-Id: {user_id}",
        "Content-Type: application/json",
        f"Content-Length: {len(BODY)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + BODY


class _Reader(asyncio.Protocol):
    """Notes when an answer's first text came, and says so once it is over."""

    def expect(self) -> asyncio.Future[float]:
        """When the first text of the next answer was there."""
        self._first = 0.0
        self._answer: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        return self._answer

    def data_received(self, data: bytes) -> None:
        if not self._first and TEXT.search(data):
            self._first = time.monotonic()
        if data.endswith(END):
            assert self._first, f"no token came: {data!r}"
            self._answer.set_result(self._first)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_exception(exc or EOFError("the answer broke off"))


if __name__ == "__main__":
    if len(sys.argv) > 5:
        os.sched_setaffinity(0, {int(sys.argv[5])})
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
