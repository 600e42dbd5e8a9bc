"""The scaler: enough replicas for the load, fewer only after an idle while."""

from __future__ import annotations

import pytest

from tunefleet.runtime.scaler import Load, wanted_replicas


@pytest.mark.parametrize(
    ("load", "wanted"),
    [
        (Load(0, 0, 99.0), 0),
        (Load(1, 0, 0.0), 1),
        (Load(8, 1, 0.0), 1),
        (Load(9, 1, 0.0), 2),
        (Load(100, 1, 0.0), 4),  # no more than max_replicas
        (Load(1, 3, 0.0), 3),  # busy: none is taken away
        (Load(0, 3, 9.9), 3),  # idle, but not for long enough
        (Load(0, 3, 10.0), 0),
    ],
)
def test_replicas_follow_the_load(load: Load, wanted: int) -> None:
    assert wanted == wanted_replicas(
        load, min_replicas=0, max_replicas=4, idle_timeout_s=10.0, target_concurrency=8
    )


@pytest.mark.parametrize(
    ("load", "wanted"),
    [(Load(0, 0, 0.0), 2), (Load(0, 4, 10.0), 2), (Load(17, 2, 0.0), 3), (Load(0, 5, 0.0), 4)],
)
def test_min_and_max_bound_every_answer(load: Load, wanted: int) -> None:
    assert wanted == wanted_replicas(
        load, min_replicas=2, max_replicas=4, idle_timeout_s=10.0, target_concurrency=8
    )


def test_without_an_idle_timeout_replicas_go_at_once() -> None:
    assert (
        wanted_replicas(
            Load(0, 1, 0.0), min_replicas=0, max_replicas=1, idle_timeout_s=0.0, target_concurrency=1
        )
        == 0
    )
