"""How long one person waits: first token, next token, a long context, a long neighbour, a second turn."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.adapters import make_adapters, prepared, shelve
from tests.benchmarks.bench import Bench
from tests.benchmarks.engines import NUM_WARM_UPS, EngineClient
from tests.benchmarks.figures import Figure, counted, figure, percentile, ratios
from tests.benchmarks.traces import Trace, gap, ttft

from tunefleet.core import AdapterRef

RANK = 8
MAX_ROUNDS = 3


def measure(bench: Bench) -> Iterator[Figure]:
    most = bench.size(32, 4)
    disk_dir = bench.folder / "latency-disk"
    refs = shelve(make_adapters(bench, [RANK] * most, seed=5), disk_dir, most)
    with prepared(bench, disk_dir, refs) as paths:
        client = EngineClient(bench, paths, max_num_seqs=most)
        generator = random.Random(0)
        for _ in range(NUM_WARM_UPS):
            client.burst(bench.prompts(generator, most, 16), bench.size(32, 4), refs)
        yield from _bursts(bench, client, refs, generator)
        yield from _long_context(bench, client, generator)
        yield from _second_turn(bench, client, refs[0], generator)
        yield from _neighbour(bench, client, paths, refs, generator)


def _bursts(
    bench: Bench, client: EngineClient, refs: Sequence[AdapterRef], generator: random.Random
) -> Iterator[Figure]:
    """So many people at once, each with an adapter in a slot."""
    num_tokens = bench.size(64, 4)
    for batch in sorted({1, max(1, len(refs) // 4), len(refs)}):
        runs = [
            client.burst(bench.prompts(generator, batch, num_tokens), num_tokens, refs[:batch])
            for _ in range(bench.repeats)
        ]
        for percent in (50, 99):
            found = (1000 * ttft(traces, percent) for traces in runs)
            yield figure(f"TTFT p{percent}, {batch} at once", "ms", found)
        for percent in (50, 99):
            found = (1000 * gap(traces, percent) for traces in runs)
            yield figure(f"inter-token p{percent}, {batch} at once", "ms", found)
        if batch == 1:
            whole = (traces[0].times[-1] - traces[0].asked_at for traces in runs)
            yield figure(f"one request alone, {num_tokens} in, {num_tokens} out", "s", whole)


def _long_context(bench: Bench, client: EngineClient, generator: random.Random) -> Iterator[Figure]:
    length, num_tokens = bench.size(1984, 200), bench.size(32, 4)
    for batch in (1, bench.size(8, 2)):
        runs = [
            client.burst(bench.prompts(generator, batch, length), num_tokens)
            for _ in range(min(bench.repeats, MAX_ROUNDS if batch == 1 else 1))
        ]
        gaps = (1000 * _settled_gap(traces) for traces in runs)
        yield figure(f"decode at {length} tokens of context, {counted(batch, 'sequence')}: step", "ms", gaps)
        if batch == 1:
            rates = (length / traces[0].ttft for traces in runs)
            yield figure(f"prefill of {length} tokens alone", "tokens/s", rates)


def _settled_gap(traces: Sequence[Trace]) -> float:
    """Median, while no prompt is prefilled any more."""
    start = max(trace.times[0] for trace in traces)
    return percentile((gap for trace in traces for gap in trace.gaps(start)[1:]), 50)


class _Turns(NamedTuple):
    reused: Trace
    fresh: Trace


def _second_turn(
    bench: Bench, client: EngineClient, ref: AdapterRef, generator: random.Random
) -> Iterator[Figure]:
    """The same length of prompt, once as a chat that goes on, once all new."""
    runs = [_turns(bench, client, ref, generator) for _ in range(bench.repeats)]
    length = runs[0].reused.num_prompt_tokens
    reused, fresh = ([turns[way].ttft for turns in runs] for way in range(2))
    cached = (turns.reused.timing.cached_tokens if turns.reused.timing else 0 for turns in runs)
    yield figure(f"second turn of a chat, {length} tokens: TTFT", "ms", (1000 * value for value in reused))
    yield figure("the same length without reuse: TTFT", "ms", (1000 * value for value in fresh))
    yield figure("second turn: cached_tokens", "tokens", cached)
    yield ratios("TTFT without reuse to with", fresh, reused)


def _turns(bench: Bench, client: EngineClient, ref: AdapterRef, generator: random.Random) -> _Turns:
    first, new = bench.size(512, 48), bench.size(64, 8)
    (prompt, more, other) = (bench.prompts(generator, 1, length)[0] for length in (first, new, first))
    turn = client.ask(prompt, new, ref, user="chat")
    client.finish()
    prompt += tuple(turn.tokens) + more
    reused = client.ask(prompt, 1, ref, user="chat")
    client.finish()
    padding = bench.prompts(generator, 1, len(prompt) - first)[0]
    fresh = client.ask(other + padding, 1, ref, user="chat")
    client.finish()
    return _Turns(reused, fresh)


def _neighbour(
    bench: Bench,
    client: EngineClient,
    paths: dict[str, Path],
    refs: Sequence[AdapterRef],
    generator: random.Random,
) -> Iterator[Figure]:
    """People who read while a long prompt comes in, prefilled in chunks or in one piece."""
    length = bench.size(1500, 200)
    whole = EngineClient(bench, paths, max_num_seqs=len(refs), max_batch_tokens=4096)
    for _ in range(NUM_WARM_UPS):
        whole.burst(bench.prompts(generator, len(refs), 16), bench.size(32, 4), refs)
    rounds = min(bench.repeats, MAX_ROUNDS)
    runs = [
        [_disturbed(bench, some, refs, generator, num_tokens) for _ in range(rounds)]
        for some, num_tokens in ((client, 0), (client, length), (whole, length))
    ]
    alone, chunked, one_piece = ([percentile(gaps, 99) for gaps in way] for way in runs)
    name = f"inter-token p99 of {counted(len(_readers(refs)), 'reader')}"
    yield figure(f"{name}, undisturbed", "ms", (1000 * value for value in alone))
    yield figure(f"{name}, a prompt of {length} in chunks", "ms", (1000 * value for value in chunked))
    yield figure(f"{name}, a prompt of {length} in one piece", "ms", (1000 * value for value in one_piece))


def _readers(refs: Sequence[AdapterRef]) -> Sequence[AdapterRef]:
    return refs[: max(1, len(refs) // 4)]


def _disturbed(
    bench: Bench, client: EngineClient, refs: Sequence[AdapterRef], generator: random.Random, length: int
) -> list[float]:
    """Gaps of those who read, from the long prompt's arrival to its first token; or of as many steps."""
    readers = _readers(refs)
    traces = [
        client.ask(prompt, bench.size(48, 16), ref)
        for prompt, ref in zip(bench.prompts(generator, len(readers), 16), readers, strict=True)
    ]
    client.step_while(lambda: not all(len(trace.times) >= 4 for trace in traces))
    start = max(trace.times[-1] for trace in traces)
    end = float("inf")
    if length:
        long = client.ask(bench.prompts(generator, 1, length)[0], 1)
        client.step_while(lambda: not long.times)
        end = long.times[-1]
    client.finish()
    return [gap for trace in traces for gap in trace.gaps(start, end)]
