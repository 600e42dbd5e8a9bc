"""The HTTP API seen from outside: each call as a value. Shared by both clients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar
from urllib.parse import quote

import msgspec
from msgspec import UNSET, UnsetType

from tunefleet.answers import Answer, FleetStatus, Warm
from tunefleet.asking import Asking, ChatMessages, parameters
from tunefleet.core import (
    ADAPTER_FILES,
    DEFAULT_ADAPTER,
    Adapter,
    PinTier,
    Receipt,
    User,
    Version,
    check_adapter_name,
    check_user_id,
)
from tunefleet.errors import AdapterInvalid
from tunefleet.replies import decoder, list_decoder, parse_answer
from tunefleet.target import Fallback

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Told how many bytes of how many are sent, as they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call(Generic[T]):
    """One request, not sent yet, and how to read its answer."""

    method: str
    path: str  # percent-encoded
    parse: Callable[[bytes], T]
    query: Mapping[str, str] = dataclasses.field(default_factory=dict)
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: object = None  # JSON
    upload: Path | None = None  # PEFT folder, or a tar or zip of one
    progress: Progress | None = None  # of the upload


def push(
    user_id: str,
    path: str | Path,
    *,
    name: str = DEFAULT_ADAPTER,
    promote: bool = True,
    metadata: Mapping[str, object] | None = None,
    progress: Progress | None = None,
    idempotency_key: str | None = None,
) -> Call[Version]:
    upload, url = Path(path), _adapter(user_id, name)
    missing = [file for file in ADAPTER_FILES if not (upload / file).is_file()] if upload.is_dir() else []
    if missing or not upload.exists():
        what = f"no {missing[0]} in {upload}" if missing else f"there is no {upload}"
        raise AdapterInvalid(f"{what}: give a PEFT folder, or a tar or zip of one", code="missing_file")
    return Call(
        method="PUT",
        path=url,
        query={} if promote else {"promote": "false"},
        headers=_given(
            {
                "X-Adapter-Metadata": _ascii_json(metadata) if metadata else None,
                "Idempotency-Key": idempotency_key,
            }
        ),
        upload=upload,
        progress=progress,
        parse=decoder(Version),
    )


def versions(
    user_id: str, *, name: str = DEFAULT_ADAPTER, after: int | None = None, limit: int = 100
) -> Call[list[Version]]:
    path = f"{_adapter(user_id, name)}/versions"
    return Call(method="GET", path=path, query=_page(after, limit), parse=list_decoder(Version))


def show(user_id: str, *, name: str = DEFAULT_ADAPTER) -> Call[Adapter]:
    return Call(method="GET", path=_adapter(user_id, name), parse=decoder(Adapter))


def download(user_id: str, version: int, file: str, *, name: str = DEFAULT_ADAPTER) -> Call[bytes]:
    """One of the two files, with the hex of its sha256 as ETag."""
    path = f"{_version(user_id, name, version)}/files/{file}"
    return Call(method="GET", path=path, parse=lambda content: content)


def promote(
    user_id: str, version: int, *, name: str = DEFAULT_ADAPTER, if_live: int | None = None
) -> Call[Version]:
    body = {"version": version, "if_live": if_live}
    return Call(method="POST", path=f"{_adapter(user_id, name)}/promote", body=body, parse=decoder(Version))


def rollback(
    user_id: str, to: int | None = None, if_live: int | None = None, *, name: str = DEFAULT_ADAPTER
) -> Call[Version]:
    body = {"to": to, "if_live": if_live}
    return Call(method="POST", path=f"{_adapter(user_id, name)}/rollback", body=body, parse=decoder(Version))


def canary(user_id: str, version: int, percent: float, *, name: str = DEFAULT_ADAPTER) -> Call[Adapter]:
    body = {"version": version, "percent": percent}
    return Call(method="PUT", path=f"{_adapter(user_id, name)}/canary", body=body, parse=decoder(Adapter))


def end_canary(user_id: str, *, name: str = DEFAULT_ADAPTER) -> Call[Adapter]:
    return Call(method="DELETE", path=f"{_adapter(user_id, name)}/canary", parse=decoder(Adapter))


def pin(
    user_id: str, tier: PinTier = "host", until: str | None = None, *, name: str = DEFAULT_ADAPTER
) -> Call[Adapter]:
    body = {"tier": tier, "until": until}
    return Call(method="PUT", path=f"{_adapter(user_id, name)}/pin", body=body, parse=decoder(Adapter))


def unpin(user_id: str, *, name: str = DEFAULT_ADAPTER) -> Call[Adapter]:
    return Call(method="DELETE", path=f"{_adapter(user_id, name)}/pin", parse=decoder(Adapter))


def delete(user_id: str, version: int, *, name: str = DEFAULT_ADAPTER) -> Call[Receipt]:
    return Call(method="DELETE", path=_version(user_id, name, version), parse=decoder(Receipt))


def users(*, after: str | None = None, limit: int = 100) -> Call[list[User]]:
    return Call(method="GET", path="/v1/users", query=_page(after, limit), parse=list_decoder(User))


def user(user_id: str) -> Call[User]:
    return Call(method="GET", path=_user(user_id), parse=decoder(User))


def update_user(
    user_id: str,
    *,
    fallback: Fallback | UnsetType | None = UNSET,
    limits: dict[str, object] | UnsetType | None = UNSET,
    metadata: dict[str, object] | UnsetType | None = UNSET,
) -> Call[User]:
    given = {"fallback": fallback, "limits": limits, "metadata": metadata}
    body = {name: value for name, value in given.items() if value is not UNSET}
    return Call(method="PATCH", path=_user(user_id), body=body, parse=decoder(User))


def delete_user(user_id: str) -> Call[Receipt]:
    return Call(method="DELETE", path=_user(user_id), parse=decoder(Receipt))


def deletion(deletion_id: str) -> Call[Receipt]:
    path = f"/v1/deletions/{quote(deletion_id, safe='')}"
    return Call(method="GET", path=path, parse=decoder(Receipt))


def status() -> Call[FleetStatus]:
    return Call(method="GET", path="/v1/status", parse=decoder(FleetStatus))


def warmup(user_id: str | None = None, *, name: str = DEFAULT_ADAPTER) -> Call[Warm]:
    body = {"user_id": user_id, "name": name}
    return Call(method="POST", path="/v1/warmup", body=body, parse=decoder(Warm))


def chat(
    user_id: str | None, messages: ChatMessages, asking: Asking, *, stream: bool = False
) -> Call[Answer]:
    return _ask("/v1/chat/completions", user_id, {"messages": list(messages)}, asking, stream=stream)


def complete(user_id: str | None, prompt: str | Sequence[int], asking: Asking) -> Call[Answer]:
    call = _ask("/v1/completions", user_id, {"prompt": prompt}, asking, stream=False)
    return dataclasses.replace(call, parse=lambda content: parse_answer(content, asking.get("logprobs")))


def _ask(
    path: str, user_id: str | None, body: dict[str, object], asking: Asking, *, stream: bool
) -> Call[Answer]:
    streaming = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    name = check_adapter_name(asking.get("name", DEFAULT_ADAPTER))
    if user_id is not None and name != DEFAULT_ADAPTER:
        body["model"] = f"user:{user_id}/{name}"
    headers = {
        "X-User-Id": None if user_id is None else check_user_id(user_id),
        "X-Adapter-Version": asking.get("version"),
        "X-Fallback": asking.get("fallback"),
        "X-Session-Id": asking.get("session_id"),
    }
    return Call(
        method="POST",
        path=path,
        headers=_given(headers),
        body={**body, **parameters(asking), **streaming},
        parse=parse_answer,
    )


def _user(user_id: str) -> str:
    return f"/v1/users/{quote(check_user_id(user_id), safe='')}"


def _adapter(user_id: str, name: str) -> str:
    return f"{_user(user_id)}/adapters/{check_adapter_name(name)}"


def _version(user_id: str, name: str, version: int) -> str:
    return f"{_adapter(user_id, name)}/versions/{int(version)}"


def _given(headers: Mapping[str, object]) -> dict[str, str]:
    """Headers that have a value."""
    return {name: str(value) for name, value in headers.items() if value is not None}


def _page(after: object, limit: int) -> dict[str, str]:
    return {"limit": str(limit), **({} if after is None else {"after": str(after)})}


def _ascii_json(value: object) -> str:
    """JSON that fits into a header."""
    text = msgspec.json.encode(value).decode()
    return "".join(char if char.isascii() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    units = char.encode("utf-16-be")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))
