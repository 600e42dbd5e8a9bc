"""When each token of a request came, seen by the one who asked, and what follows from that."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from tests.benchmarks.figures import percentile

from tunefleet.messages import Progress, Timing


@dataclasses.dataclass
class Trace:
    """One request. Seconds of one clock."""

    num_prompt_tokens: int
    asked_at: float
    times: list[float] = dataclasses.field(default_factory=list)  # one per token
    tokens: list[int] = dataclasses.field(default_factory=list)
    timing: Timing | None = None

    def take(self, progress: Progress, now: float) -> None:
        assert not progress.error, progress.error
        self.tokens += progress.tokens
        self.times += [now] * len(progress.tokens)
        self.timing = progress.timing or self.timing

    @property
    def ttft(self) -> float:
        return self.times[0] - self.asked_at

    def gaps(self, start: float = float("-inf"), end: float = float("inf")) -> list[float]:
        """Between one token and the next, of those that ended within a time."""
        return [
            later - earlier
            for earlier, later in zip(self.times, self.times[1:], strict=False)
            if start <= later <= end
        ]


def tokens_per_s(traces: Sequence[Trace]) -> float:
    """Answer tokens, from the first request to the last token."""
    seconds = max(trace.times[-1] for trace in traces) - min(trace.asked_at for trace in traces)
    return sum(len(trace.times) for trace in traces) / seconds


def prefill_tokens_per_s(traces: Sequence[Trace]) -> float:
    """Prompt tokens until the last first token; sequences that came first decode beside that already."""
    seconds = max(trace.times[0] for trace in traces) - min(trace.asked_at for trace in traces)
    return sum(trace.num_prompt_tokens for trace in traces) / seconds


def decode_tokens_per_s(traces: Sequence[Trace]) -> float:
    """Answer tokens after the last first token, while all sequences run."""
    start = max(trace.times[0] for trace in traces)
    end = min(trace.times[-1] for trace in traces)
    return sum(sum(start < time <= end for time in trace.times) for trace in traces) / (end - start)


def ttft(traces: Iterable[Trace], percent: float) -> float:
    return percentile((trace.ttft for trace in traces), percent)


def gap(traces: Iterable[Trace], percent: float) -> float:
    return percentile((gap for trace in traces for gap in trace.gaps()), percent)
