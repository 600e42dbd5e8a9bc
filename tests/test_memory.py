"""What a process costs in memory."""

from __future__ import annotations

import mmap
import os

from tunefleet.runtime.memory import MAX_AGE_S, MemoryMeter, pss_bytes


def test_a_living_process_costs_what_it_touched() -> None:
    before = pss_bytes(os.getpid())
    with mmap.mmap(-1, 32 << 20) as pages:  # fresh from the kernel, not what the heap had left
        pages.write(b"x" * len(pages))
        assert pss_bytes(os.getpid()) - before > len(pages) // 2


def test_a_process_that_does_not_exist_costs_nothing() -> None:
    assert pss_bytes(2**22 + 1) == 0


def test_a_meter_reads_again_when_its_reading_is_old_or_the_processes_are_others() -> None:
    now = [0.0]
    meter = MemoryMeter(lambda: now[0])
    own = {"own": os.getpid(), "none": 0}
    first = meter.pss_bytes(own)
    assert first.keys() == {"own"}
    with mmap.mmap(-1, 32 << 20) as pages:
        pages.write(b"x" * len(pages))
        assert first == meter.pss_bytes(own)
        assert meter.pss_bytes({"other": os.getpid()})["other"] > first["own"]
        now[0] = MAX_AGE_S
        assert meter.pss_bytes(own)["own"] > first["own"]
