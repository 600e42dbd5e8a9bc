from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunefleet.adapters_store.holds import MAX_SHARE, Holds
from tunefleet.core import AdapterRef, PinTier
from tunefleet.messages import HeldAdapter


def held(digest: str, tier: PinTier = "disk", *, size: int = 10, key: str = "k") -> HeldAdapter:
    return HeldAdapter(AdapterRef(digest, "t", key, "", size, 1), tier)


def new_holds(disk_bytes: int = 100, host_bytes: int = 100) -> Holds:
    return Holds(disk_bytes=disk_bytes, host_bytes=host_bytes, prepared_bytes=lambda ref: ref.size_bytes)


def test_what_any_holder_holds_is_held_down_to_its_lowest_tier() -> None:
    holds = new_holds()
    holds.hold("one", [held("a"), held("b", "host")])
    holds.hold("two", [held("a", "host"), held("b"), held("c")])
    assert [holds.tier(digest) for digest in "abcd"] == ["host", "host", "disk", None]
    holds.hold("two", [])
    assert [holds.tier(digest) for digest in "abc"] == ["disk", "host", None]


def test_a_holder_holds_what_it_said_last() -> None:
    holds = new_holds()
    holds.hold("one", [held("a"), held("b")])
    holds.hold("one", [held("b", "host")])
    assert [held("b", "host")] == holds.granted()


def test_every_object_of_an_adapter_is_named_with_its_tier() -> None:
    holds = new_holds()
    holds.hold("one", [held("a", key="mine"), held("a", "host", key="theirs")])
    assert [held("a", "host", key="mine"), held("a", "host", key="theirs")] == holds.granted()


def test_what_is_beyond_the_share_is_refused_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    holds = new_holds()
    for _ in range(3):
        holds.hold("one", [held(digest, size=30) for digest in "abc"])
    assert [holds.tier(digest) for digest in "abc"] == ["disk", "disk", None]
    assert [record.getMessage() for record in caplog.records] == [
        "adapter c is not held: pins take 75 % of disk_cache_bytes; raise it, or unpin others"
    ]


def test_what_does_not_fit_into_memory_is_held_on_disk() -> None:
    holds = new_holds(host_bytes=20)
    holds.hold("one", [held("a", "host"), held("b", "host")])
    assert [holds.tier(digest) for digest in "ab"] == ["host", "disk"]


def test_who_is_held_is_not_displaced_by_who_comes_later() -> None:
    holds = new_holds()
    holds.hold("one", [held("late", size=60)])
    holds.hold("two", [held("later", size=60)])
    holds.hold("one", [held("first", size=60), held("late", size=60)])
    assert [holds.tier(digest) for digest in ("first", "late", "later")] == [None, "disk", None]
    holds.hold("one", [])
    assert holds.tier("later") == "disk"


def test_a_forgotten_adapter_is_held_by_nobody() -> None:
    holds = new_holds()
    holds.hold("one", [held("a"), held("b")])
    holds.hold("two", [held("a")])
    holds.forget("a")
    holds.forget("unknown")
    assert [holds.tier(digest) for digest in "ab"] == [None, "disk"]


HELD = st.builds(held, st.sampled_from("abcdef"), st.sampled_from(["disk", "host"]), size=st.just(20))


@given(st.lists(st.tuples(st.sampled_from(["one", "two"]), st.lists(HELD, max_size=6)), max_size=8))
def test_never_more_is_held_than_the_share(said: list[tuple[str, list[HeldAdapter]]]) -> None:
    holds = new_holds(host_bytes=80)
    for holder, adapters in said:
        holds.hold(holder, adapters)
        sizes = {each.adapter.digest: each.adapter.size_bytes for each in holds.granted()}
        on_host = {
            each.adapter.digest: each.adapter.size_bytes for each in holds.granted() if each.tier == "host"
        }
        assert sum(sizes.values()) <= MAX_SHARE * 100
        assert sum(on_host.values()) <= MAX_SHARE * 80
