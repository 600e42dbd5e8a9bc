"""``make bench``: prints one table, and writes it as JSON with a picture per family to build/bench."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.benchmarks import limits, report
from tests.benchmarks.bases import manifest_of, quickstart_base, tiny_base
from tests.benchmarks.bench import Bench
from tests.benchmarks.families import FAMILIES
from tests.benchmarks.figures import Family, Figure
from tests.benchmarks.plots import plot
from transformers.utils import logging

from tunefleet.runtime.environ import ENVIRON

OUT = Path("build/bench")
_DURATION = "All of it takes about 30 minutes on 2 cores."
_QUICK = "A quick run on a tiny base: it shows that all works; the figures say nothing."


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 where a family failed. A bar that isn't reached is in the table, and no failure."""
    parser = _parser()
    options = parser.parse_args(arguments)
    unknown = [name for name in options.families if name not in FAMILIES]
    if unknown:
        parser.error(f"no family is called {unknown[0]}; there are {', '.join(FAMILIES)}")
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks for it
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory(prefix="tunefleet-bench-") as name:
        folder = Path(name)
        base_dir = tiny_base(folder / "base") if options.quick else quickstart_base()
        repeats = 1 if options.quick else options.repeats
        bench = Bench(base_dir, manifest_of(base_dir), folder, repeats, options.quick)
        names = options.families or list(FAMILIES)
        return run(bench, {name: FAMILIES[name] for name in names}, options.out)


def run(bench: Bench, families: Mapping[str, Family], out: Path) -> int:
    """Measures these families, one after another; what one fails with keeps no other from being measured."""
    print(_head(bench), flush=True)
    block_mb = bench.size(512, 8)
    stem = f"{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}-{report.commit() or 'nocommit'}"
    measured: list[limits.Limits] = []
    found: dict[str, list[Figure]] = {}
    failures: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for name, measure in families.items():
        measured.append(limits.measure(block_mb))
        started = time.monotonic()
        try:
            found[name] = list(measure(bench))
        except Exception:  # the other families are worth having; the exit code tells
            failures[name] = traceback.format_exc()
        seconds[name] = time.monotonic() - started
        print(f"  {name}: {seconds[name]:.0f} s", flush=True)
        _write(report.as_json(bench, found, seconds, failures), out / f"{stem}.json")  # however the rest ends
    found = {"machine": list(limits.figures([*measured, limits.measure(block_mb)])), **found}
    print(f"\n{report.table(found)}\n")
    _write(report.as_json(bench, found, seconds, failures), out / f"{stem}.json")
    for name, figures in found.items():
        plot(name, figures, out / f"{stem}-{name}.png")
    print(f"written: {out / stem}.json, and a picture per family beside it")
    for name in report.missed(found):
        print(f"NOT REACHED: {name}")
    for name, trace in failures.items():
        print(f"FAILED: {name}\n{trace}")
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tests.benchmarks", description=__doc__)
    parser.add_argument("families", nargs="*", help=f"some of {', '.join(FAMILIES)}; else all")
    parser.add_argument(
        "--repeats", type=int, default=5, help="runs of what is quick; the rest runs less often"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny base, one short run: does it work?")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of JSON and pictures")
    return parser


def _head(bench: Bench) -> str:
    found = report.machine()
    return (
        f"{found['cpu']}, {found['cores']} cores; torch {found['torch']}, transformers "
        f"{found['transformers']}, peft {found['peft']}; {bench.manifest.base_id} in {bench.manifest.dtype}; "
        f"commit {found['commit']}\n"
        + (_QUICK if bench.quick else f"Medians of up to {bench.repeats} runs. {_DURATION}")
    )


def _write(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    if not ENVIRON.keys() <= os.environ.keys():  # what a replica has, and must be there before torch is
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**ENVIRON, **os.environ})
    raise SystemExit(main())
