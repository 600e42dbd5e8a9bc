"""The command line, against a real server."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner, Result

from adapter_factory import adapter_files
from cli_kit import run_main
from router_kit import Server
from tunefleet.cli import main
from tunefleet.config import Options
from tunefleet.errors import TunefleetError


@pytest.fixture
def server(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Where commands look for it."""
    monkeypatch.setenv("TUNEFLEET_URL", server.url)
    return server


def invoke(*arguments: object, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(main.app, [str(argument) for argument in arguments], input=stdin)
    if isinstance(result.exception, TunefleetError):
        raise result.exception
    return result


def test_an_adapter_is_pushed_shown_listed_and_promoted(server: Server) -> None:
    pushed = invoke("adapters", "push", "alice", server.kit.adapter(1), "--metadata", '{"run": 1}')
    assert re.fullmatch(r"alice default version 1 is live: [0-9a-f]{64}\n", pushed.stdout)
    dark = json.loads(
        invoke("adapters", "push", "alice", server.kit.adapter(2), "--no-promote", "--json").stdout
    )
    assert (dark["version"], dark["live"]) == (2, False)
    shown = invoke("adapters", "show", "alice").stdout
    assert "version         1 (live)" in shown
    assert '{"run":1}' in shown
    listed = [line.split("\t")[:2] for line in invoke("adapters", "list", "alice").stdout.splitlines()]
    assert listed == [["2", "-"], ["1", "live"]]
    assert "version 2 is live" in invoke("adapters", "promote", "alice", 2, "--if-live", 1).stdout
    assert [
        version["live"] for version in json.loads(invoke("adapters", "list", "alice", "--json").stdout)
    ] == [
        True,
        False,
    ]


def test_chat_streams_the_users_answer(server: Server) -> None:
    digest = json.loads(invoke("adapters", "push", "alice", server.kit.adapter(), "--json").stdout)["digest"]
    expected = f"I am {digest[:8]}."
    assert invoke("chat", "alice", "hello").stdout == f"{expected}\n"
    assert invoke("chat", "alice", stdin="hello\n").stdout == f"{expected}\n"
    assert invoke("chat", "-", "hello").stdout == "I am the base.\n"
    assert invoke("chat", "bob", "hello", "--fallback").stdout == "I am the base.\n"
    answer = json.loads(
        invoke("chat", "alice", "hello", "--json", "--max-tokens", 3, "--temperature", 0, "--seed", 1).stdout
    )
    assert (answer["choices"][0]["finish_reason"], answer["served"]["adapter_digest"]) == ("length", digest)
    sampling = server.kit.dispatcher.submitted[-1].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.seed) == (3, 0.0, 1)


def test_users_status_and_warmup(server: Server) -> None:
    invoke("adapters", "push", "alice", server.kit.adapter())
    assert invoke("users", "list").stdout.split("\t")[:2] == ["alice", "1"]
    assert json.loads(invoke("users", "list", "--json").stdout)[0]["user_id"] == "alice"
    assert "tiny@0123456789ab" in invoke("status").stdout
    assert json.loads(invoke("status", "--json").stdout)["base"] == "tiny"
    assert invoke("warmup").stdout.rstrip().endswith("base")
    assert len(json.loads(invoke("warmup", "alice", "--json").stdout)["adapter_digest"]) == 64


def test_an_adapter_is_rolled_back_canaried_pinned_downloaded_and_deleted(server: Server) -> None:
    for seed in (1, 2, 3):
        invoke("adapters", "push", "alice", server.kit.adapter(seed))
    assert "version 2 is live" in invoke("adapters", "rollback", "alice").stdout
    assert "version 1 is live" in invoke("adapters", "rollback", "alice", "--to", 1, "--if-live", 2).stdout
    canary = invoke("adapters", "canary", "alice", 3, 2.5).stdout
    assert canary == "alice default canary: version 3 answers 2.5 %\n"
    pinned = invoke("adapters", "pin", "alice", "--tier", "disk").stdout
    assert pinned == "alice default pin: disk\n"
    shown = invoke("adapters", "show", "alice").stdout
    assert re.search(r"^canary +version 3 answers 2.5 %$", shown, re.MULTILINE)
    assert re.search(r"^pin +disk$", shown, re.MULTILINE)
    assert invoke("adapters", "canary", "alice", "--end").stdout == "alice default canary: none\n"
    assert invoke("adapters", "pin", "alice", "--off").stdout == "alice default pin: none\n"
    assert json.loads(invoke("adapters", "pin", "alice", "--json").stdout)["pin"]["tier"] == "host"
    for arguments, seed in (([], 1), ([2], 2)):
        into = server.kit.folder / f"down-{seed}"
        assert invoke("adapters", "download", "alice", *arguments, into).stdout == f"{into}\n"
        assert adapter_files(into) == adapter_files(server.kit.adapter(seed))
    receipt = invoke("adapters", "delete", "alice", 2, "--yes").stdout
    assert re.search(r"^status +done$", receipt, re.MULTILINE)
    assert re.search(r"^removed .*1 versions", receipt, re.MULTILINE)
    assert json.loads(invoke("adapters", "delete", "alice", 3, "--json").stdout)["version"] == 3


def test_a_canary_is_given_whole_or_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([], [1], [1, 5, "--end"], [1, "--end"]):
        assert run_main(monkeypatch, "adapters", "canary", "alice", *arguments) == 2
        assert "VERSION and PERCENT, or --end" in " ".join(capsys.readouterr().err.split())


