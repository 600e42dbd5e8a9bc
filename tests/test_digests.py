"""``Content-Digest``: what is said of a body holds, or the body is refused."""

from __future__ import annotations

import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_kit import run_async
from tunefleet.digests import ContentDigest
from tunefleet.errors import RequestInvalid

BODY = b"the body"


def digest(name: str = "sha-256", body: bytes = BODY) -> str:
    value = base64.b64encode(hashlib.new(name.replace("-", ""), body).digest()).decode()
    return f"{name}=:{value}:"


def check(*headers: str, body: bytes = BODY) -> None:
    async def chunks():  # type: ignore[no-untyped-def]
        for at in range(len(body)):
            yield body[at : at + 1]

    @run_async
    async def run() -> None:
        content = ContentDigest(headers)
        assert body == b"".join([chunk async for chunk in content.watch(chunks())])
        content.check()

    run()


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (digest(),),
        (digest("sha-512"),),
        (f"{digest()}, {digest('sha-512')}",),
        (digest(), digest("sha-512")),
        (f"md5=:AAAA:,{digest()}",),
        (f"{digest()} ,\tunixsum=:AA==:;a=1; b",),
        (digest().replace("=:", ":").replace("sha-256:", "sha-256=:"),),  # padding may be left out
        (f"  {digest()}  ",),
        (f"{digest(body=b'x')}, {digest()}",),  # the last of a name counts, as in every RFC 8941 dictionary
    ],
)
def test_what_is_true_passes_and_other_algorithms_are_ignored(headers: tuple[str, ...]) -> None:
    check(*headers)


@pytest.mark.parametrize(
    "header",
    [digest(body=b"x"), digest("sha-512", b"x"), f"{digest()}, {digest('sha-512', b'x')}", digest(body=b"")],
)
def test_what_is_false_is_a_mismatch(header: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        check(header)
    assert (caught.value.code, caught.value.param) == ("digest_mismatch", "Content-Digest")


@pytest.mark.parametrize(
    "header",
    [
        "",
        ",",
        "sha-256",
        "sha-256=",
        "sha-256=::",
        "sha-256=:A:",
        "sha-256=:AAAA:",
        f"sha-256=:{'A' * 44}:",
        "md5=:AAAA:",
        digest().upper(),
        digest().rstrip(":"),
        digest().replace(":", '"'),
        f"{digest()},",
        f"{digest()} {digest('sha-512')}",
        f"{digest()}, rubbish",
        f"{digest()}, sha-512=:AAAA:",
        f"{digest()}, md5=:é:",
        f"{digest()}{', md5=:AAAA:' * 1000}",
    ],
)
def test_what_makes_no_sense_is_refused(header: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        ContentDigest([header])
    assert (caught.value.code, caught.value.param) == ("invalid_digest", "Content-Digest")


@given(st.lists(st.text(max_size=200), min_size=1, max_size=3))
def test_any_text_is_refused_or_checked(headers: list[str]) -> None:
    with pytest.raises(RequestInvalid):
        check(*headers)
