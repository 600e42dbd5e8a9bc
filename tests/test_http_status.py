"""What is where, over HTTP."""

from __future__ import annotations

from pathlib import Path

import pytest

from router_kit import Kit, api, code
from tunefleet.core import ReplicaInfo, ReplicaState
from tunefleet.messages import Status
from tunefleet.runtime.fakes import FakeDispatcher


class Stocked(FakeDispatcher):
    async def status(self) -> Status:
        replica = ReplicaInfo(
            replica_id="r", state=ReplicaState.READY, address="/socket", device="cpu", digests=("a",)
        )
        return Status(
            pid=1,
            parked_pid=2,
            replicas=(replica,),
            pss_bytes={},
            host_tier={"b": 20},
            disk_tier={"b": 10, "c": 30},
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
        assert listed == {"object": "list", "data": expected, "has_more": False}


def test_a_tier_that_is_none_is_refused_and_sockets_are_nobodys_business(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    kit.dispatcher = Stocked(kit.dispatcher.answer)
    with api(kit) as client:
        assert code(client.get("/v1/adapters?tier=store")) == (400, "invalid_request")
        for path in ("/v1/status", "/v1/replicas"):
            assert "/socket" not in client.get(path).text
