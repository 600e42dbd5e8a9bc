"""An engine in this process, driven as its replica drives it: the model's own speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tests.benchmarks.adapters import GIB
from tests.benchmarks.bench import Bench, greedy
from tests.benchmarks.traces import Trace

from tunefleet.core import AdapterRef
from tunefleet.messages import Submit
from tunefleet.runtime.engine import Engine, EngineLimits
from tunefleet.runtime.model import load_model

NUM_WARM_UPS = 2  # runs that aren't counted


class EngineClient:
    """Asks one engine, and hands it the prepared file of every adapter that it asks for."""

    def __init__(self, bench: Bench, paths: Mapping[str, Path], **limits: int) -> None:
        defaults = {"max_model_len": min(2048, bench.manifest.max_model_len), "device_adapter_bytes": 2 * GIB}
        if bench.quick:
            defaults["device_adapter_bytes"] = GIB // 64
        self.engine = Engine(
            load_model(bench.base_dir),
            bench.manifest,
            EngineLimits(**{**defaults, **limits}),
            time.monotonic,
            torch.device("cpu"),
        )
        while self.engine.improve():
            pass  # as a replica does between its first steps
        self._paths = paths
        self._traces: dict[str, Trace] = {}
        self._num_asked = 0

    def ask(
        self, prompt: tuple[int, ...], num_tokens: int, adapter: AdapterRef | None = None, user: str = ""
    ) -> Trace:
        """Queues a request. Each is another user's, unless ``user`` says whose."""
        self._num_asked += 1
        request_id = str(self._num_asked)
        work = Submit(
            request_id=request_id,
            prompt=prompt,
            sampling=greedy(num_tokens),
            adapter=adapter,
            user_id=user or f"user-{request_id}",
        )
        trace = self._traces[request_id] = Trace(len(prompt), time.perf_counter())
        self.engine.add(work)
        return trace

    def step(self) -> None:
        news = self.engine.step()
        now = time.perf_counter()
        for progress in news:
            self._traces[progress.request_id].take(progress, now)
            if progress.finish_reason is not None:
                del self._traces[progress.request_id]
        for ref in self.engine.missing_adapters():
            self.engine.adapter_loaded(ref.digest, self._paths[ref.digest], 0.0, 0.0)

    def finish(self) -> None:
        self.step_while(lambda: bool(self._traces))

    def step_while(self, condition: Callable[[], bool]) -> None:
        while condition():
            self.step()

    def burst(
        self,
        prompts: Sequence[tuple[int, ...]],
        num_tokens: int,
        adapters: Sequence[AdapterRef | None] | None = None,
    ) -> list[Trace]:
        """All at once, until all are answered."""
        traces = [
            self.ask(prompt, num_tokens, adapter)
            for prompt, adapter in zip(prompts, adapters or [None] * len(prompts), strict=True)
        ]
        self.finish()
        return traces
