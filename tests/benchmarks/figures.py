"""What a benchmark measures: a figure is one line of the table, with every run's value and maybe a bar."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tests.benchmarks.bench import Bench


class Bar(NamedTuple):
    """What a figure's median must reach."""

    limit: float
    is_floor: bool

    def reached(self, value: float) -> bool:
        return value >= self.limit if self.is_floor else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.is_floor else '<='} {self.limit:g}"


def at_least(limit: float) -> Bar:
    return Bar(limit, is_floor=True)


def at_most(limit: float) -> Bar:
    return Bar(limit, is_floor=False)


@dataclasses.dataclass(frozen=True)
class Figure:
    """One thing that was measured, in one or several runs.

    Args:
        unit: of each value; "x" for a ratio within one run.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    bar: Bar | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"{self.name}: nothing was measured")

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def is_reached(self) -> bool | None:
        """None without a bar."""
        return None if self.bar is None else self.bar.reached(self.median)


Family = Callable[[Bench], Iterable[Figure]]


def figure(
    name: str, unit: str, values: Iterable[float], *, bar: Bar | None = None, note: str = ""
) -> Figure:
    return Figure(name, unit, tuple(values), bar, note)


def ratios(
    name: str, values: Iterable[float], references: Iterable[float], bar: Bar | None = None, *, note: str = ""
) -> Figure:
    """Run by run: both were measured beside each other."""
    pairs = zip(values, references, strict=True)
    return figure(name, "x", (value / reference for value, reference in pairs), bar=bar, note=note)


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that ``percent`` of all don't exceed."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    index = max(0, -int(-len(ordered) * percent // 100) - 1)
    return ordered[index]
