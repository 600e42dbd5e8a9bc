"""The minio SDK's client for one bucket, with our timeouts, retries and credentials."""

from __future__ import annotations

import configparser
import os
from typing import NamedTuple
from urllib.parse import urlsplit

import certifi
import urllib3
from minio import Minio
from minio.credentials.credentials import Credentials
from minio.credentials.providers import (
    AWSConfigProvider,
    ChainedProvider,
    EnvAWSProvider,
    EnvMinioProvider,
    IamAwsProvider,
    Provider,
)
from minio.sse import Sse, SseKMS, SseS3
from urllib3.util import Retry, Timeout

from tunefleet.adapters_store.s3_errors import DENIED
from tunefleet.adapters_store.s3_url import S3Location
from tunefleet.errors import StoreError

NUM_CONNECTIONS = 32  # kept open; more are made, and closed after use
_BUSY = (500, 502, 503, 504)


class Patience(NamedTuple):
    """How long one try may take to connect, and to bring its next bytes; how often to try again."""

    connect_s: float = 2.0
    read_s: float = 30.0
    num_retries: int = 2


class Clients(NamedTuple):
    """Of one process: sockets don't survive a fork."""

    pid: int
    pool: urllib3.PoolManager
    inner: Minio
    public: Minio  # for URLs that others use


class UsualCredentials(Provider):
    """AWS_* or MINIO_* variables, the AWS credentials file, the machine's role; looked for at first use."""

    def __init__(self) -> None:
        self._chain: ChainedProvider | None = None

    def retrieve(self) -> Credentials:
        try:
            self._chain = self._chain or ChainedProvider([*_sources()])
            return self._chain.retrieve()
        except (ValueError, OSError, urllib3.exceptions.HTTPError, configparser.Error, KeyError) as error:
            raise StoreError(
                "there are no credentials for the store: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or"
                " write ~/.aws/credentials, or give the machine a role",
                code=DENIED,
            ) from error

    def forget(self) -> None:
        """They were refused: look again at the next use, they may have been renewed."""
        self._chain = None


def make_clients(location: S3Location, credentials: Provider, patience: Patience) -> Clients:
    pool = _pool(patience, location.ca)
    return Clients(
        os.getpid(),
        pool,
        _client(location, location.endpoint, credentials, pool),
        _client(location, location.public_endpoint, credentials, pool),
    )


def encryption(location: S3Location) -> Sse | None:
    """What the server is asked to encrypt with."""
    if location.sse is None:
        return None
    return SseS3() if location.kms_key is None else SseKMS(location.kms_key, {})


def _client(location: S3Location, endpoint: str, credentials: Provider, pool: urllib3.PoolManager) -> Minio:
    parts = urlsplit(endpoint)
    client = Minio(
        parts.netloc,
        secure=parts.scheme == "https",
        region=location.region,  # else each bucket's is asked for
        http_client=pool,
        credentials=credentials,
    )
    if location.style == "virtual":
        client.enable_virtual_style_endpoint()  # type: ignore[no-untyped-call]
    else:
        client.disable_virtual_style_endpoint()  # type: ignore[no-untyped-call]
    return client


def _pool(patience: Patience, ca: str | None) -> urllib3.PoolManager:
    """Follows no redirect and no Retry-After: signed requests stay where they belong, and time is bounded."""
    retries = Retry(
        total=patience.num_retries,
        read=1,  # a kept connection that the server has closed looks like this
        redirect=False,
        backoff_factor=0.1,
        status_forcelist=_BUSY,
        respect_retry_after_header=False,
    )
    return urllib3.PoolManager(
        timeout=Timeout(connect=patience.connect_s, read=patience.read_s),
        maxsize=NUM_CONNECTIONS,
        retries=retries,
        cert_reqs="CERT_REQUIRED",
        ca_certs=ca or os.environ.get("SSL_CERT_FILE") or certifi.where(),
    )


def _sources() -> tuple[Provider, ...]:
    quick = urllib3.PoolManager(timeout=Timeout(connect=1, read=2), retries=Retry(total=0))
    return EnvAWSProvider(), EnvMinioProvider(), AWSConfigProvider(), IamAwsProvider(http_client=quick)
