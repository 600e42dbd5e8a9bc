"""Which test withstands which bad input or fault, and how many ran.

``WITHSTOOD`` names, for each variant of each family, tests by the beginning of their node ids, without the
folder. ``Withstood`` is a pytest plugin that prints at the end of a run how many variants were met and how
many inputs the generated tests made; tests/test_hazards.py fails when a variant names a test that isn't
there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hazard_table import WITHSTOOD

GENERATED: Counter[str] = Counter()
"""Examples that generated tests ran, by family."""


def examples(number: int) -> pytest.MarkDecorator:
    """Runs a test with ``num_examples``: that many, and ten times as many among the slow tests."""
    thorough = pytest.param(10 * number, marks=pytest.mark.slow)
    return pytest.mark.parametrize("num_examples", [number, thorough])


def generate(
    family: str, num_examples: int, check: Callable[..., None], *strategies: st.SearchStrategy[Any]
) -> None:
    """Calls ``check`` with that many generated arguments, the same ones in every run."""

    @settings(max_examples=num_examples, derandomize=True, deadline=None, database=None)
    @given(st.tuples(*strategies))
    def run(arguments: tuple[Any, ...]) -> None:
        GENERATED[family] += 1
        check(*arguments)

    run()


class Variant(NamedTuple):
    family: str
    name: str
    tests: tuple[str, ...]

    def is_met_by(self, node: str) -> bool:
        return node.removeprefix("tests/").startswith(self.tests)


def variants() -> Iterator[Variant]:
    for family, tests_by_name in WITHSTOOD.items():
        for name, tests in tests_by_name.items():
            yield Variant(family, name, (tests,) if isinstance(tests, str) else tests)


def without_test(nodes: Iterable[str]) -> list[str]:
    """Tests that a variant names and ``nodes`` lacks, of those files of which ``nodes`` has any."""
    names = [node.removeprefix("tests/") for node in nodes]
    files = {name.partition("::")[0] for name in names}
    return [
        f"{variant.family}: {variant.name}: {test}"
        for variant in variants()
        for test in variant.tests
        if test.partition("::")[0] in files and not any(name.startswith(test) for name in names)
    ]


class Withstood:
    """Counts what ran. One per run; register it in ``pytest_configure``."""

    def __init__(self) -> None:
        self.collected: list[str] = []
        self._passed: list[str] = []
        self._failed: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.collected = [item.nodeid for item in items]  # before markers take some away

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self._passed.append(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """In a process of several that share the tests: its part of what was generated."""
        workeroutput: dict[str, object] | None = getattr(session.config, "workeroutput", None)
        if workeroutput is not None:
            workeroutput["generated"] = dict(GENERATED)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        GENERATED.update(getattr(node, "workeroutput", {}).get("generated", {}))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        families = [text for family in WITHSTOOD if (text := self._counted(family))]
        if families:
            terminalreporter.write_line(f"hazards withstood: {'; '.join(families)}")

    def _counted(self, family: str) -> str:
        """E.g. ``A 34 of 34 variants in 120 tests, 4,000 generated``; nothing if none of it ran."""
        known = [variant for variant in variants() if variant.family == family]
        met = [
            variant
            for variant in known
            if any(map(variant.is_met_by, self._passed)) and not any(map(variant.is_met_by, self._failed))
        ]
        tests = {node for node in self._passed if any(variant.is_met_by(node) for variant in known)}
        if not tests and not GENERATED[family]:
            return ""
        generated = f", {GENERATED[family]:,} generated" if GENERATED[family] else ""
        return f"{family} {len(met)} of {len(known)} variants in {len(tests)} tests{generated}"
