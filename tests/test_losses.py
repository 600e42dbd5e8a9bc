"""Who is to blame for a lost replica."""

from __future__ import annotations

import pytest

from tunefleet.errors import ReplicaError
from tunefleet.runtime.losses import MAX_REPLICA_LOSSES, Loss, Losses


@pytest.mark.parametrize(("loss", "is_suspect"), [(Loss.TOGETHER, True), (Loss.BESIDE, False)])
def test_whoever_was_in_the_last_step_is_a_suspect_until_a_new_token(loss: Loss, is_suspect: bool) -> None:
    losses = Losses()
    losses.note(loss)
    assert losses.is_suspect is is_suspect
    losses.clear()
    assert not losses.is_suspect


def test_anothers_trial_clears_nobody() -> None:
    losses = Losses()
    losses.note(Loss.TOGETHER)
    losses.note(Loss.BESIDE)
    assert losses.is_suspect


def test_the_second_death_alone_is_the_last_even_with_tokens_in_between() -> None:
    losses = Losses()
    losses.note(Loss.TOGETHER)
    losses.note(Loss.ALONE)
    assert losses.is_suspect
    losses.clear()
    losses.note(Loss.TOGETHER)
    with pytest.raises(
        ReplicaError, match="2 replicas ended while they computed this request alone"
    ) as error:
        losses.note(Loss.ALONE)
    assert error.value.code == "request_ends_replicas"


@pytest.mark.parametrize("loss", [Loss.TOGETHER, Loss.BESIDE])
def test_a_request_that_outlived_too_many_is_tried_no_more(loss: Loss) -> None:
    losses = Losses()
    for _ in range(MAX_REPLICA_LOSSES):
        losses.note(loss)
        losses.clear()
    with pytest.raises(ReplicaError, match="9 replicas") as error:
        losses.note(loss)
    assert error.value.code == "replica_lost"
