"""What a host process expects of an hour, keeps for the next process, and does about it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from host_kit import host_options, hosting
from tunefleet.core import AdapterRef, ReplicaState
from tunefleet.runtime.arrivals import HOUR_S, NUM_HOURS, Hour
from tunefleet.runtime.foresight import FILE, LEAD_S, Foresight

NINE = 9 * HOUR_S
DAY_S = NUM_HOURS * HOUR_S
BUSY = Hour(num_arrivals=360.0, seen_s=HOUR_S)


def ref(name: str) -> AdapterRef:
    return AdapterRef(name, "default", f"key/{name}", "", 1, 8)


def write(folder: Path, hours: list[Hour]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_bytes(msgspec.json.encode(hours))


class Time:
    """A clock that stands still."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_the_next_process_knows_what_this_one_has_learned(tmp_path: Path) -> None:
    time = Time(NINE)
    foresight = Foresight(tmp_path, idle_timeout_s=10.0, clock=time)
    time.now = NINE + HOUR_S - 1
    foresight.arrived(360)
    assert foresight.forecast().least == 1
    foresight.save()
    time.now = NINE + DAY_S - LEAD_S / 2
    again = Foresight(tmp_path, idle_timeout_s=10.0, clock=time)
    assert again.forecast().least == 1
    assert again.forecast().ask_again_at == LEAD_S / 2


def test_a_file_that_is_no_hours_is_as_none(tmp_path: Path) -> None:
    for content in (b"", b"[]", b'{"a": 1}', b"[[1, 2]]", b"\x00"):
        (tmp_path / FILE).write_bytes(content)
        assert Foresight(tmp_path, idle_timeout_s=10.0, clock=Time(NINE)).forecast().least == 0


def test_hours_that_can_not_be_kept_hurt_nobody(tmp_path: Path) -> None:
    Foresight(tmp_path / "none", idle_timeout_s=10.0, clock=Time(NINE)).save()


def test_the_adapters_of_an_hour_come_before_it_and_those_who_are_deleted_never(tmp_path: Path) -> None:
    hours = [Hour()] * NUM_HOURS
    hours[9] = BUSY
    write(tmp_path, hours)
    time = Time(NINE + 10.0)
    foresight = Foresight(tmp_path, idle_timeout_s=10.0, clock=time)
    assert foresight.newly_likely(foresight.forecast()) == []
    for name in ("often", "once", "deleted", "often"):
        foresight.asked_for(ref(name))
    foresight.forget("deleted")
    time.now = NINE + HOUR_S
    assert foresight.newly_likely(foresight.forecast()) == []  # nothing is likely at ten
    time.now = NINE + DAY_S - LEAD_S
    assert foresight.newly_likely(foresight.forecast()) == [ref("often"), ref("once")]
    time.now += 1.0
    assert foresight.newly_likely(foresight.forecast()) == []  # they are there already


def test_a_replica_is_there_before_anybody_asks(tmp_path: Path) -> None:
    async def scenario() -> None:
        write(Path(host_options(tmp_path).state_dir), [BUSY] * NUM_HOURS)
        async with hosting(tmp_path, predictive=True, idle_timeout_s=10.0) as host:
            router = await host.router()
            await router.until_states(ReplicaState.READY)

    asyncio.run(scenario())


def test_nobody_is_expected_where_nothing_was_learned(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path, predictive=True) as host:
            router = await host.router()
            assert (await router.status()).replicas == ()

    asyncio.run(scenario())
