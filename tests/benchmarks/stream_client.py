"""``stream_client URL USERS COUNT SPREAD_S [CORE]``: people who stream one answer after another.

In a process of its own. They begin one after another within SPREAD_S seconds, or all at once.

Prints, as JSON, for each user a list of [sent, first token received], in seconds of the machine's monotonic
clock, which other processes can compare with theirs.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from urllib.parse import urlsplit

BODY = json.dumps(
    {"messages": [{"role": "user", "content": "hello"}], "stream": True, "temperature": 0}
).encode()


async def main(url: str, num_users: int, count: int, spread_s: float) -> None:
    found = await asyncio.gather(
        *(_user(url, f"user-{index}", count, spread_s * index / num_users) for index in range(num_users))
    )
    print(json.dumps({f"user-{index}": times for index, times in enumerate(found)}))


async def _user(url: str, user_id: str, count: int, delay_s: float) -> list[tuple[float, float]]:
    await asyncio.sleep(delay_s)
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    times = []
    for _ in range(count):
        sent = time.monotonic()
        writer.write(_request(parts.netloc, user_id))
        times.append((sent, await _first_token(reader)))
    writer.close()
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


async def _first_token(reader: asyncio.StreamReader) -> float:
    """Reads the answer to its end."""
    status = await reader.readline()
    assert b" 200 " in status, status
    first = 0.0
    while b"[DONE]" not in (line := await reader.readline()):
        assert line, "the answer broke off"
        if not first and b'"content":"' in line and b'"content":""' not in line:
            first = time.monotonic()
    while await reader.readline() != b"0\r\n":  # the last chunk
        pass
    await reader.readline()
    assert first, "no token came"
    return first


if __name__ == "__main__":
    if len(sys.argv) > 5:
        os.sched_setaffinity(0, {int(sys.argv[5])})
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
