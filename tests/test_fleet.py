"""The library: in a script, in a Starlette app, in a FastAPI app."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount
from starlette.testclient import TestClient

from adapter_factory import adapter_files
from router_kit import HELLO, Kit, ask, run_async
from tunefleet import Fleet
from tunefleet.auth import Caller
from tunefleet.core import Canary, Pin
from tunefleet.errors import AdapterInvalid, AdapterNotFound, ConfigError, InvalidState, RequestInvalid


@run_async
async def test_a_script_pushes_chats_streams_and_completes(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        version = await fleet.adapters.push("alice", kit.adapter(), metadata={"run": "42"})
        assert (version.version, version.live, version.metadata) == (1, True, {"run": "42"})
        expected = f"I am {version.digest[:8]}."
        answer = await fleet.chat("alice", HELLO, temperature=0, max_tokens=64)
        assert (answer.text, answer.version, answer.adapter_digest) == (expected, 1, version.digest)
        chunks = [chunk async for chunk in fleet.stream("alice", HELLO)]
        assert "".join(chunk.text for chunk in chunks) == expected
        assert chunks[-1].served is not None
        assert chunks[-1].served.adapter_digest == version.digest
        assert (await fleet.complete("alice", "hello")).text == expected
        assert (await fleet.chat(None, HELLO)).text == "I am the base."


@run_async
async def test_versions_are_listed_promoted_and_asked_for(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        for seed in range(3):
            await fleet.adapters.push("alice", kit.adapter(seed), promote=seed == 0)
        assert [version.version for version in await fleet.adapters.list("alice")] == [3, 2, 1]
        assert [version.version for version in await fleet.adapters.versions("alice", after=3, limit=1)] == [
            2
        ]
        assert (await fleet.adapters.live("alice")).version == 1
        assert (await fleet.adapters.promote("alice", 3, if_live=1)).live
        assert (await fleet.chat("alice", HELLO)).version == 3
        assert (await fleet.chat("alice", HELLO, version=2)).version == 2
        assert [user.user_id for user in await fleet.users()] == ["alice"]


@run_async
async def test_a_script_releases_pins_downloads_and_deletes(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        adapters = fleet.adapters
        told: list[tuple[int, int]] = []
        for seed in (1, 2, 3):
            pushed = await adapters.push("alice", kit.adapter(seed), progress=lambda *num: told.append(num))
        assert told[-1] == (pushed.size_bytes, pushed.size_bytes)
        assert (await adapters.rollback("alice")).version == 2
        assert (await adapters.rollback("alice", 1, 2)).version == 1
        assert (await adapters.canary("alice", 3, 100)).canary == Canary(3, 100)
        assert (await fleet.chat("alice", HELLO, session_id="s1")).version == 3
        assert (await fleet.complete("alice", "hello", session_id="s1")).version == 3
        assert (await adapters.end_canary("alice")).canary is None
        assert (await adapters.pin("alice")).pin == Pin("host")
        assert (await adapters.show("alice")).pin == Pin("host")
        assert (await adapters.unpin("alice")).pin is None
        await adapters.download("alice", None, tmp_path / "down")
        assert adapter_files(tmp_path / "down") == adapter_files(kit.adapter(1))
        assert (await adapters.delete("alice", 2)).removed["versions"] == 1
        assert (await fleet.update_user("alice", limits={"a": 1})) == await fleet.user("alice")
        receipt = await fleet.delete_user("alice")
        assert (receipt.status, await fleet.deletion(receipt.deletion_id)) == ("done", receipt)
        with pytest.raises(AdapterNotFound):
            await fleet.user("alice")


@pytest.mark.parametrize("session", ["", "a b", "é", "x" * 129, "a\n"])
def test_a_session_that_no_header_could_hold_is_refused(tmp_path: Path, session: str) -> None:
    @run_async
    async def run() -> None:
        async with Kit(tmp_path).fleet() as fleet:
            with pytest.raises(RequestInvalid, match="session") as caught:
                await fleet.chat("alice", HELLO, session_id=session)
            assert caught.value.code == "invalid_session_id"

    run()


@run_async
async def test_named_adapters_of_one_user_are_apart(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        poems = await fleet.adapters.push("alice", kit.adapter(), name="poems")
        assert (await fleet.chat("alice", HELLO, name="poems")).adapter_digest == poems.digest
        with pytest.raises(AdapterNotFound):
            await fleet.chat("alice", HELLO)


@run_async
async def test_an_archive_is_as_good_as_a_folder(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    folder = kit.adapter()
    with tarfile.open(tmp_path / "adapter.tar.gz", "w:gz") as archive:
        archive.add(folder, "alice")
    async with kit.fleet() as fleet:
        packed = await fleet.adapters.push("alice", str(tmp_path / "adapter.tar.gz"))
        assert packed == await fleet.adapters.push("alice", folder)
        assert list((tmp_path / "cache" / "staging").iterdir()) == []
        with pytest.raises(AdapterInvalid, match="no adapter at"):
            await fleet.adapters.push("alice", tmp_path / "nothing")


@run_async
async def test_leaving_a_stream_cancels_its_sequence(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        chunks = fleet.stream(None, HELLO)
        async for _ in chunks:
            break
        await chunks.aclose()  # type: ignore[attr-defined]
    assert kit.dispatcher.cancelled == [kit.dispatcher.submitted[0].request_id]


@run_async
async def test_warming_loads_the_users_adapter(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        version = await fleet.adapters.push("alice", kit.adapter())
        assert (await fleet.warmup("alice")).adapter_digest == version.digest
        assert (await fleet.warmup()).adapter_digest == "base"
    digests = [work.adapter and work.adapter.digest for work in kit.dispatcher.submitted]
    assert digests == [version.digest, None]


@run_async
async def test_the_status_names_the_base(tmp_path: Path) -> None:
    async with Kit(tmp_path).fleet() as fleet:
        status = await fleet.status()
        assert (status.base, status.max_model_len, status.replicas) == ("tiny", 512, ())


@run_async
async def test_library_calls_are_checked_like_requests(tmp_path: Path) -> None:
    async with Kit(tmp_path).fleet() as fleet:
        with pytest.raises(RequestInvalid, match="tools"):
            await fleet.chat(None, HELLO, tools=[{}])  # type: ignore[call-arg]
        with pytest.raises(RequestInvalid, match="user_id"):
            await fleet.chat("../bob", HELLO)


@run_async
async def test_a_fleet_that_is_not_open_says_so(tmp_path: Path) -> None:
    fleet = Kit(tmp_path).fleet()
    with pytest.raises(InvalidState, match="async with"):
        await fleet.chat(None, HELLO)
    async with fleet:
        with pytest.raises(InvalidState, match="open already"):
            await fleet.__aenter__()


def test_options_are_checked_at_once_and_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no_such_option"):
        Fleet(no_such_option=1)
    Fleet(cache_dir=str(tmp_path / "cache"), store_url=(tmp_path / "store").as_uri())
    assert list(tmp_path.iterdir()) == []


def test_a_starlette_app_mounts_it(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    fleet = kit.fleet()
    app = Starlette(routes=[Mount("/ai", fleet.asgi(auth="none"))], lifespan=fleet.lifespan)
    with TestClient(app) as client:
        assert client.get("/ai/readyz").status_code == 200
        answer = client.post("/ai/v1/chat/completions", json={"messages": HELLO})
        assert answer.json()["choices"][0]["message"]["content"] == "I am the base."
        assert client.get("/ai/v1/nowhere").json()["error"]["code"] == "not_found"


def test_a_fastapi_app_mounts_it_and_tells_who_calls(tmp_path: Path) -> None:
    async def authenticate(request: Request) -> Caller | None:
        name = request.headers.get("x-session")
        return Caller(user_id=name, scopes=frozenset({"infer", "upload"})) if name else None

    kit = Kit(tmp_path)
    fleet = kit.fleet(authenticate=authenticate)
    api = FastAPI(lifespan=fleet.lifespan)
    api.mount("/ai", fleet.asgi())

    @api.get("/greeting")
    async def greeting() -> str:
        return (await fleet.chat("alice", HELLO)).text

    with TestClient(api, base_url="http://testserver/ai") as client:
        session = {"x-session": "alice"}
        folder = kit.adapter()
        files = {
            name: (folder / name).read_bytes()
            for name in ("adapter_config.json", "adapter_model.safetensors")
        }
        uploaded = client.put("/v1/users/alice/adapter", files=files, headers=session)
        assert uploaded.status_code == 201
        expected = f"I am {uploaded.json()['digest'][:8]}."
        assert ask(client, headers=session).json()["choices"][0]["message"]["content"] == expected
        assert client.get("http://testserver/greeting").json() == expected
        assert ask(client).status_code == 401
        assert ask(client, headers={"x-session": "bob"}).status_code == 404


def test_mounting_without_a_word_about_callers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUNEFLEET_ADMIN_KEY", raising=False)
    fleet = Kit(tmp_path).fleet()
    with pytest.raises(ConfigError, match="authenticate"):
        fleet.asgi()
    monkeypatch.setenv("TUNEFLEET_ADMIN_KEY", "k")
    assert fleet.asgi() is not None
    with pytest.raises(ConfigError, match="auth"):
        fleet.asgi(auth="all")  # type: ignore[arg-type]


_WITHOUT_EXTRA = """
import asyncio, sys
class Missing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {"torch", "starlette", "tokenizers", "sqlalchemy", "jinja2", "uvicorn"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import tunefleet
from tunefleet import AsyncClient, Client, Fleet
from tunefleet.cli.main import app
Client().close()
async def main():
    async with Fleet():
        pass
try:
    asyncio.run(main())
except tunefleet.errors.ConfigError as error:
    print(error.message, type(error.__cause__).__name__)
"""


def test_without_the_extra_clients_work_and_fleet_says_what_to_install(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_EXTRA], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "pip install 'tunefleet[serve]'" in done.stdout
    assert "ModuleNotFoundError" in done.stdout


def test_routers_import_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = (
        "import sys, tunefleet.fleet, tunefleet.http.app, tunefleet.generation\n"
        "import tunefleet.cli.main, tunefleet.client\n"
        "print(sorted({'torch', 'transformers', 'peft'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.strip() == "[]"
