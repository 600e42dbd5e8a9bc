"""Both clients against a real server: the same surface as the library, the same errors."""

from __future__ import annotations

import asyncio
import inspect
import tarfile
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from adapter_factory import adapter_files
from router_kit import HELLO, Kit, Server, run_async, serving, stored
from tunefleet import AsyncClient, Client, Fleet
from tunefleet.answers import Chunk
from tunefleet.async_client import AsyncClientAdapters
from tunefleet.auth import admin_key, anyone
from tunefleet.client import ClientAdapters
from tunefleet.core import Canary, Pin
from tunefleet.errors import (
    AdapterConflict,
    AdapterInvalid,
    AdapterLoadFailed,
    AdapterNotFound,
    AuthError,
    CapacityError,
    ReplicaError,
    RequestInvalid,
    StoreError,
    TunefleetError,
)
from tunefleet.fleet_adapters import FleetAdapters
from tunefleet.http.app import create_app
from tunefleet.replies import EventReader
from tunefleet.runtime.fakes import FakeDispatcher


def test_the_blocking_client_does_all_that_the_library_does(server: Server) -> None:
    with Client(server.url) as client:
        first = client.adapters.push("alice", server.kit.adapter(1), metadata={"run": "é𝄞"})
        assert first.metadata == {"run": "é𝄞"}
        second = client.adapters.push("alice", server.kit.adapter(2), promote=False)
        assert [version.version for version in client.adapters.list("alice")] == [2, 1]
        assert [version.version for version in client.adapters.versions("alice", limit=1)] == [2]
        assert client.adapters.live("alice").digest == first.digest
        assert client.adapters.promote("alice", 2, if_live=1).live
        answer = client.chat("alice", HELLO, max_tokens=50, temperature=0)
        assert (answer.text, answer.adapter_digest, answer.version) == (
            f"I am {second.digest[:8]}.",
            second.digest,
            2,
        )
        assert answer.usage.completion_tokens > 0
        assert answer.timing["first_token"] > 0
        old = client.chat("alice", HELLO, version=1)
        assert old.adapter_digest == first.digest
        assert client.complete("alice", "hello").text == answer.text
        assert client.complete(None, [5, 6]).text == "I am the base."
        assert client.chat("bob", HELLO, fallback="base").adapter_digest == "base"
        assert [user.user_id for user in client.users()] == ["alice"]
        assert client.warmup("alice").adapter_digest == second.digest
        assert client.status().base == "tiny"


def test_a_stream_ends_with_what_it_took(server: Server) -> None:
    with Client(server.url) as client:
        *texts, last = client.stream(None, HELLO)
    assert "".join(chunk.text for chunk in texts) == "I am the base."
    assert (last.text, last.finish_reason) == ("", "stop")
    assert last.usage is not None
    assert last.served is not None
    assert last.served.adapter_digest == "base"


def test_named_adapters_and_archives(server: Server) -> None:
    with tarfile.open(server.kit.folder / "a.tar", "w") as archive:
        archive.add(server.kit.adapter(), ".")
    with Client(server.url) as client:
        poems = client.adapters.push("a+b@c", server.kit.folder / "a.tar", name="poems")
        assert client.chat("a+b@c", HELLO, name="poems").adapter_digest == poems.digest
        with pytest.raises(AdapterNotFound):
            client.chat("a+b@c", HELLO)