def test_users_are_shown_set_and_deleted(server: Server) -> None:
    invoke("adapters", "push", "alice", server.kit.adapter())
    changed = invoke("users", "set", "alice", "--fallback", "base", "--limits", '{"a": 1}').stdout
    assert invoke("users", "show", "alice").stdout == changed
    assert re.search(r"^fallback +base$", changed, re.MULTILINE)
    reset = invoke("users", "set", "alice", "--fallback", "default", "--limits", "null", "--json").stdout
    assert (json.loads(reset)["fallback"], json.loads(reset)["limits"]) == (None, {})
    assert json.loads(invoke("users", "show", "alice", "--json").stdout) == json.loads(reset)
    receipt = json.loads(invoke("users", "delete", "alice", "--json").stdout)
    assert (receipt["status"], receipt["user_id"]) == ("done", None)
    told = invoke("users", "deletion", receipt["deletion_id"]).stdout
    assert re.search(r"^removed .*1 versions", told, re.MULTILINE)
    with pytest.raises(TunefleetError, match="alice"):
        invoke("users", "show", "alice")


def test_a_push_says_what_it_sends_beside_its_output(server: Server) -> None:
    folder = server.kit.adapter()
    size = sum(map(len, adapter_files(folder).values()))
    pushed = invoke("adapters", "push", "alice", folder)
    assert pushed.stderr == f"uploading {folder.name}: {size:,} bytes\n"


def on_a_terminal(server: Server, *arguments: object, keys: str = "") -> tuple[int, str]:
    """Exit code and all that a command shows on a terminal."""
    mine, theirs = pty.openpty()
    command = [sys.executable, "-m", "tunefleet.cli.main", *map(str, arguments)]
    environ = {**os.environ, "TUNEFLEET_URL": server.url, "TERM": "xterm", "COLUMNS": "100"}
    shown = b""
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ) as process:
        os.close(theirs)
        os.write(mine, keys.encode())
        with contextlib.suppress(OSError):  # how a terminal says that nobody holds its other end
            while chunk := os.read(mine, 65536):
                shown += chunk
    os.close(mine)
    return process.returncode, shown.decode()


def test_on_a_terminal_a_push_has_a_bar_and_deleting_asks(server: Server) -> None:
    status, shown = on_a_terminal(server, "adapters", "push", "alice", server.kit.adapter())
    assert (status, "uploading adapter-0" in shown, "version 1 is live" in shown) == (0, True, True)
    status, shown = on_a_terminal(server, "users", "delete", "alice", keys="n\n")
    assert (status, "Delete alice and all their adapters for good?" in shown) == (1, True)
    assert json.loads(invoke("users", "show", "alice", "--json").stdout)["num_adapters"] == 1
    status, shown = on_a_terminal(server, "users", "delete", "alice", keys="y\n")
    assert (status, "done" in shown) == (0, True)


def test_an_error_is_one_line_and_exit_code_1(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "chat", "bob", "hello") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tunefleet: user 'bob' has no adapter")
    assert err.count("\n") == 1
    assert run_main(monkeypatch, "adapters", "push", "bob", "nowhere") == 1
    assert run_main(monkeypatch, "adapters", "push", "bob", server.kit.adapter(), "--metadata", "{") == 1


def test_wrong_usage_is_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["nope"], ["adapters", "promote", "alice"], ["adapters", "promote", "alice", "x"]):
        assert run_main(monkeypatch, *arguments) == 2
        assert capsys.readouterr().out == ""


def test_no_server_is_said_plainly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TUNEFLEET_URL", "http://127.0.0.1:9")
    assert run_main(monkeypatch, "status") == 1
    assert "tunefleet serve" in capsys.readouterr().err


def test_serve_has_a_flag_for_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = invoke("serve", "--help").stdout
    for name in Options.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in shown


def test_serve_refuses_other_machines_without_a_key_and_options_it_does_not_have(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TUNEFLEET_ADMIN_KEY", raising=False)
    assert run_main(monkeypatch, "serve", "--host", "0.0.0.0") == 1
    assert "TUNEFLEET_ADMIN_KEY" in capsys.readouterr().err
    assert run_main(monkeypatch, "serve", "--port", "many") == 1
    assert run_main(monkeypatch, "serve", "--nope") == 2


def test_serve_says_that_a_port_is_taken(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "serve", "--port", server.url.rpartition(":")[2]) == 1
    assert "can't listen on 127.0.0.1:" in capsys.readouterr().err


_SERVE = """
import asyncio, logging, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from router_kit import Kit
from tunefleet.auth import anyone
from tunefleet.cli import serve
from tunefleet.runtime.fakes import FakeDispatcher

class Telling(FakeDispatcher):
    async def close(self):
        print("closed", flush=True)

logging.basicConfig(level=logging.INFO)
for library in ("alembic", "uvicorn"):
    logging.getLogger(library).setLevel(logging.WARNING)
kit = Kit(Path({folder!r}))
kit.dispatcher = Telling(kit.dispatcher.answer)
with serve._bound("127.0.0.1", 0) as listener:
    asyncio.run(serve._serve(kit.fleet(), anyone, listener))
print("left", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_logs_its_url_and_closes_the_fleet_on_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    code = _SERVE.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stderr is not None
        serving_line, notice = process.stderr.readline(), process.stderr.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+/v1", serving_line)
        assert url is not None, serving_line
        assert "no keys" in notice
        assert httpx2.get(f"{url[0]}/models").json()["data"][0]["id"] == "tiny"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "closed\nleft\n", "")


def test_the_command_starts_fast_because_it_imports_little(tmp_path: Path) -> None:
    code = (
        "import sys, tunefleet.cli.main\n"
        "heavy = {'httpx2', 'starlette', 'uvicorn', 'tokenizers', 'sqlalchemy', 'numpy', 'rich.console'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.strip() == "[]"
