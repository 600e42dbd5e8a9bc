"""Large uploads cost a router little memory: measured on `tunefleet serve` by the kernel's own mark."""

from __future__ import annotations

import re
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from adapter_factory import make_adapter
from served import server
from tunefleet import config
from tunefleet.core import ADAPTER_FILES, Manifest
from tunefleet.runtime.base import locate_base, read_manifest

MIB = 1024 * 1024
RANK = 170  # SmolLM2-135M: 200 MB on all linear layers in float32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    manifest: Manifest = read_manifest(locate_base(config.resolve(), progress=print))
    return make_adapter(tmp_path_factory.mktemp("large") / "adapter", manifest, r=RANK, targets=TARGETS)


def router_of(url: str) -> psutil.Process:
    """The process that listens there."""
    port = int(url.rpartition(":")[2])
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            process = psutil.Process(connection.pid)
            assert "serve" in process.cmdline()
            return process
    raise AssertionError(f"nobody listens on {port}")


def peak_bytes(process: psutil.Process) -> int:
    """Most memory that it ever had resident."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


def put(url: str, user: str, arguments: Sequence[str]) -> str:
    """The status that curl got for an upload."""
    command = ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "-X", "PUT", *arguments]
    command.append(f"{url}/v1/users/{user}/adapter")
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=200).stdout


def test_200_mb_cost_a_router_less_than_64(folder: Path, tmp_path: Path) -> None:
    weights = folder / ADAPTER_FILES[1]
    assert weights.stat().st_size >= 200_000_000
    archive = tmp_path / "adapter.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, ".")
    small = make_adapter(
        tmp_path / "small",
        read_manifest(locate_base(config.resolve(), progress=print)),
        r=4,
        targets=("q_proj",),
    )
    as_tar = ["-H", "Content-Type: application/x-tar", "-T", str(archive)]
    ways = {
        "multipart": [part for name in ADAPTER_FILES for part in ("-F", f"{name}=@{folder / name}")],
        "tar": as_tar,
        "chunked": ["-H", "Transfer-Encoding: chunked", *as_tar],
    }
    with server(tmp_path, "--max-adapter-rank", "256") as url:
        router = router_of(url)
        warm = [part for name in ADAPTER_FILES for part in ("-F", f"{name}=@{small / name}")]
        assert put(url, "first", warm) == "201"  # what one upload loads, all others use
        for way, arguments in ways.items():
            Path(f"/proc/{router.pid}/clear_refs").write_text("5")  # the peak is what it has now
            before = peak_bytes(router)
            assert put(url, way, arguments) == "201"
            cost = peak_bytes(router) - before
            print(f"{way}: {cost / MIB:.1f} MiB")
            assert cost < 64 * MIB, f"{way}: {cost / MIB:.0f} MiB"
