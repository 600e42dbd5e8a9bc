"""What callers of the store may say: numbers, pages, metadata."""

from __future__ import annotations

import json

from tunefleet.core import MAX_METADATA_BYTES
from tunefleet.errors import RequestInvalid

MAX_PAGE = 10_000


def check_metadata(metadata: dict[str, object], param: str = "metadata") -> dict[str, object]:
    """Returns ``metadata`` as it will be read back, or raises RequestInvalid (code ``invalid_<param>``)."""
    code = f"invalid_{param}"
    try:
        encoded = json.dumps(metadata, allow_nan=False, ensure_ascii=False).encode()
        decoded: object = json.loads(encoded)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestInvalid(f"{param} is not JSON: {error}", code=code, param=param) from error
    if not isinstance(decoded, dict) or len(encoded) > MAX_METADATA_BYTES:
        raise RequestInvalid(
            f"{param} must be a JSON object of at most {MAX_METADATA_BYTES} bytes", code=code, param=param
        )
    return decoded


def check_number(value: int, param: str = "version") -> int:
    if isinstance(value, bool) or not 1 <= value < 2**31:
        raise RequestInvalid(
            f"{param} must be a version number from 1 on", code="invalid_version", param=param
        )
    return value


def check_limit(limit: int) -> int:
    if not 1 <= limit <= MAX_PAGE:
        raise RequestInvalid(f"limit must be 1 to {MAX_PAGE}", code="invalid_limit", param="limit")
    return limit
