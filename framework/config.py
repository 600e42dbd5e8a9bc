"""Options: one list for flags, ``TUNEFLEET_<OPTION>`` and keywords of ``Fleet(...)``.

Precedence: flag > Fleet keyword > environment > App keyword > default. The environment is read here and
nowhere else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
import tempfile
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import msgspec

from tunefleet.core import Manifest
from tunefleet.errors import ConfigError

MIB = 1024 * 1024
DEFAULT_MAX_MODEL_LEN = 2048  # tokens; a base's own limit may need more memory than a request is worth


def _option(default: object, doc: str, *, at_least: float | None = None, secret: bool = False) -> Any:
    metadata = {"doc": doc, "at_least": at_least}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """All options of a deployment; each has a default. Sizes are bytes, times seconds."""

    base_model: str = _option(
        "quickstart",
        "Hugging Face id, folder, .gguf file, or 'quickstart' (SmolLM2-135M-Instruct, out of a package).",
    )
    base_revision: str | None = _option(None, "Revision of a Hugging Face id.")
    devices: str = _option("auto", "auto, cpu, cuda, or cuda:0,1: one replica each.")
    dtype: str = _option(
        "auto", "auto, bfloat16, float16 or float32; auto is what the device multiplies fastest."
    )
    store_url: str = _option("", "Where adapters live: file:///path (default ~/.local/share/tunefleet).")
    database_url: str = _option(
        "", "The catalog: sqlite:///path; by default beside a file store.", secret=True
    )
    cache_dir: str = _option(
        "", "Prepared bases, disk tier, state of the host process (default ~/.cache/tunefleet)."
    )
    min_replicas: int = _option(0, "Replicas kept when idle.", at_least=0)
    max_replicas: int = _option(0, "Most replicas; 0: one per device.", at_least=0)
    target_concurrency: int = _option(0, "Requests per replica to scale by; 0: max_num_seqs.", at_least=0)
    idle_timeout_s: float = _option(
        10.0, "Time without any request after which the last replica stops.", at_least=0
    )
    predictive: bool = _option(
        False,
        "Learn when in the day requests come, and have a replica and the likely adapters there before.",
    )
    scale_down_delay_s: float = _option(
        10.0, "Time for which fewer replicas must have been enough before one stops.", at_least=0
    )
    standby_ttl_s: float = _option(
        0.0, "Time at zero replicas after which the parked process ends too; 0: it stays.", at_least=0
    )
    cold_start_timeout_s: float = _option(60.0, "Longest time a request is held for a replica.", at_least=0.1)
    drain_timeout_s: float = _option(
        30.0, "Longest time a stopping replica may finish its requests.", at_least=0
    )
    step_timeout_s: float = _option(
        120.0, "A replica whose step takes longer is ended; its requests go on at another one.", at_least=0.1
    )
    max_queue: int = _option(1024, "Requests that may wait on a replica, or in a router for one.", at_least=1)
    device_adapter_bytes: int = _option(1024 * MIB, "Device memory for adapters.", at_least=MIB)
    kv_cache_bytes: int = _option(
        2048 * MIB, "Device memory for keys and values of running and recent sequences.", at_least=MIB
    )
    max_active_adapters: int = _option(0, "Slots; 0: max_num_seqs.", at_least=0)
    max_adapter_rank: int = _option(64, "Largest rank served.", at_least=1)
    host_cache_bytes: int = _option(
        1024 * MIB, "Memory for prepared adapters, shared by all replicas.", at_least=MIB
    )
    disk_cache_bytes: int = _option(8192 * MIB, "Disk for adapters fetched from the store.", at_least=MIB)
    max_num_seqs: int = _option(32, "Sequences in one batch.", at_least=1)
    max_model_len: int = _option(0, "Tokens of prompt and answer; 0: the base's, 2048 at most.", at_least=0)
    threads_per_replica: int = _option(
        0, "CPU threads of one replica; 0: all cores shared evenly.", at_least=0
    )
    fallback: Literal["none", "base"] = _option(
        "none", "Who answers a user without an adapter: none (404) or base."
    )
    max_upload_bytes: int = _option(512 * MIB, "Largest adapter upload.", at_least=1)
    cors_origins: tuple[str, ...] = _option((), "Origins whose pages may call the API, or '*'.")
    access_log: bool = _option(True, "Log a line per request.")
    host: str = _option("127.0.0.1", "Address that `tunefleet serve` binds.")
    port: int = _option(8000, "Port that `tunefleet serve` binds.", at_least=0)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            at_least = field.metadata["at_least"]
            value = getattr(self, field.name)
            if at_least is not None and not value >= at_least:
                raise ConfigError(
                    f"{field.name} must be at least {at_least:g}, not {value}", param=field.name
                )
        if self.max_replicas and self.min_replicas > self.max_replicas:
            raise ConfigError(
                f"min_replicas must not be above max_replicas, which is {self.max_replicas}",
                param="min_replicas",
            )
        self._check_choice("dtype", ("auto", "bfloat16", "float16", "float32"))
        self._check_choice("fallback", ("none", "base"))
        object.__setattr__(
            self, "cache_dir", str(Path(self.cache_dir or "~/.cache/tunefleet").expanduser().absolute())
        )
        store = self.store_url or Path("~/.local/share/tunefleet").expanduser().absolute().as_uri()
        object.__setattr__(self, "store_url", store)
        object.__setattr__(self, "database_url", self.database_url or self._database_beside_store())

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}", param=name)

    def _database_beside_store(self) -> str:
        if not self.store_url.startswith("file://"):
            raise ConfigError("database_url must be set when the store is not a folder", param="database_url")
        return f"sqlite:///{store_folder(self.store_url)}/catalog.db"


def context_length(options: Options, manifest: Manifest) -> int:
    """Tokens of prompt and answer that one sequence may have."""
    return min(options.max_model_len or DEFAULT_MAX_MODEL_LEN, manifest.max_model_len)


def store_folder(store_url: str) -> Path:
    """The folder of a ``file://`` store URL."""
    try:
        parts = urlsplit(store_url)
    except ValueError:  # which holds part of the URL, maybe a secret
        raise ConfigError("store_url is no URL; it looks like file:///path", param="store_url") from None
    if parts.scheme != "file" or parts.netloc not in {"", "localhost"} or not parts.path.startswith("/"):
        raise ConfigError(
            "store_url must look like file:///path: a folder's whole path, and no host", param="store_url"
        )
    return Path(unquote(parts.path))