@run_async
async def _use_async(server: Server) -> None:
    with tarfile.open(server.kit.folder / "a.tar", "w") as archive:
        archive.add(server.kit.adapter(2), ".")
    async with AsyncClient(server.url) as client:
        await client.adapters.push("alice", server.kit.adapter(1))
        second = await client.adapters.push("alice", server.kit.folder / "a.tar")
        assert (await client.adapters.live("alice")).digest == second.digest
        assert len(await client.adapters.list("alice")) == 2
        assert len(await client.adapters.versions("alice", limit=1)) == 1
        assert (await client.adapters.promote("alice", 1)).live
        assert (await client.chat("alice", HELLO)).version == 1
        chunks = [chunk async for chunk in client.stream("alice", HELLO, version=2)]
        assert "".join(chunk.text for chunk in chunks) == f"I am {second.digest[:8]}."
        assert (await client.complete(None, "hello")).text == "I am the base."
        assert [user.user_id for user in await client.users()] == ["alice"]
        assert (await client.warmup()).adapter_digest == "base"
        assert (await client.status()).base == "tiny"
        with pytest.raises(AdapterNotFound):
            await client.chat("bob", HELLO)
        with pytest.raises(AdapterNotFound):
            _ = [chunk async for chunk in client.stream("bob", HELLO)]


def test_the_async_client_does_all_that_the_library_does(server: Server) -> None:
    _use_async(server)


def test_the_blocking_client_releases_pins_downloads_and_deletes(server: Server) -> None:
    with Client(server.url) as client:
        adapters = client.adapters
        for seed in (1, 2, 3):
            adapters.push("alice", server.kit.adapter(seed))
        assert adapters.rollback("alice").version == 2
        assert adapters.rollback("alice", 1, 2).version == 1
        assert adapters.canary("alice", 3, 100).canary == Canary(3, 100)
        assert client.chat("alice", HELLO, session_id="s1").version == 3
        assert adapters.end_canary("alice").canary is None
        assert adapters.pin("alice").pin == Pin("host")
        assert adapters.show("alice").pin == Pin("host")
        assert adapters.unpin("alice").pin is None
        for version, seed in ((None, 1), (2, 2)):
            adapters.download("alice", version, server.kit.folder / "down")
            assert adapter_files(server.kit.folder / "down") == adapter_files(server.kit.adapter(seed))
        receipt = adapters.delete("alice", 3)
        assert (receipt.status, receipt.version, receipt.removed["versions"]) == ("done", 3, 1)
        changed = client.update_user("alice", fallback="base", metadata={"plan": "é"})
        assert (changed.fallback, changed.metadata) == ("base", {"plan": "é"})
        assert client.update_user("alice", fallback=None) == client.user("alice")
        receipt = client.delete_user("alice")
        assert (receipt.status, client.deletion(receipt.deletion_id)) == ("done", receipt)
        with pytest.raises(AdapterNotFound):
            client.user("alice")


@run_async
async def _release_async(server: Server) -> None:
    async with AsyncClient(server.url) as client:
        adapters = client.adapters
        for seed in (1, 2):
            await adapters.push("alice", server.kit.adapter(seed))
        assert (await adapters.rollback("alice")).version == 1
        assert (await adapters.canary("alice", 2, 5.5)).canary == Canary(2, 5.5)
        assert (await adapters.end_canary("alice")).canary is None
        assert (await adapters.pin("alice", "disk")).pin == Pin("disk")
        assert (await adapters.show("alice")).pin == Pin("disk")
        assert (await adapters.unpin("alice")).pin is None
        await adapters.download("alice", None, server.kit.folder / "down")
        assert adapter_files(server.kit.folder / "down") == adapter_files(server.kit.adapter(1))
        assert (await adapters.delete("alice", 2)).version == 2
        assert (await client.update_user("alice", limits={"a": 1})) == await client.user("alice")
        receipt = await client.delete_user("alice")
        assert await client.deletion(receipt.deletion_id) == receipt


def test_the_async_client_releases_pins_downloads_and_deletes(server: Server) -> None:
    _release_async(server)


def test_a_push_tells_how_far_it_is(server: Server) -> None:
    folder = server.kit.adapter()
    size = sum(map(len, adapter_files(folder).values()))
    told: list[tuple[int, int]] = []

    @run_async
    async def push() -> None:
        async with AsyncClient(server.url) as client:
            await client.adapters.push("alice", folder, progress=lambda *num: told.append(num))

    with Client(server.url) as client:
        client.adapters.push("alice", folder, progress=lambda *num: told.append(num))
        assert told == sorted(told)
        assert told[-1] == (size, size)
        told.clear()
        push()
        assert told[-1] == (size, size)
        with tarfile.open(server.kit.folder / "a.tar", "w") as archive:
            archive.add(folder, ".")
        told.clear()
        client.adapters.push("alice", archive.name, progress=lambda *num: told.append(num))
        assert {num_total for _, num_total in told} == {Path(str(archive.name)).stat().st_size}
        assert told[-1][0] == told[-1][1]


