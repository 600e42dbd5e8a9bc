"""What a ``s3://`` store URL says."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from tunefleet.errors import ConfigError

SHAPE = "s3://bucket/prefix?endpoint=http://host:9000"
PARAMETERS = {
    "endpoint": "http:// or https:// and the store's host and port; AWS where it is absent",
    "public_endpoint": "the endpoint as clients reach it, for presigned uploads",
    "region": "the bucket's region; AWS_REGION, AWS_DEFAULT_REGION or us-east-1 where it is absent",
    "ca": "a file of CA certificates to trust instead of the usual ones",
    "sse": "server-side encryption: AES256, or aws:kms: and a key's id",
    "style": "path (host/bucket) or virtual (bucket.host)",
}
_BUCKET = re.compile(r"(?!.*(?:\.\.|\.-|-\.))(?!(?:\d+\.){3}\d+$)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._\-]*/)*")
_REGION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_SSE = re.compile(r"AES256|aws:kms:(?P<key>\S+)")


@dataclass(frozen=True, kw_only=True)
class S3Location:
    """A bucket, or the part of one under a prefix, and how to talk to its server."""

    bucket: str
    prefix: str = ""  # empty, or with its last slash
    endpoint: str
    public_endpoint: str
    region: str
    ca: str | None = None
    sse: str | None = None  # "AES256" or "aws:kms:<key>"
    style: Literal["path", "virtual"] = "path"

    @property
    def kms_key(self) -> str | None:
        """The key of ``aws:kms``."""
        found = _SSE.fullmatch(self.sse or "")
        return found["key"] if found else None


def parse_s3_url(store_url: str, environment: Mapping[str, str] = os.environ) -> S3Location:
    """The place that a ``s3://`` URL names.

    Raises:
        ConfigError: something that isn't understood; nothing in a URL is ignored.
    """
    try:
        parts = urlsplit(store_url)
    except ValueError:
        raise _wrong("is no URL") from None  # the cause holds part of it, maybe a secret
    if "@" in parts.netloc:
        raise _wrong(
            "must not hold credentials, since URLs are logged: set AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY instead"
        )
    if parts.fragment:
        raise _wrong("has a '#': write %23 if it belongs to a parameter")
    parameters = _parameters(parts)
    region = _region(parameters, environment)
    endpoint = _endpoint(parameters, "endpoint", f"https://s3.{region}.amazonaws.com")
    return S3Location(
        bucket=_bucket(parts),
        prefix=_prefix(parts),
        endpoint=endpoint,
        public_endpoint=_endpoint(parameters, "public_endpoint", endpoint),
        region=region,
        ca=_ca(parameters),
        sse=_sse(parameters),
        style=_style(parameters),
    )


def _parameters(parts: SplitResult) -> dict[str, str]:
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    parameters = dict(pairs)
    for name, value in pairs:
        if name not in PARAMETERS:
            raise _wrong(f"has an unknown parameter {name[:40]!r}; known are {', '.join(PARAMETERS)}")
        if not value or parameters[name] != value:
            raise _wrong(f"must give {name} one value: {PARAMETERS[name]}")
    return parameters


def _bucket(parts: SplitResult) -> str:
    if _BUCKET.fullmatch(parts.netloc):
        return parts.netloc
    if not parts.netloc:
        raise _wrong("names no bucket")
    named = re.sub(r"[:%].*", "…", parts.netloc)  # what follows may be a secret
    raise _wrong(f"names bucket {named[:80]!r}: 3 to 63 of a-z 0-9 . - are a bucket's name")


def _prefix(parts: SplitResult) -> str:
    prefix = unquote(parts.path).strip("/")
    prefix = f"{prefix}/" if prefix else ""
    if len(prefix) <= 300 and _PREFIX.fullmatch(prefix):
        return prefix
    raise _wrong("has a prefix that isn't names of A-Z a-z 0-9 . _ - with slashes between, 300 at most")


def _region(parameters: Mapping[str, str], environment: Mapping[str, str]) -> str:
    usual = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or "us-east-1"
    region = parameters.get("region", usual)
    if _REGION.fullmatch(region):
        return region
    raise _wrong(f"has region {region[:80]!r}, which is no region's name")


def _endpoint(parameters: Mapping[str, str], name: str, default: str) -> str:
    endpoint = parameters.get(name, default).rstrip("/")
    try:
        parts = urlsplit(endpoint)
        is_bare = f"{parts.scheme}://{parts.netloc}" == endpoint and "@" not in endpoint
        if is_bare and parts.hostname and parts.port != 0 and parts.scheme in {"http", "https"}:
            return endpoint
    except ValueError:  # no port's number
        pass
    raise _wrong(f"must give {name} as http://host:port or https://host:port, and nothing after it")


def _ca(parameters: Mapping[str, str]) -> str | None:
    ca = parameters.get("ca")
    if ca is not None and not os.path.isfile(ca):
        raise _wrong(f"has ca={ca}, but there is no such file")
    return ca


def _sse(parameters: Mapping[str, str]) -> str | None:
    sse = parameters.get("sse")
    if sse is None or _SSE.fullmatch(sse):
        return sse
    raise _wrong(f"has sse={sse[:40]}; it may be AES256 or aws:kms:<key>")


def _style(parameters: Mapping[str, str]) -> Literal["path", "virtual"]:
    style = parameters.get("style", "path")
    if style not in {"path", "virtual"}:
        raise _wrong(f"has style={style[:40]}; it may be path or virtual")
    return cast(Literal["path", "virtual"], style)


def _wrong(what: str) -> ConfigError:
    return ConfigError(f"store_url {what}. It looks like {SHAPE}", param="store_url")
