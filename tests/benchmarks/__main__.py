"""Prints the figures of README's table."""

from __future__ import annotations

import argparse
import os
import platform

import torch
from tests.benchmarks import limits, lookup, store, waking
from tests.benchmarks.throughput import Throughput

from tunefleet.config import resolve
from tunefleet.core import Manifest
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
    print_store(manifest, repeats)
    print()
    rates = Throughput(base_dir, manifest).measure(repeats)
    reference = rates["transformers generate, no adapter"]
    for name, rate in rates.items():
        print(f"{name:<36} {rate:7.0f} tokens/s   {rate / reference:5.2f} x")
    seconds = waking.measure(base_dir, manifest, repeats)
    print()
    for name, value in seconds.items():
        print(f"zero to first token, {name:<15} {value:7.3f} s   {seconds['fresh process'] / value:5.1f} x")


def print_store(manifest: Manifest, repeats: int) -> None:
    for num_users in (1_000, 10_000, 100_000):
        found = lookup.measure(num_users)
        print(f"lookup among {num_users:>7,} users   p50 {found.p50 * 1000:.3f} ms", end="   ")
        print(f"p99 {found.p99 * 1000:.3f} ms")
    with store.s3() as server:
        upload = store.uploads(server, manifest, repeats)
        print(f"upload of {store.UPLOAD_MB} MB to S3   {upload.mb_per_s:.0f} MB/s", end="   ")
        print(f"{upload.extra_mb:+.0f} MB of router memory")
        for size, climb in store.climbs(server, manifest, repeats).items():
            print(f"adapter of {size:>2} MB   download {climb.download * 1000:.1f} ms", end="   ")
            print(f"prepare {climb.prepare * 1000:.1f} ms   into slot {climb.into_slot * 1000:.1f} ms")
        crowd = store.crowd(server, manifest)
        print(f"{store.NUM_WAITERS} requests for a cold digest: {crowd.num_downloads} download", end="   ")
        print(f"{crowd.seconds * 1000:.0f} ms")


if __name__ == "__main__":
    main()
