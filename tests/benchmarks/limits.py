"""What the machine can do: memory bandwidth and matrix throughput, measured beside everything else."""

from __future__ import annotations

import time

import torch


def memory_gb_per_s() -> float:
    """Reading 512 MB, both cores."""
    block = torch.ones(128 * 1024 * 1024)
    return max(block.nbytes / _seconds(lambda: block.sum()) / 1e9 for _ in range(3))


def matmul_gflops(dtype: torch.dtype) -> float:
    a = torch.randn(1024, 1024).to(dtype)
    return max(2 * 1024**3 / _seconds(lambda: a @ a) / 1e9 for _ in range(5))


def _seconds(work: object) -> float:
    started = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - started
