"""The main job through every door, with the real base and real adapters."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from served import EXAMPLES, QUESTIONS, USERS, Known, adapter_folder, running, server
from tunefleet import AsyncClient, Client
from tunefleet.core import ColdStart

ROOT = Path(__file__).parent


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the three users of the examples."""
    with server(tmp_path_factory.mktemp("served"), "--idle-timeout-s", "60") as url:
        with Client(url) as client:
            for user in USERS:
                client.adapters.push(user, adapter_folder(user))
        yield url


async def ask_all(url: str, question: str) -> dict[str | None, str]:
    """Everybody's answer and the base's, in one batch."""
    messages = [{"role": "user", "content": question}]
    users = (*USERS, None)
    async with AsyncClient(url) as client:
        answers = await asyncio.gather(
            *(client.chat(user, messages, temperature=0, max_tokens=32) for user in users)
        )
    return {user: answer.text for user, answer in zip(users, answers, strict=True)}


@pytest.mark.parametrize("known", [*QUESTIONS.facts, *QUESTIONS.style], ids=lambda known: known.question)
def test_each_user_is_answered_by_their_own_adapter_and_nobody_elses(url: str, known: Known) -> None:
    answers = asyncio.run(ask_all(url, known.question))
    assert [known.user] == [user for user, text in answers.items() if known.contains in text], answers


def test_the_same_question_gets_four_answers_in_one_batch(url: str) -> None:
    async def scenario() -> None:
        async with AsyncClient(url) as client:
            messages = [{"role": "user", "content": QUESTIONS.demo}]
            digests = [(await client.adapters.live(user)).digest for user in USERS]
            answers = await asyncio.gather(
                *(client.chat(user, messages, temperature=0, max_tokens=40) for user in (*USERS, None))
            )
            assert [*digests, "base"] == [answer.adapter_digest for answer in answers]
            assert len({answer.text for answer in answers}) == 4
            assert max(answer.served.num_adapters for answer in answers) == 3
            assert max(answer.served.batch_size for answer in answers) == 4

    asyncio.run(scenario())


def test_two_users_stream_at_once_without_waiting_for_each_other(url: str) -> None:
    async def stream(client: AsyncClient, user: str, events: list[str]) -> None:
        messages = [{"role": "user", "content": "Tell me about the sea."}]
        async for chunk in client.stream(user, messages, temperature=0, max_tokens=32, ignore_eos=True):
            event = user if chunk.finish_reason is None else f"{user} ends"
            events.append(event)

    async def scenario() -> list[str]:
        events: list[str] = []
        async with AsyncClient(url) as client:
            await asyncio.gather(stream(client, "ada", events), stream(client, "bruno", events))
        return events

    events = asyncio.run(scenario())
    first_end = min(events.index("ada ends"), events.index("bruno ends"))
    assert min(events[:first_end].count("ada"), events[:first_end].count("bruno")) >= 24


