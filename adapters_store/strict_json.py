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
_INNER_OBJECT = re.compile(r"\{[^{}]*\}")
_MAX_DIGITS = 40  # no field of ours needs more; Python's own limit is 4300


class JsonInvalid(ValueError):
    """The text is not JSON that we accept; callers turn this into their own error."""


def parse_object(
    raw: bytes, *, max_depth: int, max_keys: int | None = None, max_containers: int | None = None
) -> dict[str, JsonValue]:
    """Parses one JSON object. The limits hold before anything is made of the text.

    Args:
        max_keys: of the object itself (keys that nest deeper than one level count, too).
        max_containers: lists and objects in all.

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
    structure = _STRING.sub("", text)
    _check_counts(structure, max_keys, max_containers)
    _check_depth(structure, max_depth)
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


def _check_counts(structure: str, max_keys: int | None, max_containers: int | None) -> None:
    """What is counted costs no objects; ``structure`` is the text without its strings."""
    num_containers = structure.count("[") + structure.count("{")
    if max_containers is not None and num_containers > max_containers:
        raise JsonInvalid(f"it holds {num_containers} lists and objects, the limit is {max_containers}")
    if max_keys is None or structure.count(":") <= max_keys:
        return
    num_keys = _INNER_OBJECT.sub("", structure.removeprefix("{")).count(":")
    if num_keys > max_keys:
        raise JsonInvalid(f"it has {num_keys} keys, the limit is {max_keys}")


def _check_depth(structure: str, max_depth: int) -> None:
    """Brackets outside strings, before the parser recurses into them."""
    depth = 0
    for bracket in _BRACKET.finditer(structure):
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
