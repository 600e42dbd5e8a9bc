"""Tokens per second against batch size, number of adapters and their ranks, beside transformers and PEFT.

Every request has 64 tokens in and 64 out (greedy, random prompts that are new in each run), all are sent at
once, and all ways take turns in every round.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.adapters import MIXED_RANKS, make_adapters, prepared, shelve
from tests.benchmarks.bench import Bench
from tests.benchmarks.engines import NUM_WARM_UPS, EngineClient
from tests.benchmarks.figures import Figure, at_least, counted, figure, ratios
from tests.benchmarks.references import Generate, Peft
from tests.benchmarks.traces import decode_tokens_per_s, prefill_tokens_per_s, tokens_per_s

from tunefleet.core import AdapterRef

RANK = 8
MAX_PEFT_ROUNDS = 2  # it takes its time
PEFT_TOKENS = (1, 5)  # answers of two short runs, from which one of the full length is extrapolated
GENERATE, MIXED, SWITCHING = "transformers generate", "PEFT adapter_names", "PEFT set_adapter"


class Way(NamedTuple):
    """One way to run the engine."""

    batch: int
    num_adapters: int
    is_mixed: bool = False  # ranks 4 to 64; else all 8

    def __str__(self) -> str:
        if not self.num_adapters:
            return f"{counted(self.batch, 'sequence')}, no adapter"
        ranks = f"ranks {MIXED_RANKS[0]} to {MIXED_RANKS[-1]}" if self.is_mixed else f"rank {RANK}"
        return f"{counted(self.batch, 'sequence')}, {counted(self.num_adapters, 'adapter')} of {ranks}"


class Rates(NamedTuple):
    """Tokens/s of one run."""

    overall: float  # answer tokens, prefill included
    prefill: float
    decode: float


def measure(bench: Bench) -> Iterator[Figure]:
    most = bench.size(32, 4)
    adapters = make_adapters(bench, [RANK] * most)
    mixed = make_adapters(bench, [MIXED_RANKS[index % len(MIXED_RANKS)] for index in range(most)], seed=1)
    disk_dir = bench.folder / "throughput-disk"
    refs, mixed_refs = shelve(adapters, disk_dir, most), shelve(mixed, disk_dir, most)
    with prepared(bench, disk_dir, [*refs, *mixed_refs]) as paths:
        runs = _Runs(bench, refs, mixed_refs, EngineClient(bench, paths, max_num_seqs=most))
        rates, references = runs.in_turn(_ways(most), adapters)
    yield from _figures(rates)
    yield from _beside(rates, references, most)


class _Runs:
    """Engine and references, each loaded once."""

    def __init__(
        self,
        bench: Bench,
        refs: Sequence[AdapterRef],
        mixed_refs: Sequence[AdapterRef],
        client: EngineClient,
    ) -> None:
        self._bench = bench
        self._refs = refs
        self._mixed_refs = mixed_refs
        self._client = client
        self._num_tokens = bench.size(64, 8)
        self._generator = random.Random(0)

    def in_turn(
        self, ways: Sequence[Way], folders: Sequence[Path]
    ) -> tuple[dict[Way, list[Rates]], dict[str, list[float]]]:
        generate, peft = Generate(self._bench), Peft(self._bench, folders)
        prompts = self._prompts(len(folders))
        few = prompts[: len(folders) // 16 or 1]
        beside: dict[str, Callable[[], float]] = {
            GENERATE: lambda: generate.tokens_per_s(self._prompts(len(folders)), self._num_tokens),
            MIXED: lambda: peft.mixed_tokens_per_s(prompts, self._num_tokens, PEFT_TOKENS),
            SWITCHING: lambda: peft.switching_tokens_per_s(few, self._num_tokens, PEFT_TOKENS),
        }
        for _ in range(NUM_WARM_UPS):
            self._run(ways[-1])
        rates: dict[Way, list[Rates]] = {way: [] for way in ways}
        references: dict[str, list[float]] = {name: [] for name in beside}
        for round_ in range(self._bench.repeats):
            for name, run in beside.items():
                if name == GENERATE or round_ < MAX_PEFT_ROUNDS:
                    references[name].append(run())
            for way in ways:
                rates[way].append(self._run(way))
        return rates, references

    def _run(self, way: Way) -> Rates:
        refs = self._mixed_refs if way.is_mixed else self._refs
        adapters = [
            refs[index % way.num_adapters] if way.num_adapters else None for index in range(way.batch)
        ]
        self._client.burst(self._prompts(way.num_adapters, 2), 1, adapters[: way.num_adapters])  # into slots
        traces = self._client.burst(self._prompts(way.batch), self._num_tokens, adapters)
        return Rates(tokens_per_s(traces), prefill_tokens_per_s(traces), decode_tokens_per_s(traces))

    def _prompts(self, count: int, length: int | None = None) -> list[tuple[int, ...]]:
        return self._bench.prompts(self._generator, count, length or self._num_tokens)


def _ways(most: int) -> list[Way]:
    """Batches and adapters of 1, 8 and 32; a quarter of that in a quick run."""
    counts = sorted({1, max(1, most // 4), most})
    ways = [Way(batch, num) for batch in counts for num in (0, *counts) if num <= batch]
    mixed = [Way(batch, num, is_mixed=True) for batch, num, _ in ways if num > 1]
    return ways + mixed


def _figures(rates: dict[Way, list[Rates]]) -> Iterator[Figure]:
    for way, runs in rates.items():
        yield figure(f"decode, {way}", "tokens/s", (run.decode for run in runs))
    for way, runs in rates.items():
        yield figure(f"prefill, {way}", "tokens/s", (run.prefill for run in runs))


def _beside(rates: dict[Way, list[Rates]], references: dict[str, list[float]], most: int) -> Iterator[Figure]:
    generated = references[GENERATE]
    yield figure(f"{GENERATE}, batch {most}, no adapter", "tokens/s", generated)
    for name in (MIXED, SWITCHING):
        note = f"extrapolated from {PEFT_TOKENS[0]} and {PEFT_TOKENS[1]} tokens out"
        yield figure(f"{name}, {most} adapters loaded", "tokens/s", references[name], note=note)
    bars = {Way(most, 0): at_least(1.5), Way(most, most): at_least(1.0)}
    for way in (*bars, Way(most, 1), Way(most, most, is_mixed=True)):
        overall = _overall(rates[way])
        yield figure(f"prefill and decode, {way}", "tokens/s", overall)
        yield ratios(f"{way}, to {GENERATE}", overall, generated, bars.get(way))
    beside_peft = zip(_overall(rates[Way(most, most)]), references[MIXED], strict=False)
    yield figure(f"{Way(most, most)}, to {MIXED}", "x", (ours / theirs for ours, theirs in beside_peft))


def _overall(runs: Iterable[Rates]) -> list[float]:
    return [run.overall for run in runs]
