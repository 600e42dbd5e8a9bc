"""A router's metrics of its requests. Names follow vLLM's, so that its dashboards need only another prefix.

No label names a tenant, a user or an adapter: who used what is the ledger's to tell.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tunefleet.core import FinishReason, Usage
from tunefleet.errors import TunefleetError
from tunefleet.machine_metrics import PREFIX, MachineMetrics
from tunefleet.open_requests import OpenRequests

_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0),
)
_STAGE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 60.0)
_INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0)
_REQUEST_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0)
_TOKENS = tuple(4**exponent for exponent in range(9))  # as OpenTelemetry's gen_ai.client.token.usage


class Metrics:
    """All of one router; lives as long as its fleet is open, in a registry of its own."""

    def __init__(self, open_requests: OpenRequests) -> None:
        self.registry = CollectorRegistry()
        self.requests = RequestMetrics(self.registry, open_requests)
        self.machine = MachineMetrics(self.registry)


class RequestMetrics:
    """Inference requests and warmups. Recording costs some microseconds per token."""

    def __init__(self, registry: CollectorRegistry, open_requests: OpenRequests) -> None:
        make = _Maker(registry)
        waiting = make.gauge("num_requests_waiting", "Requests of this router without a token yet.")
        waiting.set_function(lambda: open_requests.num_waiting)
        running = make.gauge("num_requests_running", "Requests of this router that are being answered.")
        running.set_function(lambda: len(open_requests) - open_requests.num_waiting)
        self.counts = _Counters(make)
        self.times = _Histograms(make)

    def refusals(self) -> AbstractContextManager[None]:
        """Counts an error of ours that leaves the block, as that of a request without a token."""
        return _errors(self.rejected)

    def rejected(self, error: TunefleetError) -> None:
        self.counts.rejected.labels(error.code).inc()

    def record(self, started_at: float, *, has_adapter: bool) -> RequestRecord:
        """Of a request that was accepted.

        Args:
            started_at: by perf_counter.
        """
        return RequestRecord(self, started_at, has_adapter=has_adapter)


class RequestRecord:
    """One accepted request, until it ends: of several ends the first counts."""

    def __init__(self, metrics: RequestMetrics, started_at: float, *, has_adapter: bool) -> None:
        self._metrics = metrics
        self._counts = metrics.counts
        self._times = metrics.times
        self._started_at = started_at
        self._has_adapter = has_adapter
        self._first_token_s: float | None = None
        self._told_at: dict[int, float] = {}  # choice -> when its latest tokens came
        self._is_over = False

    def began(
        self, timing: Mapping[str, float], num_prompt: int, num_cached: int, *, adapter_cold: bool
    ) -> None:
        """Its first token is there.

        Args:
            timing: stages in seconds, as in ``Served.timing``.
        """
        self._first_token_s = timing["first_token"]
        self._times.first_token.observe(timing["first_token"])
        self._times.queue.observe(timing["queue"])
        self._times.prefill.observe(timing["prefill"])
        if timing["wake"]:
            self._times.wake.observe(timing["wake"])
        self._counts.prompt_tokens.inc(num_prompt)
        self._counts.prefix_queries.inc(num_prompt)
        self._counts.prefix_hits.inc(num_cached)
        if self._has_adapter:
            self._count_tiers(timing, adapter_cold=adapter_cold)

    def generated(self, choice: int, num_tokens: int) -> None:
        """A step gave a choice so many tokens; 0: none."""
        if not num_tokens:
            return
        now = time.perf_counter()
        told_at = self._told_at.get(choice)
        self._told_at[choice] = now
        self._counts.generated.inc(num_tokens)
        if told_at is not None:
            self._times.inter_token.observe(now - told_at)

    def ended(self, reason: FinishReason, usage: Usage) -> None:
        """It has its last token, or nobody wants more."""
        if self._is_over:
            return
        self._is_over = True
        self._counts.ended.labels(reason.value).inc()
        if reason in {FinishReason.STOP, FinishReason.LENGTH}:
            elapsed_s = time.perf_counter() - self._started_at
            self._times.request.observe(elapsed_s)
            self._times.decode.observe(elapsed_s - (self._first_token_s or 0.0))
            self._times.num_prompt.observe(usage.prompt_tokens)
            self._times.num_generated.observe(usage.completion_tokens)

    def failures(self) -> AbstractContextManager[None]:
        """Counts an error of ours that leaves the block."""
        return _errors(self._failed)

    def _failed(self, error: TunefleetError) -> None:
        if self._is_over:
            return
        self._is_over = True
        if self._first_token_s is None:
            self._metrics.rejected(error)
        else:
            self._counts.ended.labels(FinishReason.ERROR.value).inc()

    def _count_tiers(self, timing: Mapping[str, float], *, adapter_cold: bool) -> None:
        """Down to the tier that had the adapter; a stage that took no time was not needed."""
        missed = {
            "device": adapter_cold,
            "host": timing["load"] > 0 or timing["download"] > 0,
            "disk": timing["download"] > 0,
        }
        for tier, is_miss in missed.items():
            (self._counts.misses if is_miss else self._counts.hits).labels(tier).inc()
            if not is_miss:
                break
        for stage in ("download", "load", "activate") if adapter_cold else ():
            if timing[stage]:
                self._times.load.labels(stage).observe(timing[stage])


@contextlib.contextmanager
def _errors(count: Callable[[TunefleetError], None]) -> Iterator[None]:
    """Has those of ours that leave the block counted."""
    try:
        yield
    except TunefleetError as error:
        count(error)
        raise


class _Counters:
    def __init__(self, make: _Maker) -> None:
        self.rejected = make.counter(
            "requests_rejected", "Requests that failed before their first token, by error code.", "reason"
        )
        self.ended = make.counter(
            "request_success",
            "Requests that ended: stop, length; cancelled by their client; error after the first token.",
            "finished_reason",
        )
        self.prompt_tokens = make.counter("prompt_tokens", "Of requests that got a token, cached ones too.")
        self.generated = make.counter("generation_tokens", "Tokens that were generated.")
        self.prefix_queries = make.counter("prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self.prefix_hits = make.counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        self.hits = make.counter("adapter_cache_hits", "Requests whose adapter was in this tier.", "tier")
        self.misses = make.counter(
            "adapter_cache_misses", "Requests whose adapter came from below this tier.", "tier"
        )


class _Histograms:
    def __init__(self, make: _Maker) -> None:
        self.first_token = make.histogram(
            "time_to_first_token_seconds", "From accepting a request to its first token.", _FIRST_TOKEN_S
        )
        self.inter_token = make.histogram(
            "inter_token_latency_seconds", "Between two tokens of a sequence.", _INTER_TOKEN_S
        )
        self.request = make.histogram(
            "e2e_request_latency_seconds", "From accepting a request to its last token.", _REQUEST_S
        )
        self.decode = make.histogram(
            "request_decode_time_seconds", "From a request's first token to its last.", _REQUEST_S
        )
        self.queue = make.histogram(
            "request_queue_time_seconds", "In a replica, until it joined the batch.", _STAGE_S
        )
        self.prefill = make.histogram(
            "request_prefill_time_seconds", "From joining the batch to the first token.", _STAGE_S
        )
        self.wake = make.histogram(
            "request_wake_time_seconds",
            "Held for a replica, by who came when none was ready.",
            _FIRST_TOKEN_S,
        )
        self.load = make.histogram(
            "adapter_load_seconds", "What a request waited for its adapter, by stage.", _STAGE_S, "stage"
        )
        self.num_prompt = make.histogram("request_prompt_tokens", "Of one request.", _TOKENS)
        self.num_generated = make.histogram("request_generation_tokens", "Of one request.", _TOKENS)


class _Maker:
    """Metrics in one registry under our prefix."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def gauge(self, name: str, doc: str) -> Gauge:
        return Gauge(name, doc, namespace=PREFIX, registry=self._registry)

    def counter(self, name: str, doc: str, *labels: str) -> Counter:
        return Counter(name, doc, labels, namespace=PREFIX, registry=self._registry)

    def histogram(self, name: str, doc: str, buckets: Iterable[float], *labels: str) -> Histogram:
        return Histogram(name, doc, labels, namespace=PREFIX, buckets=tuple(buckets), registry=self._registry)
