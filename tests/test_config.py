"""Options from four sources, and the folders they lead to."""

from __future__ import annotations

import dataclasses
import stat
from pathlib import Path

import pytest

from tunefleet import config
from tunefleet.config import Options, resolve
from tunefleet.errors import ConfigError


def test_flags_win_over_keywords_over_environment_over_the_app_over_defaults() -> None:
    sources = {
        "flags": {"port": "1"},
        "keywords": {"port": 2, "max_queue": 2},
        "environ": {"TUNEFLEET_PORT": "3", "TUNEFLEET_MAX_QUEUE": "3", "TUNEFLEET_HOST": "::1"},
        "app": {"port": 4, "host": "app", "idle_timeout_s": 4.0},
    }
    options = resolve(**sources)  # type: ignore[arg-type]
    assert (options.port, options.max_queue, options.host, options.idle_timeout_s) == (1, 2, "::1", 4.0)
    assert Options().max_num_seqs == options.max_num_seqs


def test_every_option_has_a_default_and_says_what_it_is() -> None:
    for field in dataclasses.fields(Options):
        assert field.default is not dataclasses.MISSING
        assert field.metadata["doc"].endswith(".")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "many"),
        ("port", 1.5),
        ("port", -1),
        ("max_num_seqs", 0),
        ("idle_timeout_s", float("nan")),
        ("access_log", "perhaps"),
        ("dtype", "int4"),
        ("fallback", "other"),
        ("store_url", "s4://bucket"),
        ("store_url", "file://["),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(keywords={name: value}, environ={})
    assert caught.value.param in (name, "database_url")


def test_more_replicas_kept_than_there_may_be_are_refused() -> None:
    assert resolve(keywords={"min_replicas": 2, "max_replicas": 2}, environ={}).min_replicas == 2
    with pytest.raises(ConfigError, match="max_replicas, which is 2") as caught:
        resolve(keywords={"min_replicas": 3, "max_replicas": 2}, environ={})
    assert caught.value.param == "min_replicas"


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"idle_timeout'.*idle_timeout_s"):
        resolve(keywords={"idle_timeout": 3}, environ={})


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("false", False), ("0", False)])
def test_text_becomes_the_options_type(text: str, value: bool) -> None:
    environ = {"TUNEFLEET_ACCESS_LOG": text, "TUNEFLEET_CORS_ORIGINS": "https://a.example, https://b.example"}
    options = resolve(environ=environ)
    assert value == options.access_log
    assert options.cors_origins == ("https://a.example", "https://b.example")


def test_the_catalog_lies_beside_a_file_store(tmp_path: Path) -> None:
    options = resolve(keywords={"store_url": (tmp_path / "my store").as_uri()}, environ={})
    assert f"sqlite:///{tmp_path}/my store/catalog.db" == options.database_url


def test_the_sockets_folder_is_short_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = config.runtime_dir(Path("/a/very/long/" + "path/" * 60))
    assert len(str(folder.relative_to(tmp_path))) < 40
    for each in (folder, folder.parent):
        assert stat.S_IMODE(each.stat().st_mode) == 0o700


def test_a_sockets_folder_that_somebody_else_laid_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = config.runtime_dir(Path("/state"))
    folder.rmdir()
    folder.parent.rename(tmp_path / "theirs")
    folder.parent.symlink_to(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="not a folder of ours"):
        config.runtime_dir(Path("/state"))