def resolve(
    flags: Mapping[str, object] | None = None,
    keywords: Mapping[str, object] | None = None,
    app: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Options:
    """Merges all sources by precedence. Values that are None count as not given.

    Raises:
        ConfigError: an unknown option, or a value that doesn't parse.
    """
    merged: dict[str, object] = {}
    for source in (app, _from_environment(os.environ if environ is None else environ), keywords, flags):
        merged.update({name: value for name, value in (source or {}).items() if value is not None})
    known = {field.name: field for field in dataclasses.fields(Options)}
    unknown = sorted(merged.keys() - known.keys())
    if unknown:
        raise ConfigError(
            f"unknown option {unknown[0]!r}; the options are: {', '.join(known)}", param=unknown[0]
        )
    hints = typing.get_type_hints(Options)
    converted: dict[str, Any] = {name: _convert(name, hints[name], value) for name, value in merged.items()}
    return Options(**converted)


def state_dir(options: Options, base_dir: Path) -> Path:
    """The folder of the host process for this base and this store; one host process per such folder."""
    key = hashlib.sha256(f"{options.store_url}\0{base_dir.name}".encode()).hexdigest()[:12]
    return Path(options.cache_dir) / "hosts" / key


def runtime_dir(state: Path) -> Path:
    """A short private folder for the Unix sockets of one state folder (socket paths end at 107 bytes).

    Raises:
        ConfigError: somebody else holds its place: what we'd put there could be read or swapped.
    """
    parent = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"tunefleet-{os.getuid()}"
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = parent.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError(f"{parent} is not a folder of ours; remove it, or set XDG_RUNTIME_DIR")
    parent.chmod(0o700)
    folder = parent / hashlib.sha256(str(state).encode()).hexdigest()[:12]
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def setting(name: str, environ: Mapping[str, str] | None = None) -> str | None:
    """What is no option: ``TUNEFLEET_ADMIN_KEY``, the clients' ``TUNEFLEET_URL``, ``TUNEFLEET_API_KEY``."""
    return (os.environ if environ is None else environ).get(f"TUNEFLEET_{name.upper()}") or None


def _from_environment(environ: Mapping[str, str]) -> dict[str, object]:
    names = {field.name for field in dataclasses.fields(Options)}
    found = {name: environ.get(f"TUNEFLEET_{name.upper()}") for name in names}
    return {name: value for name, value in found.items() if value}


def _convert(name: str, hint: Any, value: object) -> object:
    """Text from flags and environment becomes the option's type; other values must have it already."""
    if typing.get_origin(hint) is tuple and isinstance(value, str):
        value = [item.strip() for item in value.split(",")]
    try:
        return msgspec.convert(value, hint, strict=not isinstance(value, str))
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name} can't be {value!r}: {error}", param=name) from error
