"""Zero to first token: by fork from the parked process, against a fresh process."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from tunefleet.config import Options, resolve
from tunefleet.core import Manifest, SamplingParams
from tunefleet.messages import Submit
from tunefleet.runtime.machine import Machine


def measure(base_dir: Path, manifest: Manifest, repeats: int) -> dict[str, float]:
    """Median seconds."""
    with tempfile.TemporaryDirectory() as folder:
        options = resolve(keywords={"store_url": Path(folder).as_uri(), "idle_timeout_s": 0.2})
        fresh = [asyncio.run(_fresh(options, manifest, base_dir)) for _ in range(max(1, repeats // 2))]
        forked = asyncio.run(_forked(options, manifest, base_dir, repeats))
    return {"fresh process": statistics.median(fresh), "fork": statistics.median(forked)}


async def _fresh(options: Options, manifest: Manifest, base_dir: Path) -> float:
    """No host process, no parked process: all is imported and mapped on this request."""
    machine = Machine(options, manifest, base_dir)
    started = time.monotonic()
    await machine.start()
    await _first_token(machine)
    seconds = time.monotonic() - started
    pid = (await machine.status()).pid
    await machine.close()
    while (
        Path(f"/proc/{pid}/status").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    ):
        await asyncio.sleep(0.05)
    return seconds


async def _forked(options: Options, manifest: Manifest, base_dir: Path, repeats: int) -> list[float]:
    machine = Machine(options, manifest, base_dir)
    await machine.start()
    await _first_token(machine)
    seconds = []
    for _ in range(repeats):
        while machine.replicas:
            await machine.changed()
        started = time.monotonic()
        await _first_token(machine)
        seconds.append(time.monotonic() - started)
    await machine.close()
    return seconds


async def _first_token(machine: Machine) -> None:
    work = Submit(
        request_id=str(time.monotonic()), prompt=tuple(range(100, 164)), sampling=SamplingParams(max_tokens=1)
    )
    async for _ in machine.submit(work):
        pass
