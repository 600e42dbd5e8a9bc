"""``tunefleet serve`` as a process over a real, tiny base: what it tells, and how it ends."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx2
import psutil
import pytest

from base_kit import save_tokenizer, spread_model
from engine_kit import CONFIGS, prepare_model
from tunefleet.config import resolve
from tunefleet.runtime.base import find_source, prepared_folder

NUM_TOKENS = 1000  # an answer that is still running when the test acts
ASKED = {"prompt": [5, 6, 7, 8], "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}


class Serving(NamedTuple):
    process: subprocess.Popen[str]
    url: str


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tiny base, prepared where ``serve`` looks for it."""
    root = tmp_path_factory.mktemp("serve")
    config = copy.deepcopy(CONFIGS["llama"])
    config.max_position_embeddings = 2048
    (root / "tiny").mkdir()
    options = resolve(keywords=keywords(root), environ={})
    folder = prepared_folder(options, find_source(options), "float32")
    prepare_model(spread_model(config), folder)
    save_tokenizer(folder)
    return root


def keywords(root: Path) -> dict[str, object]:
    return {
        "base_model": str(root / "tiny"),
        "cache_dir": str(root / "cache"),
        "store_url": (root / "store").as_uri(),
        "devices": "cpu",
        "dtype": "float32",
        "idle_timeout_s": 60,
        "threads_per_replica": 1,
    }


@contextlib.contextmanager
def serve(root: Path) -> Iterator[Serving]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in keywords(root).items()]
    command = [sys.executable, "-m", "tunefleet.cli.main", "serve", "--port=0", "--no-access-log", *flags]
    environ = {**os.environ, "TUNEFLEET_ADMIN_KEY": ""}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ) as process:
        try:
            yield Serving(process, url_of(process))
        finally:
            process.kill()


def url_of(process: subprocess.Popen[str]) -> str:
    """What it serves, by its log."""
    assert process.stderr is not None
    told = next(line for line in process.stderr if "base_url" in line)
    found = re.search(r"(http://127\.0\.0\.1:\d+)/v1", told)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Serving]:
    """Keeps the machine up for all tests of this module, which ends a moment after it."""
    with serve(root) as serving:
        host = psutil.Process(httpx2.get(f"{serving.url}/v1/status").json()["host_pid"])
        yield serving
    host.wait(timeout=30)


def metric(url: str, name: str) -> float:
    found = re.search(
        rf"^tunefleet_{re.escape(name)} (\S+)$", httpx2.get(f"{url}/metrics").text, re.MULTILINE
    )
    return float(found[1]) if found else 0.0


def until_refused(url: str) -> None:
    """Waits until the port takes no connection any more."""
    host, port = url.removeprefix("http://").split(":")
    deadline = time.monotonic() + 10
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < deadline:
            socket.create_connection((host, int(port))).close()
    assert time.monotonic() < deadline


def streamed(lines: list[str]) -> tuple[str, int]:
    """The text of a whole stream, and how many tokens it has."""
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    return text, chunks[-1]["usage"]["completion_tokens"]


def test_looking_wakes_nothing_and_the_first_request_shows_what_waking_took(served: Serving) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/v1/status", "/v1/replicas", "/v1/adapters"):
        assert httpx2.get(f"{served.url}{path}").status_code == 200
    status = httpx2.get(f"{served.url}/v1/status").json()
    assert (status["at_zero"], status["replicas"], status["starts"]) == (True, [], [])
    assert metric(served.url, 'standby_pss_bytes{process="host"}') > 0
    answer = httpx2.post(f"{served.url}/v1/completions", json={**ASKED, "max_tokens": 20}, timeout=60)
    assert answer.headers["x-cold-start"] == "base"
    stages = dict(stage.split(";dur=") for stage in answer.headers["server-timing"].split(", "))
    assert 0 < float(stages["wake"]) <= float(stages["first_token"])
    assert metric(served.url, "request_wake_time_seconds_sum") == pytest.approx(
        float(stages["wake"]) / 1000, abs=1e-3
    )
    assert metric(served.url, 'replica_cold_start_seconds_count{stage="start"}') == 1
    assert metric(served.url, "generation_tokens_total") == 20
    while httpx2.get(f"{served.url}/v1/replicas").json()["data"][0]["num_running"]:
        pass
    status = httpx2.get(f"{served.url}/v1/status").json()
    assert (status["at_zero"], status["starts"][0]["replica_id"]) == (False, "r1")
    replica = status["replicas"][0]
    assert (replica["state"], replica["num_tokens"], replica["num_slots"]) == ("ready", 20, 32)
    assert replica["since"] >= replica["started_at"] > 0
    assert metric(served.url, 'replicas{state="ready"}') == 1
    assert metric(served.url, 'adapter_slots{state="free"}') == 32


def test_a_signal_lets_a_stream_finish_with_every_token_and_takes_no_new_request(
    root: Path, served: Serving
) -> None:
    whole = httpx2.post(f"{served.url}/v1/completions", json=ASKED, timeout=60).json()
    asked = {**ASKED, "stream": True, "stream_options": {"include_usage": True}}
    with serve(root) as (process, url):
        with httpx2.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as response:
            lines = response.iter_lines()
            begun = [next(lines)]
            process.send_signal(signal.SIGTERM)
            until_refused(url)
            assert httpx2.get(f"{served.url}/v1/replicas").json()["data"][0]["num_running"] == 1
            rest = list(lines)
        assert process.wait(10) == 0
    assert streamed(begun + rest) == (whole["choices"][0]["text"], NUM_TOKENS)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(root: Path, served: Serving, second: signal.Signals) -> None:
    asked = {**ASKED, "max_tokens": 2000, "stream": True}
    with (
        serve(root) as (process, url),
        httpx2.stream("POST", f"{url}/v1/completions", json=asked) as response,
    ):
        next(response.iter_lines())
        process.send_signal(signal.SIGTERM)
        until_refused(url)
        process.send_signal(second)
        assert process.wait(1) == -second


_STUCK = """
import asyncio, logging, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from router_kit import Kit
from tunefleet.auth import anyone
from tunefleet.cli import serve
from tunefleet.runtime.fakes import FakeDispatcher

class Stuck(FakeDispatcher):
    async def close(self):
        print("closing", flush=True)
        await asyncio.Event().wait()

logging.basicConfig(level=logging.INFO)
logging.getLogger("alembic").setLevel(logging.WARNING)
serve.CLOSE_TIMEOUT_S = float(sys.argv[1])
kit = Kit(Path({folder!r}))
kit.dispatcher = Stuck(kit.dispatcher.answer)
with serve._bound("127.0.0.1", 0) as listener:
    asyncio.run(serve._serve(kit.fleet(), anyone, listener))
"""


@contextlib.contextmanager
def stuck(folder: Path, close_timeout_s: float) -> Iterator[subprocess.Popen[str]]:
    """A router whose machine's side never closes, told to end."""
    code = _STUCK.format(tests=str(Path(__file__).parent), folder=str(folder))
    command, pipe = [sys.executable, "-c", code, str(close_timeout_s)], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            httpx2.get(f"{url_of(process)}/healthz").raise_for_status()
            process.send_signal(signal.SIGTERM)
            yield process
        finally:
            process.kill()


def test_closing_is_bounded(tmp_path: Path) -> None:
    with stuck(tmp_path, 1.0) as process:
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (1, "closing\n")
    assert "closing took longer than 1 s" in err


def test_a_second_signal_ends_a_router_that_closes(tmp_path: Path) -> None:
    with stuck(tmp_path, 60) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "closing\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(1) == -signal.SIGTERM
