"""Finding the base of a set of options, and preparing it once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from base_kit import write_base
from engine_kit import tiny_model
from tunefleet.config import Options
from tunefleet.errors import BaseModelError
from tunefleet.runtime.base import (
    MANIFEST_FILE,
    QUICKSTART,
    find_source,
    locate_base,
    prepared_folder,
    read_manifest,
    resolve_devices,
    resolve_dtype,
)

HAS_GPU = any(Path("/proc/driver/nvidia/gpus").glob("*"))
LOCATE = """
import sys
from tunefleet.config import Options
from tunefleet.runtime.base import locate_base
options = Options(base_model=sys.argv[1], cache_dir=sys.argv[2], dtype="float32")
print(locate_base(options, progress=print))
assert "torch" not in sys.modules, "a router imported torch"
"""


def options(base_model: str, tmp_path: Path, **given: object) -> Options:
    return Options(base_model=base_model, cache_dir=str(tmp_path / "cache"), dtype="float32", **given)


def folder_of(base_model: str, tmp_path: Path, dtype: str = "float32", **given: object) -> Path:
    chosen = options(base_model, tmp_path, **given)
    return prepared_folder(chosen, find_source(chosen), dtype)


@pytest.mark.parametrize(
    "spec", ["", "model", "a/b/c", "/no/such/folder", "./no-such", "~/no-such/folder", "../x/y"]
)
def test_what_names_no_base_is_refused_with_what_would(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelError, match=r"no Hugging Face id, no folder and no \.gguf file") as error:
        find_source(options(spec, tmp_path))
    assert error.value.param == "base_model"
    assert repr(spec) in error.value.message


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(BaseModelError, match=r"no \.gguf file"):
        find_source(options(str(tmp_path / "weights.bin"), tmp_path))


def test_each_kind_of_source_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "Tiny-Chat").mkdir()
    (tmp_path / "Tiny-Chat" / "config.json").write_text("{}")
    (tmp_path / "tiny.Q4_1.gguf").write_bytes(b"GGUF")
    specs = [QUICKSTART, "org/Some-Model", str(tmp_path / "Tiny-Chat"), str(tmp_path / "tiny.Q4_1.gguf")]
    names = [find_source(options(spec, tmp_path)).name for spec in specs]
    assert names == ["SmolLM2-135M-Instruct", "Some-Model", "Tiny-Chat", "tiny.Q4_1"]


def test_a_relative_folder_is_the_same_source_as_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_source(options("tiny", tmp_path)) == find_source(options(str(tmp_path / "tiny"), tmp_path))


def test_a_changed_file_is_another_base(tmp_path: Path) -> None:
    weights = tmp_path / "tiny" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    first = folder_of(str(weights.parent), tmp_path)
    assert first == folder_of(str(weights.parent), tmp_path)
    weights.write_bytes(b"three")
    assert first != folder_of(str(weights.parent), tmp_path)


def test_each_revision_and_dtype_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = {
        folder_of("org/model", tmp_path),
        folder_of("org/model", tmp_path, base_revision="v2"),
        folder_of("org/model", tmp_path, "bfloat16"),
        folder_of("other/model", tmp_path),
    }
    assert len(folders) == 4
    assert {tmp_path / "cache" / "bases"} == {folder.parent for folder in folders}
    assert folder_of("org/model", tmp_path) == folder_of("org/model", tmp_path, base_revision="main")


@pytest.mark.parametrize(
    ("devices", "resolved"),
    [
        ("cpu", ("cpu",)),
        ("cuda:0", ("cuda:0",)),
        ("cuda:0,1", ("cuda:0", "cuda:1")),
        ("cuda:0, cuda:3", ("cuda:0", "cuda:3")),
        ("cuda:2,0,1", ("cuda:2", "cuda:0", "cuda:1")),
        pytest.param(
            "auto", ("cpu",), marks=pytest.mark.skipif(HAS_GPU, reason="needs a machine without GPU")
        ),
        pytest.param(
            "cuda", ("cuda:0",), marks=pytest.mark.skipif(HAS_GPU, reason="needs a machine without GPU")
        ),
    ],
)
def test_devices_are_one_replica_each(devices: str, resolved: tuple[str, ...]) -> None:
    assert resolved == resolve_devices(Options(devices=devices))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("devices", ["cpu", "cuda:0"])
def test_a_given_dtype_is_taken(dtype: str, devices: str) -> None:
    assert dtype == resolve_dtype(Options(dtype=dtype, devices=devices))


def test_auto_is_bf16_on_a_gpu_and_what_the_cpu_can_do_else() -> None:
    assert resolve_dtype(Options(devices="cuda:0,1")) == "bfloat16"
    flags = Path("/proc/cpuinfo").read_text()
    native = "avx512_bf16" in flags or "amx_bf16" in flags
    assert ("bfloat16" if native else "float32") == resolve_dtype(Options(devices="cpu"))


@pytest.mark.parametrize("content", [None, b"{}", b"not json", b'{"base_id": 1}'])
def test_a_folder_without_a_sound_manifest_is_told(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(BaseModelError, match="holds no prepared base; run"):
        read_manifest(tmp_path)


@pytest.mark.slow
def test_processes_that_come_at_once_prepare_a_base_once(tmp_path: Path) -> None:
    """The second waits for the first, a third finds it there; none of them imports torch."""
    source = write_base(tiny_model("llama"), tmp_path / "tiny")
    command = [sys.executable, "-c", LOCATE, str(source), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = [process.communicate()[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    folder = folder_of(str(source), tmp_path)
    progress = ["reading tiny", "comparing the engine with transformers", "prepared tiny as float32"]
    assert [[str(folder)], [*progress, str(folder)]] == sorted(lines, key=len)
    told: list[str] = []
    assert folder == locate_base(options(str(source), tmp_path), progress=told.append)
    assert told == []
    assert read_manifest(folder).name == "tiny"


def test_a_refusal_tells_its_reason_however_much_was_written_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines on stderr by the thousand, as progress bars write them, and some more after the reason."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    (tmp_path / "empty").mkdir()
    told: list[str] = []
    with pytest.raises(BaseModelError, match=r"^base_model '.*empty' can't be loaded") as error:
        locate_base(options(str(tmp_path / "empty"), tmp_path), progress=told.append)
    assert error.value.param == "base_model"
    assert told == ["reading empty"]
    assert not folder_of(str(tmp_path / "empty"), tmp_path).exists()
