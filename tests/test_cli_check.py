"""Commands that need no server: ``tunefleet adapters check`` and ``tunefleet base prepare``."""

from __future__ import annotations

import json
import os
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


def facts_of(out: str) -> dict[str, str]:
    """The lines of ``name  value`` before the table."""
    pairs = (line.split("  ", 1) for line in out.partition("\n\n")[0].splitlines())
    return {name: value.strip() for name, value in pairs}


def test_an_adapter_that_would_be_served_is_described_module_by_module(
    tmp_path: Path, prepared_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    config: dict[str, object] = {"task_type": "SEQ_CLS", "alpha_pattern": {"v_proj": 3}}
    ranks = {"model.layers.1.mlp.down_proj": 7}
    folder = make_adapter(tmp_path / "adapter", MANIFEST, config=config, ranks=ranks)
    assert check(monkeypatch, folder, "--base-model", prepared_base) == 0
    out, err = capsys.readouterr()
    size = sum(len(content) for content in adapter_files(folder).values())
    facts = facts_of(out)
    assert len(facts.pop("digest")) == 64
    assert facts == {
        "verdict": "would be served on tiny",
        "trained on": "tiny",
        "size": f"{size:,} bytes",
        "rank": "7, 64 allowed",
        "alpha": "8",
        "modules": "6 of the base's 14 linear layers",
    }
    assert [line.split("\t") for line in out.partition("\n\n")[2].splitlines()] == [
        ["down_proj", "1", "4", "2", "24", "16", "F32"],
        ["down_proj", "1", "7", "1.14286", "24", "16", "F32"],
        ["q_proj", "2", "4", "2", "16", "16", "F32"],
        ["v_proj", "2", "4", "0.75", "16", "8", "F32"],
    ]
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
    assert answers[0]["served"]
    assert len(answers[0]["digest"]) == 64


def test_what_would_be_refused_is_named_with_the_reason_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    dora = make_adapter(tmp_path / "dora", MANIFEST)
    write_config(dora, {"use_dora": True})
    wide = make_adapter(tmp_path / "wide", make_manifest(), r=9)
    make_adapter(tmp_path / "saved" / "alice", MANIFEST)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"no archive")
    for arguments, code, param, reason in (
        ([dora], "unsupported_feature", "use_dora", "use_dora is set: DoRA is not served"),
        ([wide, "--max-rank", 8], "rank_too_large", "lora_A.weight", "has rank 9, the limit here is 8"),
        ([tmp_path / "empty"], "missing_file", "adapter_config.json", "adapter_config.json is missing"),
        ([tmp_path / "saved"], "missing_file", "adapter_config.json", "saved/alice: check that folder"),
        ([tmp_path / "file"], "invalid_archive", "archive", "the archive is refused"),
        ([tmp_path / "none"], "adapter_invalid", "", "there is no adapter at"),
    ):
        assert check(monkeypatch, *arguments) == 1
        out, err = capsys.readouterr()
        facts = facts_of(out)
        assert (facts["verdict"], facts["code"], err) == ("would be refused", code, "")
        assert facts.get("param", "").endswith(param)
        assert reason in facts["reason"]
        assert check(monkeypatch, *arguments, "--json") == 1
        answer = json.loads(capsys.readouterr().out)
        assert (answer["served"], answer["error"]["code"]) == (False, code)
        assert reason in answer["error"]["message"]


def test_a_base_that_is_not_there_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder = make_adapter(tmp_path / "adapter", MANIFEST)
    assert check(monkeypatch, folder, "--base-model", tmp_path / "none") == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "is no Hugging Face id, no folder" in err


def test_a_strangers_text_moves_no_cursor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    named = make_adapter(tmp_path / "a", MANIFEST, config={"base_model_name_or_path": "\x1b[2Jtiny\n"})
    assert check(monkeypatch, named) == 0
    assert "\x1b" not in "".join(capsys.readouterr())
    field = make_adapter(tmp_path / "b", MANIFEST, config={"\x1b[2J\nuse_it": True})
    assert check(monkeypatch, field) == 1
    assert "\x1b" not in "".join(capsys.readouterr())


def test_a_sparse_giant_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder = make_adapter(tmp_path / "adapter", MANIFEST)
    os.truncate(folder / "adapter_model.safetensors", 2**40)
    assert check(monkeypatch, folder) == 1
    assert facts_of(capsys.readouterr().out)["code"] == "adapter_too_large"


def test_the_base_and_the_largest_rank_are_the_servers_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder = make_adapter(tmp_path / "adapter", MANIFEST, r=9)
    assert check(monkeypatch, folder) == 0
    monkeypatch.setenv("TUNEFLEET_MAX_ADAPTER_RANK", "8")
    assert check(monkeypatch, folder) == 1
    assert "the limit here is 8" in capsys.readouterr().out
    assert check(monkeypatch, folder, "--max-rank", 9) == 0
    monkeypatch.setenv("TUNEFLEET_MAX_UPLOAD_BYTES", "5000")
    assert check(monkeypatch, folder, "--max-rank", 9) == 1
    assert "larger than 5000 bytes" in capsys.readouterr().out


def test_wrong_usage_is_exit_code_2() -> None:
    for arguments in ([], ["a", "b"], ["a", "--max-rank", "0"]):
        assert CliRunner().invoke(main.app, ["adapters", "check", *arguments]).exit_code == 2


def test_a_base_that_the_environment_names_is_the_one_prepared(
    prepared_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert run_main(monkeypatch, "base", "prepare", "--json") == 0
    assert json.loads(capsys.readouterr().out)["base_id"] == MANIFEST.base_id
