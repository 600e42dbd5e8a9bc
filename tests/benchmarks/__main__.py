"""Prints the figures of README's table."""

from __future__ import annotations

import argparse
import os
import platform

import torch
from tests.benchmarks import limits, waking
from tests.benchmarks.throughput import Throughput

from tunefleet.config import resolve
from tunefleet.runtime.base import locate_base, read_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    base_dir = locate_base(resolve(), progress=print)
    manifest = read_manifest(base_dir)
    cores = len(os.sched_getaffinity(0))
    print(
        f"{platform.machine()}, {cores} cores, torch {torch.__version__}, {manifest.base_id} {manifest.dtype}"
    )
    print(f"memory {limits.memory_gb_per_s():.1f} GB/s, ", end="")
    print(f"float32 products {limits.matmul_gflops(torch.float32):.0f} GFLOP/s, ", end="")
    print(f"bfloat16 {limits.matmul_gflops(torch.bfloat16):.0f} GFLOP/s; medians of {repeats} runs\n")
    rates = Throughput(base_dir, manifest).measure(repeats)
    reference = rates["transformers generate, no adapter"]
    for name, rate in rates.items():
        print(f"{name:<36} {rate:7.0f} tokens/s   {rate / reference:5.2f} x")
    seconds = waking.measure(base_dir, manifest, repeats)
    print()
    for name, value in seconds.items():
        print(f"zero to first token, {name:<15} {value:7.3f} s   {seconds['fresh process'] / value:5.1f} x")


if __name__ == "__main__":
    main()
