"""What every family of benchmarks is given: a prepared base, a folder to work in, and how much to do."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from tunefleet.core import Manifest, SamplingParams


@dataclasses.dataclass(frozen=True)
class Bench:
    """One run of ``make bench``.

    Args:
        folder: scratch; gone afterwards.
        repeats: runs whose median counts; what takes long runs less often.
        quick: only whether it works: a tiny base, the fewest and smallest runs.
    """

    base_dir: Path
    manifest: Manifest
    folder: Path
    repeats: int
    quick: bool = False

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def seconds(self, full: float, quick: float) -> float:
        return quick if self.quick else full

    def new_folder(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True)
        return folder

    def prompts(self, generator: random.Random, count: int, length: int) -> list[tuple[int, ...]]:
        """Random tokens, other ones at each call: no run finds its prompts in the prefix cache."""
        lowest = min(100, self.manifest.vocab_size // 2)  # no special tokens
        return [
            tuple(generator.randrange(lowest, self.manifest.vocab_size) for _ in range(length))
            for _ in range(count)
        ]


def greedy(num_tokens: int) -> SamplingParams:
    """An answer of exactly this length."""
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True)
