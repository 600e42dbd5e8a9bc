"""What a process costs in memory."""

from __future__ import annotations

import mmap
import os

from tunefleet.runtime.memory import pss_bytes


def test_a_living_process_costs_what_it_touched() -> None:
    before = pss_bytes(os.getpid())
    with mmap.mmap(-1, 32 << 20) as pages:  # fresh from the kernel, not what the heap had left
        pages.write(b"x" * len(pages))
        assert pss_bytes(os.getpid()) - before > len(pages) // 2


def test_a_process_that_does_not_exist_costs_nothing() -> None:
    assert pss_bytes(2**22 + 1) == 0
