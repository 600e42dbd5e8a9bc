"""What only S3 has: versions, locks, credentials, and all the ways a server and its line can fail."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from minio.commonconfig import COMPLIANCE
from minio.retention import Retention

from fault_server import Fault, FaultServer, refusing
from object_kit import code_of, keys, read, written
from s3_servers import CREDENTIALS, JuiceFS, S3Server, SeaweedFS, running
from tunefleet.adapters_store.downloads import RANGE_BYTES, download
from tunefleet.adapters_store.objects import Deleted, ObjectStore, open_store
from tunefleet.adapters_store.s3_client import Patience
from tunefleet.adapters_store.s3_store import SINGLE_PUT_BYTES, S3Store
from tunefleet.adapters_store.s3_url import parse_s3_url
from tunefleet.errors import StoreError

pytestmark = pytest.mark.s3
KEY = "t/sha256/ab/abcd/u1/adapter_model.safetensors"
MIB = 1024 * 1024
HASTY = Patience(connect_s=1, read_s=0.3)  # for servers that answer nothing
_numbers = itertools.count()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return written(tmp_path / "source", b"content")


@pytest.fixture
def faults(juicefs: S3Server) -> Iterator[FaultServer]:
    with FaultServer(juicefs.endpoint) as server:
        yield server


@pytest.fixture
def behind(juicefs: S3Server, faults: FaultServer, source: Path) -> Iterator[S3Store]:
    """A store with one object, whose line may fail."""
    url = juicefs.url(juicefs.shared_bucket, f"faults/{next(_numbers)}", endpoint=faults.endpoint)
    store = S3Store(parse_s3_url(url))
    store.put(KEY, source)
    store.delete("t/none")  # so that the bucket has been asked for its versions
    yield store
    store.close()


@pytest.fixture
def versioned(seaweedfs: S3Server) -> Iterator[tuple[S3Server, str, ObjectStore]]:
    bucket = seaweedfs.make_bucket(versioned=True)
    store = open_store(seaweedfs.url(bucket, "p"))
    yield seaweedfs, bucket, store
    store.close()


def refusal(call: Callable[[], object]) -> StoreError:
    with pytest.raises(StoreError) as raised:
        call()
    return raised.value


def num_versions(server: S3Server, bucket: str) -> int:
    return len(list(server.client().list_objects(bucket, recursive=True, include_version=True)))


def test_every_version_goes_and_every_delete_marker(
    versioned: tuple[S3Server, str, ObjectStore], tmp_path: Path
) -> None:
    server, bucket, store = versioned
    for content in (b"one", b"two"):
        store.put("t/file", written(tmp_path / "source", content))
    server.client().remove_object(bucket, "p/t/file")
    store.put("t/file", written(tmp_path / "source", b"three"))
    store.put("t/file2", tmp_path / "source")
    assert num_versions(server, bucket) == 5
    assert store.delete("t/file") == Deleted(3)
    assert store.delete("t/file") == Deleted(0)
    assert keys(store) == ["t/file2"]
    assert num_versions(server, bucket) == 1


def test_an_object_of_which_only_old_versions_are_left_is_listed(
    versioned: tuple[S3Server, str, ObjectStore], source: Path
) -> None:
    server, bucket, store = versioned
    for key in ("t/a", "t/b", "t/c"):
        store.put(key, source)
    server.client().remove_object(bucket, "p/t/b")
    assert code_of(refusal(lambda: store.open("t/b"))) == "object_not_found"
    assert keys(store) == ["t/a", "t/b", "t/c"]
    assert store.delete("t/b") == Deleted(1)
    assert keys(store) == ["t/a", "t/c"]


def test_what_a_lock_protects_is_named(seaweedfs: S3Server, source: Path) -> None:
    bucket = seaweedfs.make_bucket(versioned=True, locked=True)
    store = open_store(seaweedfs.url(bucket))
    store.put(KEY, source)
    store.put(KEY, source)
    newest = seaweedfs.client().stat_object(bucket, KEY)
    until = datetime.now(UTC) + timedelta(minutes=5)
    seaweedfs.client().set_object_retention(bucket, KEY, Retention(COMPLIANCE, until), newest.version_id)
    deleted = store.delete(KEY)
    assert deleted.num_versions == 1
    assert len(deleted.kept) == 1
    assert f"version {newest.version_id} of adapter_model.safetensors of abcd" in deleted.kept[0]
    assert "object lock" in deleted.kept[0]
    assert num_versions(seaweedfs, bucket) == 1
    store.close()


def test_a_bucket_that_doesnt_tell_its_versions_is_said_in_kept(
    juicefs: S3Server, faults: FaultServer, source: Path
) -> None:
    faults.set(Fault.FORBIDDEN, query="versioning=")
    faults.set(Fault.FORBIDDEN, query="versions=")
    store = open_store(juicefs.url(juicefs.make_bucket(), endpoint=faults.endpoint))
    store.put(KEY, source)
    assert keys(store) == [KEY]
    deleted = store.delete(KEY)
    assert deleted.num_versions == 1
    assert "older versions of adapter_model.safetensors of abcd, if there are any" in deleted.kept[0]
    assert keys(store) == []
    store.close()


def test_a_bucket_is_asked_for_its_versions_once_a_minute(
    juicefs: S3Server, faults: FaultServer, source: Path
) -> None:
    now_s = 0.0
    location = parse_s3_url(juicefs.url(juicefs.make_bucket(), endpoint=faults.endpoint))
    store = S3Store(location, clock=lambda: now_s)
    for _ in range(3):
        store.put(KEY, source)
        store.delete(KEY)
    now_s = 61.0
    keys(store)
    assert sum("versioning=" in request for request in faults.requests) == 2
    store.close()


def test_a_refused_port_fails_soon(s3_credentials: None) -> None:
    with refusing() as endpoint:
        store = open_store(f"s3://bucket?endpoint={endpoint}")
        started_s = time.monotonic()
        error = refusal(lambda: store.open(KEY))
        assert time.monotonic() - started_s < 3
    assert code_of(error) == "store_unavailable"
    assert "can't be reached" in error.message
    store.close()


def everything(store: ObjectStore, source: Path) -> dict[str, Callable[[], object]]:
    return {
        "open": lambda: store.open(KEY),
        "put": lambda: store.put(KEY, source),
        "delete": lambda: store.delete(KEY),
        "list": lambda: list(store.list("")),
    }


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (Fault.ERROR, "store_unavailable", "busy or out of order"),
        (Fault.SLOW_DOWN, "store_unavailable", "busy or out of order"),
        (Fault.FORBIDDEN, "store_denied", "check its keys (AWS_ACCESS_KEY_ID), this machine's clock"),
        (Fault.EXPIRED, "store_denied", "have expired: renew them"),
        (Fault.SKEWED, "store_denied", "clock of this machine"),
        (Fault.REDIRECT, "store_denied", "the store refuses"),
    ],
)
def test_each_fault_is_an_error_with_its_code_from_every_call(
    behind: S3Store, faults: FaultServer, source: Path, fault: Fault, code: str, said: str
) -> None:
    faults.set(fault)
    for name, call in everything(behind, source).items():
        error = refusal(call)
        assert (code, name) == (code_of(error), name)
        if name != "delete":  # a HEAD has no body to tell its code
            assert said in error.message
    faults.heal()
    assert read(behind, KEY) == b"content"


def test_a_server_that_hangs_is_given_up_on(
    behind: S3Store, faults: FaultServer, source: Path, tmp_path: Path
) -> None:
    hasty = S3Store(behind._location, patience=HASTY)
    faults.set(Fault.HANG)
    calls = everything(hasty, source)
    calls["download"] = lambda: download(hasty, KEY, tmp_path / "target", max_bytes=100)
    for call in (calls["open"], calls["put"], calls["download"]):
        error = refusal(call)
        assert code_of(error) == "store_unavailable"
        assert "doesn't answer in time" in error.message
    assert not (tmp_path / "target").exists()
    hasty.close()


def test_what_speaks_no_s3_is_an_error(behind: S3Store, faults: FaultServer, source: Path) -> None:
    faults.set(Fault.NOT_S3)
    for name in ("put", "list"):
        error = refusal(everything(behind, source)[name])
        assert error.code in {"store_unavailable", "object_corrupt"}


def test_a_server_that_recovers_is_waited_for_a_moment(behind: S3Store, faults: FaultServer) -> None:
    for fault in (Fault.ERROR, Fault.SLOW_DOWN):
        faults.set(fault, times=2)
        assert read(behind, KEY) == b"content"


def test_a_missing_object_and_a_missing_bucket_differ(behind: S3Store, juicefs: S3Server) -> None:
    assert code_of(refusal(lambda: behind.open("t/none"))) == "object_not_found"
    store = open_store(juicefs.url("there-is-no-such-bucket"))
    error = refusal(lambda: store.open(KEY))
    assert code_of(error) == "bucket_not_found"
    assert "make it, or correct store_url" in error.message
    store.close()


@pytest.mark.parametrize("at", [0.01, 0.5, 0.99])
def test_a_stream_that_is_cut_is_an_error(
    behind: S3Store, faults: FaultServer, source: Path, at: float
) -> None:
    behind.put(KEY, written(source, os.urandom(100_000)))
    faults.set(Fault.CUT, at=at, method="GET")
    stored = behind.open(KEY)
    with stored.stream:
        error = refusal(stored.stream.read)
    assert code_of(error) == "store_unavailable"


def test_a_stream_that_stalls_is_an_error(behind: S3Store, faults: FaultServer, source: Path) -> None:
    """A server that drips keeps every read timeout; only the pace gives it away."""
    now_s = itertools.count(0.0, 31.0)
    behind.put(KEY, written(source, b"x" * 1000))
    slow = S3Store(behind._location, clock=lambda: next(now_s))
    faults.set(Fault.DRIP, method="GET")
    stored = slow.open(KEY)
    with stored.stream:
        error = refusal(stored.stream.read)
    assert code_of(error) == "store_unavailable"
    assert "too slow" in error.message
    slow.close()


def test_streams_that_are_closed_early_hold_no_connection(juicefs: S3Server, source: Path) -> None:
    store = open_store(juicefs.url(juicefs.shared_bucket, f"early/{next(_numbers)}"))
    store.put(KEY, written(source, os.urandom(3 * MIB)))
    for _ in range(40):  # more than the pool keeps
        stored = store.open(KEY)
        stored.stream.read(1)
        stored.stream.close()
    assert len(read(store, KEY)) == 3 * MIB
    store.close()


@pytest.mark.parametrize("at", [0.01, 0.5, 0.99])
def test_a_download_over_a_line_that_is_cut_once_per_range_is_whole(
    behind: S3Store, faults: FaultServer, source: Path, tmp_path: Path, at: float
) -> None:
    content = os.urandom(RANGE_BYTES + 2 * MIB)
    behind.put(KEY, written(source, content))
    faults.set(Fault.CUT, at=at, method="GET", times=1)
    download(behind, KEY, tmp_path / "target", max_bytes=len(content))
    assert (tmp_path / "target").read_bytes() == content


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.ERROR, Fault.FORBIDDEN])
def test_a_download_that_fails_leaves_no_file(
    behind: S3Store, faults: FaultServer, tmp_path: Path, fault: Fault
) -> None:
    faults.set(fault, method="GET")
    error = refusal(lambda: download(behind, KEY, tmp_path / "target", max_bytes=100))
    assert code_of(error) in {"store_unavailable", "store_denied"}
    assert not (tmp_path / "target").exists()


def test_an_object_that_lost_a_byte_on_the_server_is_a_different_object(
    behind: S3Store, faults: FaultServer, tmp_path: Path
) -> None:
    faults.set(Fault.SHORT, method="GET")
    error = refusal(lambda: download(behind, KEY, tmp_path / "target", max_bytes=100))
    assert error.code == "store_unavailable"


def test_an_object_that_is_replaced_mid_download_is_noticed(juicefs: S3Server, tmp_path: Path) -> None:
    store = open_store(juicefs.url(juicefs.shared_bucket, f"replaced/{next(_numbers)}"))
    content = os.urandom(RANGE_BYTES + MIB)
    store.put(KEY, written(tmp_path / "source", content))
    first = store.open(KEY, length=RANGE_BYTES)
    first.stream.close()
    store.put(KEY, written(tmp_path / "source", content[::-1]))
    assert code_of(refusal(lambda: store.open(KEY, start=RANGE_BYTES, etag=first.etag))) == "object_changed"
    store.close()


def test_a_put_whose_part_fails_leaves_no_object_and_no_parts(
    behind: S3Store, faults: FaultServer, juicefs: S3Server, source: Path
) -> None:
    behind.delete(KEY)
    faults.set(Fault.FORBIDDEN, method="PUT", query="partNumber=2")
    with source.open("wb") as file:
        file.truncate(SINGLE_PUT_BYTES + MIB)
    assert code_of(refusal(lambda: behind.put(KEY, source))) == "store_denied"
    assert keys(behind) == []
    aborts = [
        request for request in faults.requests if request.startswith("DELETE") and "uploadId" in request
    ]
    assert len(aborts) == 1


def test_a_put_that_the_server_lost_is_an_error(behind: S3Store, faults: FaultServer, source: Path) -> None:
    faults.set(Fault.MISSING, method="HEAD")
    error = refusal(lambda: behind.put(KEY, source))
    assert error.code == "store_unavailable"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AWS_SECRET_ACCESS_KEY", "another-secret", "check AWS_SECRET_ACCESS_KEY"),
        ("AWS_ACCESS_KEY_ID", "nobody", "check AWS_ACCESS_KEY_ID"),
    ],
)
def test_wrong_credentials_say_which(
    juicefs: S3Server, seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    for server in (juicefs, seaweedfs):
        store = open_store(server.url(server.shared_bucket))
        monkeypatch.setenv(name, value)
        error = refusal(lambda store=store: list(store.list("")))  # type: ignore[misc]
        assert code_of(error) == "store_denied"
        assert said in error.message
        monkeypatch.setenv(name, CREDENTIALS[name])
        list(store.list(""))  # renewed ones are found without a new start
        store.close()


def test_no_credentials_at_all_say_where_they_may_be(
    juicefs: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with refusing() as endpoint:  # instead of a cloud's address
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", endpoint)
        store = open_store(juicefs.url(juicefs.shared_bucket))
        error = refusal(lambda: store.open(KEY))
    assert error.code == "store_denied"
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in error.message
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id = minioadmin\naws_secret_access_key = minioadmin\n"
    )
    assert code_of(refusal(lambda: store.open("t/none"))) == "object_not_found"
    store.close()


def test_presigned_urls_are_of_the_public_endpoint(juicefs: S3Server) -> None:
    store = open_store(juicefs.url("bucket", public_endpoint="https://s3.example.com", style="virtual"))
    presigned = store.presign_put("staging/t/u1/file", expires_s=60)
    assert presigned is not None
    assert presigned.url.startswith("https://bucket.s3.example.com/staging/t/u1/file?")
    store.close()


def test_encryption_is_asked_for(juicefs: S3Server, source: Path) -> None:
    store = open_store(juicefs.url(juicefs.shared_bucket, sse="AES256"))
    with pytest.raises(StoreError):  # this server has no keys, and must not store it plain
        store.put(KEY, source)
    store.close()


def test_a_forked_process_has_connections_of_its_own(juicefs: S3Server, source: Path) -> None:
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from tunefleet.adapters_store.objects import open_store\n"
        "store = open_store(sys.argv[1])\n"
        "store.put('t/file', Path(sys.argv[2]))\n"
        "child = os.fork()\n"
        "for _ in range(20):\n"
        "    with store.open('t/file').stream as stream: assert stream.read() == b'content'\n"
        "if not child: os._exit(0)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    url = juicefs.url(juicefs.shared_bucket, "forked")
    ran = subprocess.run([sys.executable, "-c", program, url, str(source)], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize(
    "server_type", [JuiceFS, pytest.param(SeaweedFS, marks=pytest.mark.slow)], ids=["juicefs", "seaweedfs"]
)
def test_what_was_acknowledged_survives_a_killed_server(
    server_type: type[S3Server], tmp_path: Path, source: Path, s3_credentials: None
) -> None:
    (tmp_path / "server").mkdir()
    with running(server_type, tmp_path / "server") as server:
        store = open_store(server.url(server.make_bucket()))
        for number in range(10):
            store.put(f"t/{number}", source)
        server.kill()
        assert code_of(refusal(lambda: store.open("t/0"))) == "store_unavailable"
        server.start()
        assert [f"t/{number}" for number in range(10)] == sorted(keys(store))
        assert all(read(store, f"t/{number}") == b"content" for number in range(10))
        store.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["juicefs", "seaweedfs"])
def test_more_objects_than_a_page_are_listed(request: pytest.FixtureRequest, name: str, source: Path) -> None:
    server: S3Server = request.getfixturevalue(name)
    store = open_store(server.url(server.make_bucket(), "p"))

    def put(part: int) -> None:
        for number in range(part, 1100, 8):
            store.put(f"t/{number:04}", source)

    threads = [threading.Thread(target=put, args=(part,)) for part in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [f"t/{number:04}" for number in range(1100)] == keys(store)
    store.close()


@pytest.mark.slow
def test_200_mb_go_up_and_come_down_in_flat_memory(juicefs: S3Server, tmp_path: Path) -> None:
    with (tmp_path / "source").open("wb") as file:
        file.truncate(200 * MIB)
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from tunefleet.adapters_store.downloads import download\n"
        "from tunefleet.adapters_store.objects import open_store\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "store = open_store(sys.argv[1])\n"
        "list(store.list('none'))\n"
        "before = peak()\n"
        "store.put('t/large', Path(sys.argv[2]))\n"
        "put = peak()\n"
        "download(store, 't/large', Path(sys.argv[3]), max_bytes=2**30)\n"
        "print(put - before, peak() - before)\n"
    )
    url = juicefs.url(juicefs.make_bucket())
    command = [sys.executable, "-c", program, url, str(tmp_path / "source"), str(tmp_path / "target")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    put_mb, both_mb = map(int, ran.stdout.split())
    assert put_mb < 48
    assert both_mb < 56
    assert (tmp_path / "target").stat().st_size == 200 * MIB


def test_a_killed_put_leaves_no_object(juicefs: S3Server, faults: FaultServer, tmp_path: Path) -> None:
    faults.set(Fault.HANG, method="PUT")
    url = juicefs.url(juicefs.shared_bucket, f"killed/{next(_numbers)}", endpoint=faults.endpoint)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tunefleet.adapters_store.objects import open_store\n"
        "open_store(sys.argv[1]).put('t/file', Path(sys.argv[2]))\n"
    )
    source = written(tmp_path / "source", b"content")
    putting = subprocess.Popen([sys.executable, "-c", program, url, str(source)])
    while not any(request.startswith("PUT") for request in faults.requests):
        time.sleep(0.02)  # the other process tells us by its request; pytest's timeout bounds this
    putting.send_signal(signal.SIGKILL)
    assert putting.wait(20) == -signal.SIGKILL
    faults.heal()
    store = open_store(url)
    assert keys(store) == []
    store.put("t/file", source)
    assert read(store, "t/file") == b"content"
    store.close()
