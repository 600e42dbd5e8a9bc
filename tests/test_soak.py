"""Minutes of everything at once: no failed request, no wrong token, and nothing that grows."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from engine_kit import make_stage
from soak import NUM_REPLICAS, Footprint, Soak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SECONDS = float(os.environ.get("TUNEFLEET_SOAK_S", "120"))
SHAPES = [
    {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    {"r": 16, "lora_alpha": 16, "target_modules": ["gate_proj", "down_proj"]},
]
MOST_GROWTH = 48 * 2**20  # bytes of one process: allocators keep some, a leak is no constant


def test_nobody_notices_that_everything_dies_all_the_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> tuple[Footprint, Footprint, Soak]:
        soak = Soak(tmp_path, make_stage(tmp_path / "stage", SHAPES, 24), seed=0)
        async with soak.fleet:
            await soak.begin()
            await soak.live(SECONDS / 4)
            await soak.zero()
            before = await soak.footprint()
            await soak.live(SECONDS * 3 / 4)
            await soak.zero()
            return before, await soak.footprint(), soak

    before, after, soak = asyncio.run(scenario())
    soak.verify()
    with capsys.disabled():
        print(f"\nsoak of {SECONDS:g} s: {dict(sorted(soak.tally.items()))}\n{before}\n{after}")
    assert soak.tally["requests"] > SECONDS
    assert soak.tally["killed: ready replica"] > SECONDS / 30
    assert soak.tally["zeros"] > 2
    assert min(soak.tally["uploads"], soak.tally["deletions"]) > SECONDS / 10
    assert after.num_processes == before.num_processes == 1
    assert after.num_sockets <= before.num_sockets + NUM_REPLICAS
    assert after.num_open_files <= before.num_open_files + 16
    assert after.router_bytes - before.router_bytes < MOST_GROWTH
    assert after.host_bytes - before.host_bytes < MOST_GROWTH