def test_a_push_with_a_key_is_answered_once(server: Server) -> None:
    with Client(server.url) as client:
        first = client.adapters.push("alice", server.kit.adapter(1), idempotency_key="k")
        client.adapters.push("alice", server.kit.adapter(2))
        assert client.adapters.push("alice", server.kit.adapter(1), idempotency_key="k") == first
        with pytest.raises(AdapterConflict, match="Idempotency-Key"):
            client.adapters.push("alice", server.kit.adapter(3), idempotency_key="k")


def test_a_download_that_is_refused_or_changed_leaves_nothing(server: Server) -> None:
    into = server.kit.folder / "down"
    with Client(server.url) as client:
        client.adapters.push("alice", server.kit.adapter())
        with pytest.raises(AdapterNotFound):
            client.adapters.download("alice", 9, into)
        for path in stored(server.kit):
            path.chmod(0o600)
            path.write_bytes(path.read_bytes()[:-1] + b"!")
        with pytest.raises((StoreError, ReplicaError)):
            client.adapters.download("alice", 1, into)
    assert list(into.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        CapacityError("full", retry_after_s=7, code="queue_full"),
        CapacityError("no replica", retry_after_s=2),
        AdapterLoadFailed("bad", retry_after_s=3),
        StoreError("gone"),
        ReplicaError("crashed"),
        ReplicaError("lost", code="replica_lost"),
        RequestInvalid("no", param="x"),
        AdapterConflict("moved"),
    ],
)
def test_errors_arrive_as_what_they_were(server: Server, error: TunefleetError) -> None:
    server.kit.dispatcher.error = error
    with Client(server.url) as client:
        for ask in (lambda: client.chat(None, HELLO), lambda: list(client.stream(None, HELLO))):
            with pytest.raises(type(error)) as caught:
                ask()
            assert (caught.value.message, caught.value.code, caught.value.param) == (
                error.message,
                error.code,
                error.param,
            )
            assert getattr(caught.value, "retry_after_s", None) == getattr(error, "retry_after_s", None)


def test_what_is_wrong_with_an_upload_is_told(server: Server) -> None:
    folder = server.kit.adapter()
    with Client(server.url) as client:
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(AdapterInvalid):
            client.adapters.push("alice", folder)
        (folder / "adapter_config.json").unlink()
        with pytest.raises(AdapterInvalid, match=r"no adapter_config\.json"):
            client.adapters.push("alice", folder)
        with pytest.raises(AdapterInvalid, match="there is no"):
            client.adapters.push("alice", folder / "nowhere")
        with pytest.raises(RequestInvalid, match="user_id"):
            client.adapters.push("../bob", folder)
        with pytest.raises(RequestInvalid, match="name"):
            client.adapters.list("alice", name="../bob")


def test_the_environment_says_where_the_server_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = Kit(tmp_path)
    with serving(create_app(kit.fleet(), admin_key("k1"), with_lifespan=True)) as url:
        monkeypatch.setenv("TUNEFLEET_URL", f"{url}/v1")
        with Client() as client, pytest.raises(AuthError) as caught:
            client.users()
        assert caught.value.code == "unauthenticated"
        monkeypatch.setenv("TUNEFLEET_API_KEY", "k1")
        with Client() as client:
            assert client.users() == []


def test_a_server_that_is_not_there_is_said_to_be() -> None:
    with (
        Client("http://127.0.0.1:9") as client,
        pytest.raises(ReplicaError, match="tunefleet serve") as caught,
    ):
        client.status()
    assert caught.value.code == "unreachable"


