from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunefleet.adapters_store.strict_json import JsonInvalid, parse_object, shown

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=10,
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), PLAIN, max_size=5))
@settings(max_examples=100, deadline=None)
def test_ordinary_objects_are_read_as_json_reads_them(value: dict[str, object]) -> None:
    assert value == parse_object(json.dumps(value).encode(), max_depth=50)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b"\xef\xbb\xbf{}", "not a JSON object"),
        (b"\xff{}", "not UTF-8"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' twice"),
        (b'{"x": {"a": 1, "a": 2}}', "'a' twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": -0}', "-0"),
        (b'{"a": ' + b"1" * 5000 + b"}", "5000 digits"),
        (b'{"a": "\\ud800"}', "not Unicode"),
        (b'{"\\ud800": 1}', "not Unicode"),
        (b'{"a": ' + b"[" * 9 + b"]" * 9 + b"}", "deeper than 8"),
        (b'{"a":' * 100_000, "deeper than 8"),
    ],
)
def test_odd_json_is_refused_with_its_reason(raw: bytes, problem: str) -> None:
    with pytest.raises(JsonInvalid, match=problem):
        parse_object(raw, max_depth=8)


def test_brackets_inside_strings_are_not_depth() -> None:
    assert parse_object(b'{"a": "[[[[\\\\\\"[[["}', max_depth=1) == {"a": '[[[[\\"[[['}


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_random_bytes_raise_nothing_else(raw: bytes) -> None:
    with contextlib.suppress(JsonInvalid):
        parse_object(b"{" + raw, max_depth=8)


def test_shown_text_is_short_printable_ascii() -> None:
    assert shown("a\0\u2028bc", limit=3) == "'a\\x00\\u2028...'"
