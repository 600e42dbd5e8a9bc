"""Which test withstands which bad input or fault, and how many ran.

``WITHSTOOD`` names, for each variant of each family, the tests that meet it, by the beginning of their node
ids. ``Withstood`` is a pytest plugin that counts them, and what the generated tests made, at the end of a
run; tests/test_hazards.py fails when a variant names a test that isn't there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

GENERATED: Counter[str] = Counter()
"""Examples that generated tests ran, by family."""


def examples(number: int) -> pytest.MarkDecorator:
    """Runs a test with ``num_examples``: that many, and ten times as many among the slow tests."""
    return pytest.mark.parametrize(
        "num_examples", [number, pytest.param(10 * number, marks=pytest.mark.slow)]
    )


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
