"""A router in a process of its own, to be killed: ``lone_router.py FOLDER BASE`` streams until it ends."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tunefleet.config import Options, resolve
from tunefleet.core import SamplingParams
from tunefleet.messages import Submit
from tunefleet.runtime.base import read_manifest
from tunefleet.runtime.machine import Machine


def options_for(root: Path, **given: object) -> Options:
    """Of a test's machine with everything below ``root``; routers that join need the same."""
    keywords: dict[str, object] = {
        "cache_dir": str(root / "cache"),
        "store_url": (root / "store").as_uri(),
        "devices": "cpu",
        "idle_timeout_s": 60.0,
        "max_model_len": 256,
        "threads_per_replica": 1,
    }
    return resolve(keywords={**keywords, **given}, environ={})


async def stream(root: Path, base: Path) -> None:
    machine = Machine(options_for(root), read_manifest(base), base)
    await machine.start()
    sampling = SamplingParams(max_tokens=245, ignore_eos=True)
    async for _ in machine.submit(Submit(request_id="theirs", prompt=(5, 6, 7, 8), sampling=sampling)):
        print("streaming", flush=True)


if __name__ == "__main__":
    asyncio.run(stream(Path(sys.argv[1]), Path(sys.argv[2])))
