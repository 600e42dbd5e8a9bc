"""What tests of the router's side share: a tiny tokenizer, a fleet without a machine, a real HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

import httpx2
import tokenizers
import uvicorn
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive

from adapter_factory import make_adapter, make_manifest
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.auth import Authenticate, anyone
from tunefleet.config import resolve, store_folder
from tunefleet.core import ADAPTER_FILES, Manifest
from tunefleet.fleet import Fleet, FleetParts
from tunefleet.http.app import create_app
from tunefleet.messages import Submit
from tunefleet.runtime.fakes import FakeDispatcher
from tunefleet.text import Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
IM_START, IM_END = 1, 2
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]


def write_tokenizer(folder: Path, *, template: str | None = TEMPLATE, added: Sequence[str] = ()) -> Path:
    """A byte-level BPE of a few hundred tokens with ChatML, as a prepared base holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(
        ["the user says hello, the assistant answers", "user\n assistant\n system\n"], trainer
    )
    built.add_tokens(list(added))
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": SPECIAL[1], "eos_token": SPECIAL[2]})
    )
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def says(tokenizer: Tokenizer) -> Callable[[Submit], list[int]]:
    """An answer that shows whose weights gave it."""

    def answer(work: Submit) -> list[int]:
        who = work.adapter.digest[:8] if work.adapter else "the base"
        return tokenizer.encode(f"I am {who}.")

    return answer


P = ParamSpec("P")


class Kit:
    """A fleet on FakeDispatcher and a real store in a folder of the test's. Not open yet."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.folder = folder
        self.manifest: Manifest = make_manifest(vocab_size=1000, max_model_len=512)
        self.tokenizer = Tokenizer(write_tokenizer(folder / "base"))
        self.dispatcher = FakeDispatcher(says(self.tokenizer))
        self.keywords = {
            "cache_dir": str(folder / "cache"),
            "store_url": (folder / "store").as_uri(),
            "access_log": False,
            **options,
        }
        self.options = resolve(keywords=self.keywords, environ={})

    def fleet(self, **more: object) -> Fleet:
        parts = FleetParts(
            manifest=self.manifest,
            tokenizer=self.tokenizer,
            store=AdapterStore.open(self.options, self.manifest),
            dispatcher=self.dispatcher,
        )
        return Fleet.from_parts(parts, **{**self.keywords, **more})  # type: ignore[arg-type]

    def adapter(self, seed: int = 0) -> Path:
        """A PEFT folder; other seeds are other weights."""
        return make_adapter(self.folder / f"adapter-{seed}", self.manifest, seed=seed)


@contextlib.contextmanager
def api(kit: Kit, authenticate: Authenticate = anyone, **more: object) -> Iterator[TestClient]:
    """The HTTP API over a kit, without a socket. Failures of ours are answers, as they are for clients."""
    app = create_app(kit.fleet(**more), authenticate, with_lifespan=True)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def upload(
    client: httpx2.Client, path: Path, url: str = "/v1/users/alice/adapter", **more: Any
) -> httpx2.Response:
    """Uploads a PEFT folder as multipart parts."""
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((path / name).open("rb")) for name in ADAPTER_FILES}
        return client.put(url, files=files, **more)


def code(response: httpx2.Response) -> tuple[int, str]:
    """Status and code of a refusal, whose shape is checked."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"]


def staged(kit: Kit) -> list[Path]:
    """What uploads have left on their way; nothing, once they are answered."""
    staging = Path(kit.options.cache_dir) / "staging"
    return list(staging.iterdir()) if staging.exists() else []


def stored(kit: Kit) -> list[Path]:
    """Every file of an adapter in the store's folder of objects, unfinished ones too."""
    objects = store_folder(kit.options.store_url) / "objects"
    found = (path for path in objects.rglob("*") if path.is_file() and path.parent.name != "catalogs")
    return sorted(path for path in found if path.name != ".lock")


def ask(client: TestClient, user_id: str | None = None, **more: Any) -> httpx2.Response:
    """Asks for a chat completion."""
    headers = {"X-User-Id": user_id} if user_id else {}
    headers |= more.pop("headers", {})
    return client.post("/v1/chat/completions", json={"messages": HELLO, **more}, headers=headers)


def events(text: str) -> list[Any]:
    """The data of a stream; every event has exactly one line."""
    blocks = text.removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") for block in blocks)
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


class Server(NamedTuple):
    """A kit's API on a port of its own."""

    kit: Kit
    url: str


@contextlib.contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """A uvicorn server on a socket of this machine; its URL."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="on"))
    started = threading.Event()
    ports: list[int] = []

    async def serve() -> None:
        task = asyncio.ensure_future(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.005)  # uvicorn has no event for this
        if server.started:
            ports.append(server.servers[0].sockets[0].getsockname()[1])
        started.set()
        await task

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    started.wait()
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        server.should_exit = True
        thread.join()


async def sent_by(app: ASGIApp, receive: Receive, path: str, **scope: object) -> list[Message]:
    """What an app sends, called without a server."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    whole = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b"", **scope}
    await app(whole, receive, send)
    return sent


def run_async(test: Callable[P, Coroutine[object, object, None]]) -> Callable[P, None]:
    """An async test as a plain one."""

    @functools.wraps(test)
    def plain(*args: P.args, **keywords: P.kwargs) -> None:
        asyncio.run(test(*args, **keywords))

    return plain
