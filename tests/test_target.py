"""Who is the user, and never two of them."""

from __future__ import annotations

from typing import Any

import pytest

from tunefleet.errors import AdapterNotFound, RequestInvalid
from tunefleet.target import Choice, Target, choose_user

BASES = ("tiny", "quickstart")


def choose(own: str | None = None, header: str | None = None, model: str | None = None) -> Choice:
    return choose_user(own=own, header=header, model=model, base_names=BASES)


@pytest.mark.parametrize(
    ("given", "user_id", "name"),
    [
        ({}, None, "default"),
        ({"model": "tiny"}, None, "default"),
        ({"model": "user:alice"}, "alice", "default"),
        ({"model": "user:alice/poems"}, "alice", "poems"),
        ({"model": "user:org:alice"}, "org:alice", "default"),
        ({"header": "alice", "model": "tiny"}, "alice", "default"),
        ({"header": "alice", "model": "user:alice/poems"}, "alice", "poems"),
        ({"own": "alice", "model": "tiny"}, "alice", "default"),
        ({"own": "alice", "header": "alice"}, "alice", "default"),
    ],
)
def test_the_user_is_found_in_the_contracts_order(
    given: dict[str, str], user_id: str | None, name: str
) -> None:
    assert choose(**given) == (user_id, name)


@pytest.mark.parametrize(
    "given",
    [
        {"own": "alice", "header": "bob"},
        {"own": "alice", "model": "user:bob"},
        {"header": "alice", "model": "user:bob"},
        {"header": "alice", "model": "user:Alice"},
    ],
)
def test_two_users_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(RequestInvalid) as caught:
        choose(**given)
    assert caught.value.code == "user_mismatch"


@pytest.mark.parametrize("model", ["gpt-4", "", "User:alice", "ft:tiny:x", "tiny "])
def test_a_model_nobody_knows_is_not_the_base(model: str) -> None:
    with pytest.raises(AdapterNotFound) as caught:
        choose(model=model)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    "user_id", ["", "..", "a/b", "a b", "é", "a\n", "x" * 129, "${HOME}", "a'--", "a\x00"]
)
def test_an_id_that_can_not_exist_is_refused(user_id: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        choose(header=user_id)
    assert caught.value.code == "invalid_user_id"


@pytest.mark.parametrize("name", ["", "Poems", "../x", "a/b"])
def test_a_name_that_can_not_exist_is_refused(name: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        choose(model=f"user:alice/{name}")
    assert caught.value.code == "invalid_adapter_name"


@pytest.mark.parametrize(
    "change",
    [
        *({"version": 0}, {"version": True}, {"fallback": "best"}, {"user_id": "/"}),
        *({"user_id": None, "version": 1}, {"user_id": None, "name": "poems"}),
    ],
)
def test_library_calls_are_checked_too(change: dict[str, Any]) -> None:
    with pytest.raises(RequestInvalid):
        Target("alice")._replace(**change).checked()
