"""Length-prefixed msgpack messages on asyncio streams and plain sockets.

A frame is a 4-byte big-endian length and that many bytes of msgpack. ``data_received`` decodes and delivers
in the same turn of the event loop, so a process that steps between two turns sees each message before its
next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import msgspec

from tunefleet.messages import Message

_HEADER = struct.Struct(">I")
MAX_FRAME_BYTES = 64 * 1024 * 1024
READ_BYTES = 65536
In = TypeVar("In")

_encoder = msgspec.msgpack.Encoder()


class FrameReader(Generic[In]):
    """Collects bytes, gives whole messages of one union type."""

    def __init__(self, union: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[In] = msgspec.msgpack.Decoder(union)
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> list[In]:
        """Messages that ``chunk`` completes.

        Raises:
            msgspec.DecodeError: the peer speaks something else; close the connection.
        """
        self._buffer += chunk
        messages: list[In] = []
        offset = 0
        while len(self._buffer) - offset >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer, offset)
            if length > MAX_FRAME_BYTES:
                raise msgspec.DecodeError(f"a frame of {length} bytes")
            end = offset + _HEADER.size + length
            if len(self._buffer) < end:
                break
            messages.append(self._decoder.decode(memoryview(self._buffer)[offset + _HEADER.size : end]))
            offset = end
        del self._buffer[:offset]
        return messages


def frame(message: Message) -> bytes:
    body = _encoder.encode(message)
    return _HEADER.pack(len(body)) + body


class Connection(asyncio.Protocol, Generic[In]):
    """One end of a message connection; lives until either side closes.

    ``on_message`` is called for each message, ``on_close`` exactly once.
    """

    def __init__(
        self,
        union: Any,
        on_message: Callable[[Connection[In], In], None],
        on_close: Callable[[Connection[In]], None],
        on_open: Callable[[Connection[In]], None] | None = None,
    ) -> None:
        self._reader: FrameReader[In] = FrameReader(union)
        self._on_message = on_message
        self._on_close = on_close
        self._on_open = on_open
        self._transport: asyncio.Transport | None = None

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, message: Message) -> None:
        """Queues a message; to a closed connection it is dropped (``on_close`` has said so).

        On asyncio's own loops, which replicas and host processes have, it is in the kernel's hands on return,
        whatever becomes of this process, unless the peer has left so much unread that there is no room.
        """
        if self._transport is not None and self.is_open:
            self._transport.write(frame(message))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has other ancestors
        if self._on_open is not None:
            self._on_open(self)

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._reader.feed(data)
        except msgspec.DecodeError:  # ValidationError included: not our protocol, or another version of it
            self.close()
            return
        for message in messages:
            self._on_message(self, message)

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._hear_out()
        self._on_close(self)

    def _hear_out(self) -> None:
        """A write that meets the peer's end stops all reading, but what the peer sent before it counts."""
        assert self._transport is not None
        number = self._transport.get_extra_info("socket").fileno()
        with contextlib.suppress(OSError):
            while chunk := os.read(number, READ_BYTES):
                self.data_received(chunk)


class BlockingLink(Generic[In]):
    """The same frames on a blocking socket, for the parked process, which must have one thread, no loop."""

    def __init__(self, sock: socket.socket, union: Any) -> None:
        self._sock = sock
        self._reader: FrameReader[In] = FrameReader(union)

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Message) -> None:
        self._sock.sendall(frame(message))

    def receive(self) -> list[In] | None:
        """Messages of one read; None when the peer is gone."""
        chunk = self._sock.recv(READ_BYTES)
        return self._reader.feed(chunk) if chunk else None

    def close(self) -> None:
        self._sock.close()
