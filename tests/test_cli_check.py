"""Commands that need no server: ``tunefleet adapters check`` and ``tunefleet base prepare``."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from adapter_factory import adapter_files, make_adapter, make_manifest, write_config
from cli_kit import run_main
from malformed.archives import tar_of
from tunefleet.cli import main
from tunefleet.config import resolve
from tunefleet.runtime.base import MANIFEST_FILE, find_source, prepared_folder, resolve_dtype

MANIFEST = make_manifest()


@pytest.fixture(autouse=True)
def prepared_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny base, prepared as far as checking goes: its manifest is in its place."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    monkeypatch.setenv("TUNEFLEET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TUNEFLEET_BASE_MODEL", str(base))
    options = resolve()
    folder = prepared_folder(options, find_source(options), resolve_dtype(options))
    folder.mkdir(parents=True)
    (folder / MANIFEST_FILE).write_bytes(msgspec.json.encode(MANIFEST))
    return base


def check(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the command, as a shell sees it."""
    return run_main(monkeypatch, "adapters", "check", *arguments)


Capture = pytest.CaptureFixture[str]


def test_an_adapter_that_would_be_served_is_described(
    tmp_path: Path, prepared_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder = make_adapter(tmp_path / "adapter", MANIFEST, config={"task_type": "SEQ_CLS"})
    assert check(monkeypatch, folder, "--base-model", prepared_base) == 0
    out, err = capsys.readouterr()
    facts = dict(line.split("  ", 1) for line in out.splitlines())
    assert facts["rank"].strip() == "4"
    assert facts["target modules"].strip() == "down_proj, q_proj, v_proj"
    assert err.startswith("warning: task_type is 'SEQ_CLS'")


def test_a_folder_and_an_archive_of_it_are_the_same_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder = make_adapter(tmp_path / "adapter", MANIFEST)
    archive = tmp_path / "adapter.tar.gz"
    archive.write_bytes(tar_of(adapter_files(folder), mode="w:gz"))
    answers = []
    for path in (folder, archive):
        assert check(monkeypatch, path, "--json") == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    assert len(answers[0]["digest"]) == 64


def test_what_would_be_refused_is_one_line_with_the_reason_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    dora = make_adapter(tmp_path / "dora", MANIFEST)
    write_config(dora, {"use_dora": True})
    wide = make_adapter(tmp_path / "wide", make_manifest(), r=9)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"no archive")
    for arguments, reason in (
        ([dora], "adapter_config.json: use_dora is set: DoRA is not served"),
        ([wide, "--max-rank", 8], "has rank 9, the limit here is 8"),
        ([tmp_path / "empty"], "adapter_config.json is missing"),
        ([tmp_path / "file"], "the archive is refused"),
        ([tmp_path / "none"], "there is no adapter at"),
        ([wide, "--base-model", tmp_path / "none"], "is no Hugging Face id, no folder"),
    ):
        assert check(monkeypatch, *arguments) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("tunefleet: ")
        assert reason in err
        assert err.count("\n") == 1


def test_the_base_and_the_largest_rank_are_the_servers_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder = make_adapter(tmp_path / "adapter", MANIFEST, r=9)
    assert check(monkeypatch, folder) == 0
    monkeypatch.setenv("TUNEFLEET_MAX_ADAPTER_RANK", "8")
    assert check(monkeypatch, folder) == 1
    assert "the limit here is 8" in capsys.readouterr().err
    assert check(monkeypatch, folder, "--max-rank", 9) == 0
    monkeypatch.setenv("TUNEFLEET_MAX_UPLOAD_BYTES", "5000")
    assert check(monkeypatch, folder, "--max-rank", 9) == 1
    assert "larger than 5000 bytes" in capsys.readouterr().err


def test_wrong_usage_is_exit_code_2() -> None:
    for arguments in ([], ["a", "b"], ["a", "--max-rank", "0"]):
        assert CliRunner().invoke(main.app, ["adapters", "check", *arguments]).exit_code == 2


def test_a_base_that_the_environment_names_is_the_one_prepared(
    prepared_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert run_main(monkeypatch, "base", "prepare", "--json") == 0
    assert json.loads(capsys.readouterr().out)["base_id"] == MANIFEST.base_id
