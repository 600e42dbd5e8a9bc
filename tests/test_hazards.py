"""The table of bad inputs and faults is whole: each variant has a test, and every test it names is there."""

from __future__ import annotations

from pathlib import Path

import pytest

import hazards
from hazard_table import WITHSTOOD
from hazards import Withstood, variants, without_test

LISTED = {"A": 30, "B": 47, "C": 15, "D": 20, "E": 20, "H": 16, "I": 11}
"""How many variants each family has at least."""


@pytest.mark.parametrize(("family", "number"), LISTED.items())
def test_every_family_lists_its_variants(family: str, number: int) -> None:
    assert number <= len(WITHSTOOD[family])


def test_every_variant_names_tests_of_files_that_are_there() -> None:
    here = Path(__file__).parent
    named = {test.partition("::")[0] for variant in variants() for test in variant.tests}
    assert set() == {file for file in named if not (here / file).is_file()}
    assert all(variant.tests for variant in variants())


def test_every_test_that_a_variant_names_is_there(request: pytest.FixtureRequest) -> None:
    """Of the files that this run has collected whole: in a full run, of all."""
    plugin = request.config.pluginmanager.get_plugin("hazards")
    assert isinstance(plugin, Withstood)
    if any("::" in argument for argument in request.config.args):
        return
    assert without_test(plugin.collected) == []


def test_a_test_that_is_gone_is_noticed() -> None:
    nodes = [f"tests/{test}" for variant in variants() for test in variant.tests]
    assert without_test(nodes) == []
    gone = next(variants())
    missing = [node for node in nodes if not gone.is_met_by(node)]
    assert len(gone.tests) == len(without_test(missing))
    assert without_test([]) == []


def test_generated_examples_are_counted_and_the_same_in_every_run() -> None:
    from hypothesis import strategies as st

    runs: list[list[int]] = []
    for _ in range(2):
        seen: list[int] = []
        hazards.generate("test", 20, seen.append, st.integers())
        runs.append(seen)
    assert runs[0] == runs[1]
    assert hazards.GENERATED.pop("test") == len(runs[0]) + len(runs[1])
