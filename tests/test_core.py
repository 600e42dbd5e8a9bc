"""Ids: what is one, and that nothing else ever becomes a path, a key or somebody else's id."""

from __future__ import annotations

import posixpath
import string
from pathlib import Path

import pytest
from hypothesis import strategies as st

import hazards
from router_kit import Kit, api
from tunefleet.adapters_store.objects import new_upload_id, object_prefix
from tunefleet.core import check_adapter_name, check_tenant, check_user_id
from tunefleet.errors import RequestInvalid, StoreError

# The documented grammar, said another way than the code says it.
USER_LETTERS = string.ascii_letters + string.digits + "._~@:+=|-"
NAME_LETTERS = string.ascii_lowercase + string.digits + "_-"

HOSTILE = {
    "empty": "",
    "1 MB": "x" * 1_000_000,
    "129 letters": "x" * 129,
    "a dot": ".",
    "two dots": "..",
    "a slash": "a/b",
    "only a slash": "/",
    "up and away": "../bob",
    "encoded dots": "%2e%2e",
    "encoded slash": "a%2fb",
    "backslash": "a\\b",
    "NUL": "a\0b",
    "newline": "a\n",
    "newline within": "a\nb",
    "carriage return": "a\rX-User-Id: bob",
    "space": " alice",
    "case twin of nothing": "\u0131d",
    "unicode twin": "\u0430lice",  # a Cyrillic letter
    "NFC": "caf\u00e9",
    "NFD": "cafe\u0301",
    "zero width": "a\u200bb",
    "right to left": "\u202ealice",
    "fullwidth": "\uff41lice",
    "emoji": "\U0001f600",
    "half a surrogate pair": "\ud800",
    "SQL quote": "'; DROP TABLE users; --",
    "shell": "${HOME}",
    "template": "{{7*7}}",
    "format": "%s%n",
    "URL": "http://169.254.169.254/latest",
    "another store": "s3://other/key",
    "wildcard": "*",
    "comma": "a,b",
}
ODD_BUT_FINE = {
    "default": "default",
    "the base's name": "__base__",
    "leading dash": "-rf",
    "colon forms": "user:bob",
    "a colon alone": ":",
    "three dots": "...",
    "dots at the end": "a..",
    "a tilde": "~",
    "an e-mail address": "a+b@example.com",
    "longest": "x" * 128,
    "like a column": "a|b=c",
}


def is_user_id(text: str) -> bool:
    return 1 <= len(text) <= 128 and not set(text) - set(USER_LETTERS) and text not in (".", "..")


def is_adapter_name(text: str) -> bool:
    fits = 1 <= len(text) <= 64 and not set(text) - set(NAME_LETTERS)
    return fits and text[0] not in "_-"


@pytest.mark.parametrize("user_id", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_user_id_is_refused_shortly_and_not_repeated(user_id: str) -> None:
    with pytest.raises(RequestInvalid) as refusal:
        check_user_id(user_id)
    assert (refusal.value.code, refusal.value.param) == ("invalid_user_id", "user_id")
    assert len(refusal.value.message) < 200
    with pytest.raises(RequestInvalid):
        check_adapter_name(user_id)


@pytest.mark.parametrize("user_id", ODD_BUT_FINE.values(), ids=ODD_BUT_FINE)
def test_what_only_looks_special_is_an_id_like_any_other(user_id: str) -> None:
    assert user_id == check_user_id(user_id)


TEXTS = st.one_of(
    st.text(max_size=140),
    st.text(USER_LETTERS, max_size=140),
    st.text(NAME_LETTERS, max_size=70),
    st.text("./%\\:\0\n a1\u00e9", max_size=8),
    st.sampled_from(list({**HOSTILE, **ODD_BUT_FINE}.values())),
)


@hazards.examples(500)
def test_ids_are_taken_as_the_grammar_says_and_unchanged(num_examples: int) -> None:
    def check(text: str) -> None:
        for is_one, take in ((is_user_id, check_user_id), (is_adapter_name, check_adapter_name)):
            try:
                assert text == take(text)
            except RequestInvalid:
                assert not is_one(text)
            else:
                assert is_one(text)

    hazards.generate("E", num_examples, check, TEXTS)


@hazards.examples(100)
def test_an_id_in_a_path_is_one_part_of_it_and_comes_back_as_it_was(
    tmp_path: Path, num_examples: int
) -> None:
    """Nobody has an adapter: an id is named in its 404, or refused, or was no single part of a path."""

    def check(text: str) -> None:
        encoded = "".join(f"%{byte:02X}" for byte in text.encode(errors="surrogatepass"))
        response = client.get(f"/v1/users/{encoded}/adapter")
        error = response.json()["error"]
        if is_user_id(text):
            assert (response.status_code, error["code"]) == (404, "adapter_not_found")
            assert repr(text) in error["message"]
        else:
            assert (response.status_code, error["code"]) in ((422, "invalid_user_id"), (404, "not_found"))

    with api(Kit(tmp_path)) as client:
        hazards.generate("E", num_examples, check, TEXTS.filter(lambda text: len(text) < 1000))


@pytest.mark.parametrize("tenant", ["", "Acme", "a/b", "..", "-rf", "x" * 65, "catalogs", "staging"])
def test_what_is_no_tenant_is_refused(tenant: str) -> None:
    with pytest.raises(RequestInvalid) as refusal:
        check_tenant(tenant)
    assert (refusal.value.code, refusal.value.param) == ("invalid_tenant", "tenant")


@pytest.mark.parametrize("tenant", ["default", "acme-2", "a", "0_1", "x" * 64])
def test_a_tenant_is_taken_unchanged(tenant: str) -> None:
    assert tenant == check_tenant(tenant)


@hazards.examples(200)
def test_a_key_holds_no_user_and_never_leaves_the_store(num_examples: int) -> None:
    def check(tenant: str) -> None:
        digest, upload_id = "ab" * 32, new_upload_id()
        try:
            key = object_prefix(tenant, digest, upload_id)
        except StoreError as refusal:
            assert refusal.code == "invalid_key"  # noqa: PT017 (most examples are no tenants)
            return
        assert key == f"{tenant}/sha256/ab/{digest}/{upload_id}"
        assert key == posixpath.normpath(key)
        assert not key.startswith(("/", "."))

    hazards.generate("E", num_examples, check, TEXTS)