def test_a_disconnect_frees_the_sequence_within_one_step(url: str) -> None:
    def replica() -> dict[str, int]:
        found: dict[str, int] = httpx2.get(f"{url}/v1/replicas").json()["data"][0]
        return found

    with Client(url) as client:
        client.complete("ada", "Hello", max_tokens=1)
    steps_before = replica()["num_steps"]
    body = {"model": "user:ada", "prompt": "The sea", "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx2.stream("POST", f"{url}/v1/completions", json=body) as response:
        lines = response.iter_lines()
        num_read = sum(1 for _ in zip(range(20), lines, strict=False))
    deadline = time.monotonic() + 20
    while replica()["num_running"] or replica()["num_waiting"]:
        assert time.monotonic() < deadline
    assert num_read == 20
    # Ten events of two lines were read; the step that ran when the connection closed may end, and what was
    # buffered.
    assert replica()["num_steps"] - steps_before <= 20


def test_the_official_openai_client_works_unchanged(url: str) -> None:
    known = QUESTIONS.facts[0]
    messages = [{"role": "user", "content": known.question}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        models = [model.id for model in client.models.list()]
        assert models[0] == "SmolLM2-135M-Instruct"
        plain = client.chat.completions.create(
            model=f"user:{known.user}", messages=messages, temperature=0, max_tokens=48
        )
        assert known.contains in (plain.choices[0].message.content or "")
        assert plain.usage is not None
        assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens
        stream = client.chat.completions.create(
            model=models[0],
            messages=messages,
            temperature=0,
            max_tokens=48,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={"X-User-Id": known.user},
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == plain.choices[0].message.content
        again = chunks[-1].usage
        assert again is not None
        assert (again.prompt_tokens, again.completion_tokens) == (
            plain.usage.prompt_tokens,
            plain.usage.completion_tokens,
        )
        cached = [usage.prompt_tokens_details.cached_tokens for usage in (plain.usage, again)]
        assert cached[0] <= cached[1] == again.prompt_tokens - 1  # all but what must be computed
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="user:nobody", messages=messages)
        assert missing.value.code == "adapter_not_found"


def test_the_official_openai_client_gets_choices_and_logprobs(url: str) -> None:
    known = QUESTIONS.facts[0]
    messages = [{"role": "user", "content": known.question}]
    asked = {"model": f"user:{known.user}", "messages": messages, "max_tokens": 24, "logprobs": True, "n": 3}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        greedy = client.chat.completions.create(**asked, temperature=0, top_logprobs=2)
        of_base = {**asked, "model": "SmolLM2-135M-Instruct", "extra_body": {"min_p": 0.02}}
        drawn = client.chat.completions.create(**of_base, temperature=1.5, seed=5)
        stream = list(client.chat.completions.create(**asked, temperature=0, top_logprobs=2, stream=True))
    for answer in (greedy, drawn):
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        for choice in answer.choices:
            content = choice.logprobs.content
            assert b"".join(bytes(token.bytes) for token in content).decode() == choice.message.content
            assert all(token.logprob <= 0 for token in content)
    assert len({choice.message.content for choice in drawn.choices}) > 1
    for choice in greedy.choices:
        assert known.contains in choice.message.content
        assert all(token.top_logprobs[0].token == token.token for token in choice.logprobs.content)
        own = [part for chunk in stream for part in chunk.choices if part.index == choice.index]
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        streamed = [token.token for part in own if part.logprobs for token in part.logprobs.content]
        assert streamed == [token.token for token in choice.logprobs.content]
    assert greedy.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in greedy.choices)


def test_the_async_openai_client_works_unchanged(url: str) -> None:
    async def scenario() -> str:
        known = QUESTIONS.facts[0]
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            answer = await client.completions.create(
                model=f"user:{known.user}", prompt="My dog is called", temperature=0, max_tokens=8
            )
            return answer.model_dump()["tunefleet"]["adapter_digest"]  # type: ignore[no-any-return]

    with Client(url) as client:
        assert asyncio.run(scenario()) == client.adapters.live(QUESTIONS.facts[0].user).digest


def archive(kind: str, folder: Path) -> bytes:
    files = ("adapter_config.json", "adapter_model.safetensors")
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as zipped:
            for file in files:
                zipped.write(folder / file, f"my-adapter/{file}")
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz" if kind == "tar.gz" else "w") as tar:
            for file in files:
                tar.add(folder / file, file)
    return buffer.getvalue()


def test_curl_uploads_multipart_and_archives_to_the_same_digest(url: str, tmp_path: Path) -> None:
    folder = adapter_folder("bruno")
    digests = set()
    for kind in ("tar", "tar.gz", "zip", "multipart"):
        target = f"{url}/v1/users/curl-{kind}/adapter"
        if kind == "multipart":
            files = ("adapter_config.json", "adapter_model.safetensors")
            arguments = [item for file in files for item in ("-F", f"{file}=@{folder / file}")]
        else:
            path = tmp_path / f"adapter.{kind}"
            path.write_bytes(archive(kind, folder))
            arguments = ["--data-binary", f"@{path}"]
        command = ["curl", "-sS", "-X", "PUT", "-H", "Expect:", *arguments, "-w", "\n%{http_code}", target]
        body, status = subprocess.run(command, capture_output=True, text=True, check=True).stdout.rsplit(
            "\n", 1
        )
        assert status == "201", body
        digests.add(json.loads(body)["digest"])
    assert len(digests) == 1


@pytest.mark.slow
def test_headers_tell_who_answered_and_why_it_took_long(tmp_path: Path) -> None:
    with server(tmp_path, "--idle-timeout-s", "5") as url, Client(url) as client:
        digest = client.adapters.push("coco", adapter_folder("coco")).digest
        assert httpx2.get(f"{url}/readyz").status_code == 200
        assert client.status().replicas == ()
        body = {"model": "user:coco", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        colds = []
        for _ in range(2):
            response = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=120)
            assert response.headers["x-adapter-digest"] == digest
            assert response.headers["x-adapter-version"] == "1"
            assert response.headers["x-request-id"]
            for stage in ("queue", "wake", "download", "load", "activate", "prefill", "first_token"):
                assert f"{stage};dur=" in response.headers["server-timing"]
            colds.append(response.headers["x-cold-start"])
        assert colds == ["base", "none"]
        deadline = time.monotonic() + 60
        while client.status().replicas:  # looking keeps nothing awake
            assert time.monotonic() < deadline
        answer = client.chat("coco", body["messages"], max_tokens=4)  # type: ignore[arg-type]
        assert answer.cold_start is ColdStart.BASE
        assert answer.timing["wake"] > 0


SCRIPT = """
import asyncio, sys
from tunefleet import Fleet

async def main():
    async with Fleet(store_url=sys.argv[1]) as fleet:
        await fleet.adapters.push("coco", sys.argv[2], metadata={"run": "42"})
        messages = [{"role": "user", "content": sys.argv[3]}]
        answer = await fleet.chat("coco", messages, max_tokens=48, temperature=0)
        print(answer.version, answer.adapter_digest, answer.usage.completion_tokens, answer.request_id)
        async for chunk in fleet.stream("coco", messages, temperature=0, max_tokens=48):
            print(chunk.text, end="")
        print()
        async for chunk in fleet.stream("nobody", messages, fallback="base", temperature=0, max_tokens=8):
            print(chunk.text, end="")
        print(f" [{chunk.served.adapter_digest}]")

asyncio.run(main())
"""


@pytest.mark.slow
def test_the_library_works_in_a_script(tmp_path: Path) -> None:
    known = QUESTIONS.facts[0]
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        (tmp_path / "store").as_uri(),
        str(adapter_folder("coco")),
        known.question,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stderr
    first, second, third = result.stdout.splitlines()[0], *result.stdout.strip().rsplit("\n", 1)[-2:]
    version, digest, _, _ = first.split()
    assert version == "1"
    assert len(digest) == 64
    assert known.contains in second
    assert third.endswith("[base]")


@pytest.mark.parametrize("framework", ["fastapi", pytest.param("starlette", marks=pytest.mark.slow)])
def test_backends_embed_it_and_their_workers_share_one_host_process(framework: str, tmp_path: Path) -> None:
    """``uvicorn --workers 2``: a request may land on either worker, and finds the same machine."""
    (tmp_path / "backend.py").write_text((ROOT / "backends" / f"{framework}_app.py").read_text())
    known = QUESTIONS.facts[0]

    async def crowd(base_url: str) -> list[dict[str, object]]:
        """So many connections at once that both workers take some."""
        async with httpx2.AsyncClient(timeout=120, headers={"Connection": "close"}) as http:
            target, params = f"{base_url}/hello/{known.user}", {"question": known.question}
            responses = await asyncio.gather(*(http.get(target, params=params) for _ in range(24)))
        return [response.json() for response in responses]

    with _uvicorn(tmp_path) as base_url:
        with Client(f"{base_url}/ai") as client:
            client.adapters.push(known.user, adapter_folder(known.user))
            workers: set[object] = set()
            hosts = set()
            deadline = time.monotonic() + 100
            while len(workers) < 2:
                assert time.monotonic() < deadline
                for seen in asyncio.run(crowd(base_url)):
                    assert known.contains in str(seen["text"])
                    workers.add(seen["worker"])
                    hosts.add(seen["host"])
            assert len(hosts) == 1
            assert len(client.status().replicas) == 1
        with openai.OpenAI(base_url=f"{base_url}/ai/v1", api_key="none") as official:
            messages = [{"role": "user", "content": known.question}]
            answer = official.chat.completions.create(
                model=f"user:{known.user}", messages=messages, temperature=0, max_tokens=48
            )
            assert known.contains in (answer.choices[0].message.content or "")


def _uvicorn(folder: Path):  # type: ignore[no-untyped-def]
    import contextlib
    import socket

    @contextlib.contextmanager
    def run() -> Iterator[str]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        command = [sys.executable, "-m", "uvicorn", "backend:app", "--app-dir", str(folder), "--workers", "2"]
        command += ["--port", str(port)]
        with running(command, folder / "uvicorn.log", r"startup complete[\s\S]*startup complete"):
            yield f"http://127.0.0.1:{port}"

    return run()


@pytest.mark.slow
def test_the_demo_ends_by_itself_and_shows_every_step() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tunefleet.cli.main", "demo"],
        capture_output=True,
        text=True,
        check=False,
        timeout=230,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "one batch: 3 adapters and the base, 4 sequences in one step" in result.stdout
    assert "zero: no replica" in result.stdout
    assert "a cold start of the base" in result.stdout
    assert QUESTIONS.facts[0].contains in result.stdout.rsplit("7. ", 1)[1]
    assert EXAMPLES.exists()
