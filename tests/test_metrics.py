"""A router's metrics are what happened to its requests, whoever asked, and name nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from router_kit import HELLO, Kit, run_async
from tunefleet.core import FinishReason, Usage
from tunefleet.errors import AdapterNotFound, CapacityError, ReplicaError
from tunefleet.fleet import Fleet
from tunefleet.messages import Progress, Submit, Timing
from tunefleet.metrics import Metrics, RequestRecord
from tunefleet.open_requests import OpenRequests
from tunefleet.runtime.fakes import FakeDispatcher, FakeRun

TIMING = {
    "queue": 0.01,
    "wake": 0.0,
    "download": 0.0,
    "load": 0.0,
    "activate": 0.0,
    "prefill": 0.02,
    "first_token": 0.04,
}


class Readings:
    """Samples of a registry by name; 0 where there is none yet."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def __call__(self, name: str, **labels: str) -> float:
        return self._registry.get_sample_value(f"tunefleet_{name}", labels) or 0.0


def readings(fleet: Fleet) -> Readings:
    return Readings(fleet.generations.metrics.registry)


def recorded(*, has_adapter: bool) -> tuple[RequestRecord, Readings]:
    metrics = Metrics(OpenRequests())
    record = metrics.requests.record(time.perf_counter(), has_adapter=has_adapter)
    return record, Readings(metrics.registry)


@run_async
async def test_an_answer_counts_its_tokens_its_times_and_how_it_ended(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        answer = await fleet.chat(None, HELLO)
        read = readings(fleet)
    assert answer.usage.prompt_tokens == read("prompt_tokens_total")
    assert answer.usage.completion_tokens == read("generation_tokens_total")
    assert read("inter_token_latency_seconds_count") == answer.usage.completion_tokens - 1
    assert read("request_success_total", finished_reason="stop") == 1
    for name in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
    ):
        assert read(f"{name}_count") == 1, name
    assert read("time_to_first_token_seconds_sum") == answer.timing["first_token"]
    assert read("e2e_request_latency_seconds_sum") > answer.timing["first_token"]


