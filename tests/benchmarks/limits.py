"""What the machine can do: memory bandwidth and matrix products, measured before each family and at the end.

How far apart least and most are tells how quiet the machine was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from tests.benchmarks.figures import Figure, figure


class Limits(NamedTuple):
    """The best of a few tries within a second."""

    read_1_thread: float  # GB/s
    read_2_threads: float  # GB/s
    float32: float  # GFLOP/s of matrix products, on all threads
    bfloat16: float  # GFLOP/s
    load: float  # runnable processes over the last minute, ours included


def measure(block_mb: int = 512) -> Limits:
    """Reads a block of so many MB, larger than any cache, and multiplies matrices."""
    return Limits(
        read_gb_per_s(1, block_mb),
        read_gb_per_s(2, block_mb),
        matmul_gflops(torch.float32),
        matmul_gflops(torch.bfloat16),
        os.getloadavg()[0],
    )


def figures(measured: list[Limits]) -> Iterator[Figure]:
    units = {
        "read_1_thread": ("memory read, 1 thread", "GB/s"),
        "read_2_threads": ("memory read, 2 threads", "GB/s"),
        "float32": ("matrix products, float32", "GFLOP/s"),
        "bfloat16": ("matrix products, bfloat16", "GFLOP/s"),
        "load": ("load average", "processes"),
    }
    for field, (name, unit) in units.items():
        yield figure(name, unit, (float(getattr(limits, field)) for limits in measured))


def read_gb_per_s(num_threads: int, block_mb: int) -> float:
    block = torch.ones(block_mb * 1024 * 1024 // 4)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return max(block.nbytes / _seconds(block.sum) / 1e9 for _ in range(3))
    finally:
        torch.set_num_threads(before)


def matmul_gflops(dtype: torch.dtype) -> float:
    a = torch.randn(1024, 1024).to(dtype)
    return max(2 * 1024**3 / _seconds(lambda: a @ a) / 1e9 for _ in range(5))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
