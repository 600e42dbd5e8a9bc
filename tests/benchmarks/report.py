"""The table that ``make bench`` prints, and its JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.figures import Figure

PACKAGES = ("torch", "transformers", "peft", "numpy", "safetensors")
Families = Mapping[str, Sequence[Figure]]

_COLUMNS = f"{'median':>9} {'min':>9} {'max':>9} {'runs':>4}  {'unit':<11}"


def machine() -> dict[str, str]:
    """What the figures depend on, by name."""
    return {
        "cpu": _cpu(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory_gb": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f}",
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": commit(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def commit() -> str:
    """Short hash of the checkout, with a plus where files have changed; empty outside of one."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def table(families: Families) -> str:
    """One table, a block of lines per family."""
    width = max((len(figure.name) for figures in families.values() for figure in figures), default=0)
    lines = [f"{'':<{width}}  {_COLUMNS} bar"]
    for family, figures in families.items():
        lines += ["", family.replace("_", " ")]
        lines += [_line(figure, width) for figure in figures]
    return "\n".join(lines)


def missed(families: Families) -> list[str]:
    """Names of the figures that don't reach their bar."""
    return [figure.name for figures in families.values() for figure in figures if figure.is_reached is False]


def as_json(
    bench: Bench, families: Families, seconds: Mapping[str, float], failures: Mapping[str, str]
) -> str:
    """All values of all figures, how long each family took, and what those that failed raised."""
    report = {
        "machine": machine(),
        "base": bench.manifest.base_id,
        "dtype": bench.manifest.dtype,
        "repeats": bench.repeats,
        "quick": bench.quick,
        "families": {family: [_fields(figure) for figure in figures] for family, figures in families.items()},
        "seconds": dict(seconds),
        "failures": dict(failures),
    }
    return json.dumps(report, indent=2)


def _line(figure: Figure, width: int) -> str:
    numbers = (figure.median, min(figure.values), max(figure.values))
    shown = " ".join(f"{number(value):>9}" for value in numbers)
    line = f"{figure.name:<{width}}  {shown} {len(figure.values):>4}  {figure.unit:<11}"
    if figure.bar is not None:
        line += f" {figure.bar} {'reached' if figure.is_reached else 'NOT REACHED'}"
    if figure.note:
        line += f" ({figure.note})"
    return line.rstrip()


def number(value: float) -> str:
    """Three digits that count, no exponents."""
    size = abs(value)
    if size >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3f}" if size < 1 else f"{value:.2f}" if size < 10 else f"{value:.1f}"


def _fields(figure: Figure) -> dict[str, object]:
    return {
        **dataclasses.asdict(figure),
        "bar": str(figure.bar) if figure.bar else None,
        "median": figure.median,
        "reached": figure.is_reached,
    }


def _cpu() -> str:
    lines: Iterable[str] = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
