"""Who is the user of a request, and which of their adapters answers."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal, NamedTuple

from tunefleet.core import DEFAULT_ADAPTER, DEFAULT_TENANT, check_adapter_name, check_tenant, check_user_id
from tunefleet.errors import AdapterNotFound, RequestInvalid

Fallback = Literal["none", "base"]
_SESSION = re.compile(r"[!-~]{1,128}")


class Target(NamedTuple):
    """One adapter of one user, or the base where ``user_id`` is None."""

    user_id: str | None
    name: str = DEFAULT_ADAPTER
    tenant: str = DEFAULT_TENANT
    version: int | None = None  # None: the live one
    fallback: Fallback | None = None  # None: the user's own, else the deployment's
    session: str | None = None  # what a canary sticks to; None: the request

    def checked(self) -> Target:
        """Returns itself, or raises RequestInvalid for names that can't exist."""
        if self.user_id is not None:
            check_user_id(self.user_id)
        check_adapter_name(self.name)
        check_tenant(self.tenant)
        if self.user_id is None and (self.version is not None or self.name != DEFAULT_ADAPTER):
            param = "name" if self.version is None else "version"
            raise RequestInvalid("the base has neither names nor versions: say which user", param=param)
        if self.version is not None and (isinstance(self.version, bool) or self.version < 1):
            raise RequestInvalid("versions are 1, 2, 3 ...", param="version")
        if self.fallback not in {None, "none", "base"}:
            raise RequestInvalid("fallback is base or none", param="fallback")
        if self.session is not None and not _SESSION.fullmatch(self.session):
            raise RequestInvalid(
                "a session's id is 1 to 128 printable ASCII characters without spaces",
                code="invalid_session_id",
                param="session_id",
            )
        return self


class Choice(NamedTuple):
    user_id: str | None
    name: str


def choose_user(
    *, own: str | None, header: str | None, model: str | None, base_names: Collection[str]
) -> Choice:
    """The contract's order: the caller's own user, ``X-User-Id``, then ``model: "user:<id>[/<name>]"``.

    Raises:
        RequestInvalid: two different users (``user_mismatch``), or an id or name that can't exist.
        AdapterNotFound: a model that is neither the base nor a user's (``model_not_found``).
    """
    named = _user_of_model(model, base_names)
    users = [user for user in (own, header, named.user_id) if user is not None]
    for user in users:
        check_user_id(user)
    if len(set(users)) > 1:
        raise RequestInvalid(
            "the credential, X-User-Id and model name different users", code="user_mismatch", param="model"
        )
    return Choice(users[0] if users else None, check_adapter_name(named.name))


def _user_of_model(model: str | None, base_names: Collection[str]) -> Choice:
    if model is None or model in base_names:
        return Choice(None, DEFAULT_ADAPTER)
    kind, _, rest = model.partition(":")
    if kind != "user":
        raise AdapterNotFound(
            f"no model {model!r}: use {next(iter(base_names), 'the base')!r} or 'user:<id>'",
            code="model_not_found",
            param="model",
        )
    user_id, slash, name = rest.partition("/")
    return Choice(user_id, name if slash else DEFAULT_ADAPTER)
