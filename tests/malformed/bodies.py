"""Multipart bodies, wrongly framed ones too."""

from __future__ import annotations

from typing import Any, NamedTuple

from tunefleet.core import ADAPTER_FILES


def multipart(*parts: tuple[str, bytes], boundary: str = "b", end: str = "--b--\r\n") -> dict[str, Any]:
    body = b"".join(
        f"--b\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + content + b"\r\n"
        for disposition, content in parts
    )
    return {
        "content": body + end.encode(),
        "headers": {"content-type": f"multipart/form-data; boundary={boundary}"},
    }


def part(name: str, content: bytes, file: str | None = None) -> tuple[str, bytes]:
    named = f'form-data; name="{name}"' + (f'; filename="{file}"' if file else "")
    return named, content


NO_METADATA = "invalid_metadata"


class BadBody(NamedTuple):
    """What to send, and what its refusal says."""

    request: dict[str, Any]
    says: str
    code: str = "invalid_multipart"


def bad_multiparts(files: dict[str, bytes]) -> dict[str, BadBody]:
    config, weights = (part(name, files[name], name) for name in ADAPTER_FILES)
    ordinary = multipart(config, weights)

    def framed(content: bytes) -> dict[str, Any]:
        return {**ordinary, "content": content}

    def typed(kind: str) -> dict[str, Any]:
        return {**ordinary, "headers": {"content-type": kind}}

    def with_part(name: str, content: bytes = b"x") -> dict[str, Any]:
        return multipart(config, weights, part(name, content))

    return {
        "nothing": BadBody(framed(b""), "ends before its last boundary"),
        "no end": BadBody(multipart(config, weights, end=""), "ends before its last boundary"),
        "cut in the weights": BadBody(
            multipart(config, (weights[0], weights[1][:50]), end=""), "ends before its last boundary"
        ),
        **{
            f"cut at {share:.0%}": BadBody(
                framed(ordinary["content"][: int(len(ordinary["content"]) * share)]),
                "ends before its last boundary",
            )
            for share in (0.01, 0.5, 0.99)
        },
        "another boundary": BadBody(multipart(config, weights, boundary="other"), "boundary"),
        "no boundary": BadBody(typed("multipart/form-data"), "needs a boundary"),
        "empty boundary": BadBody(typed("multipart/form-data; boundary="), "needs a boundary"),
        "boundary of 5 kB": BadBody(typed(f"multipart/form-data; boundary={'b' * 5000}"), "Boundary length"),
        "unknown part": BadBody(with_part("extra"), "not 'extra'"),
        "unnamed part": BadBody(multipart(config, weights, ("form-data", b"x")), "not ''"),
        "path as part": BadBody(with_part("../../x"), "not '../../x'"),
        "NUL in a part's name": BadBody(with_part("adapter_config.json\0"), "json.x00'"),
        "a part's name twin": BadBody(with_part("adapter_con\uff46ig.json"), "an upload has the parts"),
        "a part twice": BadBody(multipart(config, config, weights), "'adapter_config.json' comes twice"),
        "metadata twice": BadBody(
            multipart(part("metadata", b"{}"), part("metadata", b"{}"), config, weights),
            "'metadata' comes twice",
        ),
        "part's header of 20 kB": BadBody(
            multipart(config, (f'form-data; name="metadata"; x="{"y" * 20_000}"', b"{}")), "header"
        ),
        "part with 1000 headers": BadBody(
            multipart(("form-data" + "\r\nX: y" * 1000, b""), config, weights), "header"
        ),
        "1001 parts": BadBody(multipart(*[part(f"f{number}", b"") for number in range(1001)]), "not 'f0'"),
        "preamble flood": BadBody(framed(b"x" * 100_000), "malformed"),
        "metadata is no JSON": BadBody(
            with_part("metadata", b"{"), "metadata must be a JSON", "invalid_metadata"
        ),
        "metadata is a list": BadBody(
            with_part("metadata", b"[]"), "metadata must be a JSON", "invalid_metadata"
        ),
        "metadata of 5 kB": BadBody(
            with_part("metadata", b'{"x": "' + b"y" * 5000 + b'"}'),
            "metadata may have 4096",
            "invalid_metadata",
        ),
    }
