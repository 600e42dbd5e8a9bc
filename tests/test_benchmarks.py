"""The benchmarks run to their end and tell what they found; on a tiny base their figures say nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.benchmarks import report
from tests.benchmarks.__main__ import main, run
from tests.benchmarks.bases import manifest_of, tiny_base
from tests.benchmarks.bench import Bench
from tests.benchmarks.families import FAMILIES
from tests.benchmarks.figures import Figure, at_least, at_most, figure, percentile, ratios
from tests.benchmarks.traces import Trace, decode_tokens_per_s, prefill_tokens_per_s, tokens_per_s, ttft

IN_THIS_PROCESS = ["throughput", "latency", "agreement", "router", "lookup"]
WITH_A_MACHINE = ["working_set", "storm", "open_loop", "waking", "recovery", "memory"]
OVER_S3 = ["renewal", "store"]


def test_families_in_this_process_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--out", str(tmp_path), *IN_THIS_PROCESS]) == 0
    printed = capsys.readouterr().out
    written = _written(tmp_path)
    assert ["machine", *IN_THIS_PROCESS] == list(written["families"])
    for family, figures in written["families"].items():
        assert len(list(tmp_path.glob(f"*-{family}.png"))) == 1
        assert figures
        assert all(found["name"] in printed for found in figures)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_families_on_a_machine_run(tmp_path: Path) -> None:
    assert main(["--quick", "--out", str(tmp_path), *WITH_A_MACHINE]) == 0
    families = _written(tmp_path)["families"]
    assert ["machine", *WITH_A_MACHINE] == list(families)
    without_slot = [found["median"] for found in families["working_set"] if found["unit"] == "%"]
    assert without_slot == [100.0, 100.0]  # each request is another person's


@pytest.mark.slow
@pytest.mark.s3
def test_families_over_s3_run(tmp_path: Path) -> None:
    assert main(["--quick", "--out", str(tmp_path), *OVER_S3]) == 0


def test_every_family_is_run_by_a_test() -> None:
    assert {*IN_THIS_PROCESS, *WITH_A_MACHINE, *OVER_S3} == set(FAMILIES)


def test_a_family_that_fails_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(bench: Bench) -> Iterator[Figure]:
        yield figure("width", "m", [1])
        raise RuntimeError("the ruler is gone")

    def sound(bench: Bench) -> Iterator[Figure]:
        yield figure("length", "m", [2, 1, 3])

    base_dir = tiny_base(tmp_path / "base")
    bench = Bench(base_dir, manifest_of(base_dir), tmp_path, repeats=1, quick=True)
    assert run(bench, {"broken": broken, "sound": sound}, tmp_path) == 1
    printed = capsys.readouterr().out
    assert "FAILED: broken" in printed
    written = _written(tmp_path)
    assert list(written["families"]) == ["machine", "sound"]
    assert "the ruler is gone" in written["failures"]["broken"]


def test_the_table_shows_each_figure_with_its_bar() -> None:
    families = {
        "speed": [figure("walk", "km/h", [5, 4, 6]), figure("run", "km/h", [12.5], bar=at_least(13))],
        "long_way": [figure("steps", "steps", [1234], bar=at_most(2000), note="counted")],
    }
    expected = """\
          median       min       max runs  unit        bar

speed
walk           5         4         6    3  km/h
run         12.5      12.5      12.5    1  km/h        >= 13 NOT REACHED

long way
steps      1,234     1,234     1,234    1  steps       <= 2000 reached (counted)"""
    assert expected == report.table(families)
    assert report.missed(families) == ["run"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.0123, "0.012"), (0.5, "0.500"), (3.14159, "3.14"), (31.4159, "31.4"), (31415.9, "31,416")],
)
def test_numbers_have_three_digits_that_count(value: float, shown: str) -> None:
    assert shown == report.number(value)


def test_a_bar_is_reached_by_the_median() -> None:
    assert figure("", "", [1, 9, 9], bar=at_least(9)).is_reached is True
    assert figure("", "", [1, 9, 9], bar=at_most(8)).is_reached is False
    assert figure("", "", [1]).is_reached is None


def test_ratios_are_within_one_run() -> None:
    assert ratios("", [10, 1], [5, 2]).values == (2.0, 0.5)


def test_percentiles() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, percent) for percent in (1, 50, 99, 100)] == [1.0, 50.0, 99.0, 100.0]
    assert percentile([7.0], 99) == 7.0


def test_rates_of_traces() -> None:
    """Two prompts of 10 tokens, first tokens after 1 and 2 s, then a token per second each."""
    traces = [Trace(10, 0.0, [1.0, 2.0, 3.0, 4.0]), Trace(10, 0.0, [2.0, 3.0, 4.0])]
    assert tokens_per_s(traces) == 7 / 4
    assert prefill_tokens_per_s(traces) == 20 / 2
    assert decode_tokens_per_s(traces) == 4 / 2
    assert ttft(traces, 99) == 2.0
    assert traces[0].gaps(2.5) == [1.0, 1.0]


def _written(folder: Path) -> Any:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())
