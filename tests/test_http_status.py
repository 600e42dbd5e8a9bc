"""What is where, over HTTP."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.requests import Request

from router_kit import Kit, api, ask, code
from tunefleet.auth import Caller
from tunefleet.core import LoggedError, ReplicaInfo, ReplicaState
from tunefleet.errors import CapacityError
from tunefleet.messages import Status, Submit
from tunefleet.runtime.fakes import FakeDispatcher, FakeRun


class Stocked(FakeDispatcher):
    async def status(self) -> Status:
        replica = ReplicaInfo(
            replica_id="r",
            state=ReplicaState.READY,
            address="/socket",
            device="cpu",
            digests=("a",),
            num_adapters=1,
            num_slots=4,
            adapter_bytes=50,
        )
        return Status(
            pid=1,
            parked_pid=2,
            replicas=(replica,),
            pss_bytes={},
            host_tier={"b": 20},
            disk_tier={"b": 10, "c": 30},
            num_held=3,
            errors=(LoggedError(at=1.0, message="replica q: ended by SIGKILL"),),
        )


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", [{"digest": "a", "replica_id": "r"}]),
        ("?tier=device", [{"digest": "a", "replica_id": "r"}]),
        ("?tier=host", [{"digest": "b", "size_bytes": 20}]),
        ("?tier=disk", [{"digest": "b", "size_bytes": 10}, {"digest": "c", "size_bytes": 30}]),
    ],
)
def test_adapters_are_listed_by_tier(tmp_path: Path, query: str, expected: list[dict[str, object]]) -> None:
    kit = Kit(tmp_path)
    kit.dispatcher = Stocked(kit.dispatcher.answer)
    with api(kit) as client:
        listed = client.get(f"/v1/adapters{query}").json()
    assert listed == {
        "object": "list",
        "data": expected,
        "has_more": False,
        "num_adapters": len(expected),
    }


def test_a_tier_that_is_none_is_refused_and_sockets_are_nobodys_business(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    kit.dispatcher = Stocked(kit.dispatcher.answer)
    with api(kit) as client:
        assert code(client.get("/v1/adapters?tier=store")) == (400, "invalid_request")
        for path in ("/v1/status", "/v1/replicas"):
            assert "/socket" not in client.get(path).text


def test_the_status_says_what_runs_what_waits_what_is_where_and_what_failed(tmp_path: Path) -> None:
    kit = Kit(tmp_path, device_adapter_bytes=2**20, host_cache_bytes=2**21, disk_cache_bytes=2**22)
    kit.dispatcher = Stocked(kit.dispatcher.answer)
    with api(kit) as client:
        told = client.get("/v1/status").json()
    assert (told["base_id"], told["at_zero"], told["num_held"]) == (kit.manifest.base_id, False, 3)
    assert {"python", "torch", "transformers"} <= told["versions"].keys()
    assert told["tiers"] == {
        "device": {"num_adapters": 1, "used_bytes": 50, "max_bytes": 2**20},
        "host": {"num_adapters": 1, "used_bytes": 20, "max_bytes": 2**21},
        "disk": {"num_adapters": 2, "used_bytes": 40, "max_bytes": 2**22},
    }
    assert told["errors"] == [{"at": 1.0, "message": "replica q: ended by SIGKILL"}]
    assert (told["replicas"][0]["digests"], told["replicas"][0]["num_slots"]) == (["a"], 4)


async def _tenant(request: Request) -> Caller | None:
    return Caller(scopes=frozenset({"tenant"}), tenant="acme")


def test_who_is_no_admin_sees_how_many_adapters_there_are_and_not_which(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    kit.dispatcher = Stocked(kit.dispatcher.answer)
    with api(kit, _tenant) as client:
        assert client.get("/v1/status").json()["tiers"]["disk"]["num_adapters"] == 2
        for replica in (
            client.get("/v1/status").json()["replicas"][0],
            client.get("/v1/replicas").json()["data"][0],
        ):
            assert (replica["digests"], replica["num_adapters"]) == ([], 1)
        for tier, expected in (("device", 1), ("host", 1), ("disk", 2)):
            listed = client.get(f"/v1/adapters?tier={tier}").json()
            assert (listed["data"], listed["num_adapters"]) == ([], expected)


class _Woken(FakeDispatcher):
    """Held for a replica before it answers."""

    def submit(self, work: Submit) -> FakeRun:
        run = super().submit(work)
        run.cold_base, run.wake_s = True, 0.25
        return run


def test_what_a_request_was_held_for_a_replica_is_in_its_headers(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    kit.dispatcher = _Woken(kit.dispatcher.answer)
    with api(kit) as client:
        for asked in (ask(client), ask(client, stream=True)):
            assert asked.headers["x-cold-start"] == "base"
            assert "wake;dur=250.0" in asked.headers["server-timing"].split(", ")


@pytest.mark.parametrize("reason", ["cold_start_timeout", "replica_start_failed"])
def test_who_gets_no_replica_is_told_when_to_come_again(tmp_path: Path, reason: str) -> None:
    kit = Kit(tmp_path)
    kit.dispatcher.error = CapacityError("no replica", retry_after_s=4.2, code=reason)
    with api(kit) as client:
        for refused in (ask(client), ask(client, stream=True)):
            assert code(refused) == (503, reason)
            assert refused.headers["retry-after"] == "5"
