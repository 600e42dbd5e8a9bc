"""Two real S3 servers for tests: the JuiceFS gateway, which is MinIO's own front end, and SeaweedFS.

Each starts in a folder of its own at first use, on ports that the system chooses, and can be killed and
started again. ``make_bucket`` gives every test a bucket of its own.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import urllib3
from minio import Minio
from minio.commonconfig import ENABLED
from minio.versioningconfig import VersioningConfig

ACCESS_KEY = "minioadmin"
SECRET_KEY = "minioadmin"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
_READY_S = 60.0
_numbers = itertools.count(1)


class S3Server:
    """A server's process; ``start`` and ``kill`` may alternate, what was stored stays."""

    name: str
    ready_path: str
    num_ports: int

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = free_ports(self.num_ports)
        self.endpoint = f"http://127.0.0.1:{self.ports[0]}"
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                cwd=self.folder,
                env={**os.environ, "MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": SECRET_KEY},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait()

    def kill(self) -> None:
        """SIGKILL, as a crash; all that was acknowledged must be there after the next start."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def client(self) -> Minio:
        """An administrator's, with the SDK's own settings but for the retries."""
        return Minio(
            self.endpoint.removeprefix("http://"),
            ACCESS_KEY,
            SECRET_KEY,
            secure=False,
            region="us-east-1",
            http_client=urllib3.PoolManager(timeout=20, retries=urllib3.Retry(total=3, backoff_factor=0.2)),
        )

    def make_bucket(self, *, versioned: bool = False, locked: bool = False) -> str:
        bucket = f"test-{os.getpid()}-{next(_numbers)}"
        client = self.client()
        client.make_bucket(bucket, object_lock=locked)
        if versioned and not locked:
            client.set_bucket_versioning(bucket, VersioningConfig(ENABLED))
        return bucket

    @functools.cached_property
    def shared_bucket(self) -> str:
        """For tests that take a prefix of their own; buckets are dearer."""
        return self.make_bucket()

    def url(self, bucket: str, prefix: str = "", **parameters: str) -> str:
        """A ``store_url``; parameters may replace the endpoint."""
        query = urlencode({"endpoint": self.endpoint, **parameters})
        return f"s3://{bucket}/{prefix}?{query}"

    def _is_ready(self, pool: urllib3.PoolManager) -> bool:
        return pool.request("GET", f"{self.endpoint}{self.ready_path}").status == 200

    def _wait(self) -> None:
        deadline = time.monotonic() + _READY_S
        with urllib3.PoolManager(timeout=5, retries=False) as pool:
            while time.monotonic() < deadline:
                assert self._process is not None
                if self._process.poll() is not None:
                    break
                with contextlib.suppress(urllib3.exceptions.HTTPError):
                    if self._is_ready(pool):
                        return
                time.sleep(0.05)  # nothing tells us when another program is ready
        log = (self.folder / "log").read_text(errors="replace")
        self.kill()
        raise AssertionError(f"{self.name} doesn't start:\n{log[-3000:]}")


class JuiceFS(S3Server):
    """MinIO's S3 front end of 2021 over a folder: no versions, conditional puts are ignored."""

    name = "juicefs"
    ready_path = "/minio/health/live"
    num_ports = 2

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._meta = f"sqlite3://{folder}/meta.db"
        subprocess.run(
            [
                *(_program("juicefs"), "format", "--storage", "file", "--bucket", f"{folder}/data/"),
                *("--trash-days", "0", self._meta, "testvol"),
            ],
            check=True,
            capture_output=True,
        )

    def command(self) -> list[str]:
        gateway, metrics = self.ports
        return [
            *(_program("juicefs"), "gateway", self._meta, f"127.0.0.1:{gateway}", "--multi-buckets"),
            *("--keep-etag", "--object-meta", "--object-tag", "--no-usage-report", "--no-banner"),
            *("--backup-meta", "0", "--cache-dir", f"{self.folder}/cache", "--cache-size", "256"),
            *("--buffer-size", "64M", "--log", f"{self.folder}/gateway.log"),
            *("--metrics", f"127.0.0.1:{metrics}"),
        ]


class SeaweedFS(S3Server):
    """Today's semantics: versions, object locks, conditional puts, checksums."""

    name = "seaweedfs"
    ready_path = "/healthz"
    num_ports = 8

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        identity = {
            "name": "admin",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (folder / "data").mkdir()

    def _is_ready(self, pool: urllib3.PoolManager) -> bool:
        """Also has the volumes back: after a restart the front end is up before them."""
        if not super()._is_ready(pool):
            return False
        topology = pool.request("GET", f"http://127.0.0.1:{self.ports[1]}/dir/status").json()["Topology"]
        return bool(topology["DataCenters"])

    def command(self) -> list[str]:
        names = ("s3", "master", "volume", "filer")
        ports = [f"-{name}.port={port}" for name, port in zip(names, self.ports[:4], strict=True)]
        ports += [f"-{name}.port.grpc={port}" for name, port in zip(names, self.ports[4:], strict=True)]
        return [
            *(_program("weed"), "server", f"-dir={self.folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *("-master.telemetry=false", "-master.electionTimeout=1s", "-master.volumeSizeLimitMB=64"),
            *("-volume.max=200", "-volume.preStopSeconds=0", "-filer", "-s3"),
            *(f"-s3.config={self.folder}/s3.json", "-s3.allowDeleteBucketNotEmpty=false"),
            *("-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0", *ports),
        ]


@contextlib.contextmanager
def running(server: type[S3Server], folder: Path) -> Iterator[S3Server]:
    started = server(folder)
    try:
        started.start()
        yield started
    finally:
        started.kill()  # a graceful end takes SeaweedFS 10 s


def free_ports(num_ports: int) -> list[int]:
    """Ports that nobody listens on right now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num_ports)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)
