"""What tests of the router's side share: a tiny tokenizer, a fleet without a machine, a real HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import tokenizers
import uvicorn
from starlette.types import ASGIApp

from adapter_factory import make_adapter, make_manifest
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.config import resolve
from tunefleet.core import Manifest
from tunefleet.fleet import Fleet, FleetParts
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


async def collect(texts: AsyncIterator[str]) -> str:
    return "".join([text async for text in texts])
