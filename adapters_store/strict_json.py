"""JSON from strangers: bounded in depth, no duplicate keys, no NaN or Infinity, text that is Unicode."""

from __future__ import annotations

import json
import re
from typing import NoReturn, TypeAlias

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"

_STRING = re.compile(
    r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL
)  # an open string runs to the end: linear time
_BRACKET = re.compile(r"[\[\]{}]")
_MAX_DIGITS = 40  # no field of ours needs more; Python's own limit is 4300


class JsonInvalid(ValueError):
    """The text is not JSON that we accept; callers turn this into their own error."""


def parse_object(raw: bytes, *, max_depth: int) -> dict[str, JsonValue]:
    """Parses one JSON object.

    Raises:
        JsonInvalid: anything else than one plain JSON object in UTF-8.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonInvalid("it is not UTF-8 text") from error
    if not text.startswith("{"):
        text = text.lstrip(" \t\r\n")
        if not text.startswith("{"):
            raise JsonInvalid("it is not a JSON object")
    _check_depth(text, max_depth)
    try:
        value: dict[str, JsonValue] = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
        )
    except JsonInvalid:
        raise
    except (ValueError, RecursionError) as error:
        raise JsonInvalid(f"it is not valid JSON ({error})") from error
    return value


def shown(text: str, limit: int = 120) -> str:
    """``text`` from a stranger, fit for a message: printable ASCII in quotes, cut short."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return ascii(cut)


def _check_depth(text: str, max_depth: int) -> None:
    """Brackets outside strings, before the parser recurses into them."""
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if bracket.group() in "[{" else -1
        if depth > max_depth:
            raise JsonInvalid(f"it nests deeper than {max_depth} levels")


def _unique(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    found: dict[str, JsonValue] = {}
    for key, value in pairs:
        if key in found:
            raise JsonInvalid(f"it has the key {shown(key)} twice")
        _check_text(key)
        if isinstance(value, str):
            _check_text(value)
        found[key] = value
    return found


def _check_text(text: str) -> None:
    """Half a surrogate pair is legal in JSON and can't be written as UTF-8 again."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise JsonInvalid(f"{shown(text)} is not Unicode text") from error


def _refuse_constant(name: str) -> NoReturn:
    raise JsonInvalid(f"it holds {name}, which is not JSON")


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise JsonInvalid(f"it holds a number of {len(digits)} digits")
    if digits == "-0":
        raise JsonInvalid("it holds the number -0")
    return int(digits)
