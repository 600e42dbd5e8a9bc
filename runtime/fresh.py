"""Replicas as fresh processes, where forking isn't safe: ``python -m tunefleet.runtime.fresh BASE ASKED_AT``.

Correct and slower: each imports torch and maps the base on its own. The host process imports this module too
and must stay light, so torch is imported only where such a process begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tunefleet.errors import ReplicaError, TunefleetError
from tunefleet.messages import Fork, Forked, Reaped
from tunefleet.runtime.base import read_manifest
from tunefleet.runtime.environ import model_environ
from tunefleet.runtime.wire import FrameReader, frame


class FreshStarts:
    """A ``starter.Starter`` that keeps nothing between two starts. Its processes outlive it.

    ``on_lost`` is never called: each process has a thread of ours that waits for its end.
    """

    pid = 0

    def __init__(
        self,
        base_dir: Path,
        *,
        on_forked: Callable[[Forked], None],
        on_reaped: Callable[[Reaped], None],
        on_lost: Callable[[], None],
        module: str = "tunefleet.runtime.fresh",
    ) -> None:
        self._base_dir = base_dir
        self._on_forked = on_forked
        self._on_reaped = on_reaped
        self._module = module

    async def ensure(self) -> None: ...

    async def close(self) -> None: ...

    async def fork(self, message: Fork) -> None:
        self.start(message)

    def start(self, message: Fork, *, instead_of_fork: str = "") -> None:
        """Starts a replica's process; see ``Forked`` for ``instead_of_fork``.

        Raises:
            ReplicaError: the system has no room for another process.
        """
        command = [sys.executable, "-m", self._module, str(self._base_dir), str(time.time())]
        try:
            process = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=model_environ()
            )
        except OSError as error:
            raise ReplicaError(
                f"no process can be started: {error.strerror}", code="replica_start_failed"
            ) from error
        _tell(process, message)
        self._on_forked(
            Forked(replica_id=message.replica_id, pid=process.pid, instead_of_fork=instead_of_fork)
        )
        watch = (asyncio.get_running_loop(), process, message.replica_id)
        threading.Thread(target=self._watch, args=watch, daemon=True).start()

    def _watch(
        self, loop: asyncio.AbstractEventLoop, process: subprocess.Popen[bytes], replica_id: str
    ) -> None:
        """Waits for the end of a process, on a thread of its own: every system has that."""
        with process:
            assert process.stdout is not None
            reason = process.stdout.read().decode(errors="replace")
            exit_code = process.wait()
        end = Reaped(replica_id=replica_id, pid=process.pid, exit_code=exit_code, reason=reason)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants to know
            loop.call_soon_threadsafe(self._on_reaped, end)


def _tell(process: subprocess.Popen[bytes], message: Fork) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # it is gone: its end will be told
        stdin.write(frame(message))


def main() -> None:
    base_dir, asked_at = Path(sys.argv[1]), float(sys.argv[2])
    (message,) = FrameReader[Fork](Fork).feed(sys.stdin.buffer.read())
    with os.fdopen(os.dup(1), "w") as reason:  # the host process reads there why no replica comes of it
        os.dup2(2, 1)  # and finds the rest in its log
        try:
            manifest = read_manifest(base_dir)
            from tunefleet.runtime import replica
            from tunefleet.runtime.model import load_model

            model = load_model(base_dir)
        except TunefleetError as error:
            reason.write(error.message)
            sys.exit(1)
    replica.main(model, manifest, message, asked_at)


if __name__ == "__main__":
    main()