def test_a_server_that_is_not_ours_is_said_to_be() -> None:
    async def other(scope: dict[str, object], receive: object, send: object) -> None:
        if scope["type"] == "http":
            status = 502 if "chat" in str(scope["path"]) else 200
            await PlainTextResponse("hello", status)(scope, receive, send)  # type: ignore[arg-type]
        else:
            request = await receive()  # type: ignore[operator]
            await send({"type": f"{request['type']}.complete"})  # type: ignore[operator]
            await receive()  # type: ignore[operator]
            await send({"type": "lifespan.shutdown.complete"})  # type: ignore[operator]

    with serving(other) as url, Client(url) as client:  # type: ignore[arg-type]
        with pytest.raises(ReplicaError, match="not tunefleet's"):
            client.status()
        with pytest.raises(ReplicaError, match="502"):
            client.chat(None, HELLO)


def test_leaving_a_stream_cancels_its_sequence(tmp_path: Path) -> None:
    import threading

    gone = threading.Event()

    class Watched(FakeDispatcher):
        async def start(self) -> None:
            self.gate = asyncio.Semaphore(2)

    kit = Kit(tmp_path)
    kit.dispatcher = Watched(kit.dispatcher.answer)
    kit.dispatcher.cancelled = _Telling(gone)
    with serving(create_app(kit.fleet(), anyone, with_lifespan=True)) as url, Client(url) as client:
        stream = client.stream(None, HELLO)
        assert next(stream).text == "I"
        stream.close()  # type: ignore[attr-defined]
        assert gone.wait(10)


class _Telling(list[str]):
    def __init__(self, event: object) -> None:
        self._event = event

    def append(self, value: str) -> None:
        super().append(value)
        self._event.set()  # type: ignore[attr-defined]


def read(*parts: bytes) -> list[Chunk]:
    reader = EventReader()
    chunks = [chunk for part in parts for chunk in reader.feed(part)]
    reader.finish()
    return chunks


def test_events_are_read_however_they_are_cut() -> None:
    event = 'data: {"choices":[{"finish_reason":null,"delta":{"content":"é"}}]}\n\n'.encode()
    whole = b": waiting stage=wake\n\n" + event + b"data: [DONE]\n\n"
    for at in range(len(whole)):
        assert [chunk.text for chunk in read(whole[:at], whole[at:])] == ["é"]


def test_a_stream_that_breaks_off_is_an_error() -> None:
    with pytest.raises(ReplicaError, match="broke off"):
        read(b'data: {"choices":[]}\n\n')


def test_a_late_failure_is_an_error() -> None:
    with pytest.raises(ReplicaError, match="nan") as caught:
        read(b'data: {"error":{"message":"nan","code":"nan_logits","param":null,"type":"server_error"}}\n\n')
    assert caught.value.code == "nan_logits"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Fleet, AsyncClient),
        (Fleet, Client),
        (FleetAdapters, AsyncClientAdapters),
        (FleetAdapters, ClientAdapters),
    ],
)
def test_library_and_clients_share_one_surface(ours: type, theirs: type) -> None:
    shared = {"chat", "stream", "complete", "status", "warmup"}
    shared |= {"users", "user", "update_user", "delete_user", "deletion"}
    names = shared if ours is Fleet else {name for name in vars(ours) if not name.startswith("_")}
    for name in names:
        mine = inspect.signature(getattr(ours, name)).parameters.keys() - {"tenant"}
        assert mine == inspect.signature(getattr(theirs, name)).parameters.keys(), name


def test_requests_name_the_client(server: Server) -> None:
    seen: list[str] = []

    async def authenticate(request: Request) -> None:
        seen.append(request.headers["user-agent"])

    app = create_app(server.kit.fleet(), authenticate, with_lifespan=True)
    with serving(app) as url, Client(url) as client, pytest.raises(AuthError):
        client.status()
    assert seen[0].startswith("tunefleet/")
