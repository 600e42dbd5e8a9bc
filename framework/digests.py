"""RFC 9530's ``Content-Digest``: what a body's bytes must hash to."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import AsyncIterator, Iterable

from tunefleet.errors import RequestInvalid

HEADER = "Content-Digest"
_LENGTHS = {"sha-256": 32, "sha-512": 64}  # bytes, of the algorithms that are checked
_MAX_HEADER_CHARS = 4096
_MEMBER = re.compile(  # RFC 8941: a key, a byte sequence, parameters
    r"([a-z*][a-z0-9_.*-]*)=:([A-Za-z0-9+/]*={0,2}):"
    r"(?:; *[a-z*][a-z0-9_.*-]*(?:=[!#-+\--:<-~]+)?)*"
)
_BETWEEN = re.compile(r"[ \t]*,[ \t]*")


class ContentDigest:
    """The digests of one body, which passes through ``watch`` once.

    Algorithms that nobody checks any more (md5, unixsum ...) are ignored beside sha-256 or sha-512; alone
    they would promise what isn't done, and are refused.
    """

    def __init__(self, headers: Iterable[str]) -> None:
        """Takes all lines of the header; raises RequestInvalid (``invalid_digest``) if they make no sense."""
        lines = list(headers)
        self._expected = _parse(", ".join(lines)) if lines else {}
        self._hashers = {name: hashlib.new(name.replace("-", "")) for name in self._expected}

    async def watch(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            for hasher in self._hashers.values():
                hasher.update(chunk)
            yield chunk

    def check(self) -> None:
        """Raises RequestInvalid (``digest_mismatch``) if other bytes passed."""
        for name, hasher in self._hashers.items():
            if hasher.digest() != self._expected[name]:
                raise RequestInvalid(
                    f"the body's {name} is not what Content-Digest says: send it again",
                    code="digest_mismatch",
                    param=HEADER,
                )


def _parse(text: str) -> dict[str, bytes]:
    members = [_MEMBER.fullmatch(member) for member in _BETWEEN.split(text[:_MAX_HEADER_CHARS].strip(" \t"))]
    try:
        digests = {
            member[1]: base64.b64decode(member[2] + "=" * (-len(member[2]) % 4), validate=True)
            for member in members
            if member is not None
        }
    except binascii.Error:
        digests = {}
    checked = {name: digests[name] for name in _LENGTHS if name in digests}
    whole = None not in members and len(text) <= _MAX_HEADER_CHARS
    if whole and checked and all(len(digest) == _LENGTHS[name] for name, digest in checked.items()):
        return checked
    raise RequestInvalid(
        "Content-Digest must look like sha-256=:<base64>: or sha-512=:<base64>:",
        code="invalid_digest",
        param=HEADER,
    )
