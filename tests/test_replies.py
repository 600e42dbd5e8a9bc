"""Errors come out of a client as they went into the server."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tunefleet
from tunefleet import errors
from tunefleet.errors import CapacityError, ConfigError, TunefleetError
from tunefleet.http.errors import error_response
from tunefleet.replies import raise_for

PACKAGE = Path(tunefleet.__file__).parent
KINDS = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, TunefleetError) and kind is not ConfigError
}  # a ConfigError is the start's: no client sees it
ROOTS = (
    [PACKAGE / name for name in ("adapters_store", "runtime")]
    if (PACKAGE / "runtime").is_dir()
    else [PACKAGE.parent / name for name in ("adapters_store", "runtime")]
)


def raised() -> set[tuple[str, str]]:
    """Class and code of each error that the product raises with a code that stands there."""
    found = set()
    for path in (path for root in (PACKAGE, *ROOTS) for path in root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS:
                found |= {
                    (node.func.id, word.value.value)
                    for word in node.keywords
                    if word.arg == "code" and isinstance(word.value, ast.Constant)
                }
    return found


def an_error(kind: str, code: str) -> TunefleetError:
    cls = getattr(errors, kind)
    extra = {"retry_after_s": 1.0} if issubclass(cls, CapacityError) else {}
    error: TunefleetError = cls("what to do", code=code, **extra)
    return error


@pytest.mark.parametrize(("kind", "code"), sorted(raised()))
def test_a_client_raises_what_the_server_raised(kind: str, code: str) -> None:
    error = an_error(kind, code)
    response = error_response(error)
    with pytest.raises(TunefleetError) as again_raised:
        raise_for(response.status_code, bytes(response.body), response.headers.get("retry-after"))
    again = again_raised.value
    assert (type(error), error.code, error.message) == (type(again), again.code, again.message)