@run_async
async def test_each_choice_has_gaps_of_its_own_and_the_request_ends_once(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        answer = await fleet.chat(None, HELLO, n=3)
        read = readings(fleet)
    assert read("inter_token_latency_seconds_count") == answer.usage.completion_tokens - 3
    assert read("request_success_total", finished_reason="stop") == 1


@run_async
async def test_requests_wait_until_their_first_token_and_then_run(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    kit.dispatcher.gate = asyncio.Semaphore(0)
    async with kit.fleet() as fleet:
        read = readings(fleet)

        def now() -> tuple[float, float]:
            return read("num_requests_waiting"), read("num_requests_running")

        assert now() == (0, 0)
        stream = fleet.stream(None, HELLO)
        first = asyncio.ensure_future(anext(stream))
        while not kit.dispatcher.running:
            await asyncio.sleep(0)
        assert now() == (1, 0)
        kit.dispatcher.gate.release()
        await first
        assert now() == (0, 1)
        await stream.aclose()
        assert now() == (0, 0)
        assert read("request_success_total", finished_reason="cancelled") == 1
        assert read("e2e_request_latency_seconds_count") == 0


@run_async
async def test_a_refusal_is_counted_by_its_code_wherever_it_comes_from(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        with pytest.raises(AdapterNotFound):
            await fleet.chat("nobody", HELLO)
        kit.dispatcher.error = CapacityError("full", retry_after_s=3, code="queue_full")
        with pytest.raises(CapacityError):
            await fleet.chat(None, HELLO)
        read = readings(fleet)
    assert read("requests_rejected_total", reason="adapter_not_found") == 1
    assert read("requests_rejected_total", reason="queue_full") == 1
    assert sum(read("request_success_total", finished_reason=reason.value) for reason in FinishReason) == 0


class _Breaking(FakeRun):
    async def __aiter__(self) -> AsyncIterator[Progress]:
        yield Progress(request_id="r", tokens=(5,), timing=Timing())
        raise ReplicaError("it broke", code="replica_lost")


class _BreakingDispatcher(FakeDispatcher):
    def submit(self, work: Submit) -> FakeRun:
        return _Breaking(self, work)


@run_async
async def test_a_failure_after_the_first_token_is_no_refusal(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    kit.dispatcher = _BreakingDispatcher(kit.dispatcher.answer)
    async with kit.fleet() as fleet:
        with pytest.raises(ReplicaError):
            await fleet.chat(None, HELLO)
        read = readings(fleet)
    assert read("request_success_total", finished_reason="error") == 1
    assert read("requests_rejected_total", reason="replica_lost") == 0


@pytest.mark.parametrize(
    ("times", "cold", "expected"),
    [
        ({}, False, {"device": "hits"}),
        ({"activate": 0.1}, True, {"device": "misses", "host": "hits"}),
        ({"load": 0.1, "activate": 0.1}, True, {"device": "misses", "host": "misses", "disk": "hits"}),
        (
            {"download": 0.1, "load": 0.1, "activate": 0.1},
            True,
            {"device": "misses", "host": "misses", "disk": "misses"},
        ),
    ],
)
def test_an_adapter_hits_the_tier_that_it_came_from_and_misses_those_above(
    times: dict[str, float], cold: bool, expected: dict[str, str]
) -> None:
    record, read = recorded(has_adapter=True)
    record.began({**TIMING, **times}, 8, 0, adapter_cold=cold)
    found = {
        tier: kind
        for tier in ("device", "host", "disk")
        for kind in ("hits", "misses")
        if read(f"adapter_cache_{kind}_total", tier=tier)
    }
    assert expected == found
    for stage in ("download", "load", "activate"):
        assert read("adapter_load_seconds_count", stage=stage) == (stage in times)


def test_the_base_hits_no_tier() -> None:
    record, read = recorded(has_adapter=False)
    record.began(TIMING, 8, 6, adapter_cold=False)
    assert read("adapter_cache_hits_total", tier="device") == 0
    assert (read("prefix_cache_queries_total"), read("prefix_cache_hits_total")) == (8, 6)


def test_only_who_was_held_counts_as_woken() -> None:
    for wake_s, expected in ((0.0, 0), (0.3, 1)):
        record, read = recorded(has_adapter=False)
        record.began({**TIMING, "wake": wake_s}, 8, 0, adapter_cold=False)
        assert read("request_wake_time_seconds_count") == expected


def test_of_several_ends_the_first_counts() -> None:
    record, read = recorded(has_adapter=False)
    record.began(TIMING, 8, 0, adapter_cold=False)
    for reason in (FinishReason.LENGTH, FinishReason.CANCELLED, FinishReason.STOP):
        record.ended(reason, Usage(8, 3))
    with pytest.raises(ReplicaError), record.failures():
        raise ReplicaError("late")
    ends = {
        reason.value: read("request_success_total", finished_reason=reason.value) for reason in FinishReason
    }
    assert ends == {"length": 1, "stop": 0, "cancelled": 0, "error": 0}


@run_async
async def test_two_fleets_count_apart_and_no_label_names_anybody(tmp_path: Path) -> None:
    ours, theirs = Kit(tmp_path / "ours"), Kit(tmp_path / "theirs")
    async with ours.fleet() as fleet, theirs.fleet() as other:
        pushed = await fleet.adapters.push("alice", ours.adapter())
        await fleet.chat("alice", HELLO)
        assert readings(fleet)("request_success_total", finished_reason="stop") == 1
        assert readings(other)("request_success_total", finished_reason="stop") == 0
        shown: list[Any] = [
            value
            for family in fleet.generations.metrics.registry.collect()
            for sample in family.samples
            for value in sample.labels.values()
        ]
    assert "stop" in shown
    assert not {"alice", "default", pushed.digest} & set(shown)
