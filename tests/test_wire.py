"""The wire: every message in any pieces, and a peer that speaks something else hurts nobody."""

from __future__ import annotations

import asyncio
import enum
import socket
import struct
import types
import typing
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunefleet import messages
from tunefleet.core import AdapterRef, SamplingParams
from tunefleet.messages import (
    Cancel,
    Drain,
    Evict,
    HostToReplica,
    Message,
    Progress,
    Rejected,
    ReplicaToRouter,
    RouterToReplica,
    Step,
    Submit,
    Timing,
    Trial,
)
from tunefleet.runtime.wire import MAX_FRAME_BYTES, BlockingLink, Connection, FrameReader, frame

SUBMIT = Submit(
    request_id="r1",
    prompt=(1, 2, 50_000),
    sampling=SamplingParams(max_tokens=5, temperature=0.5, seed=1 << 62),
    adapter=AdapterRef("d" * 64, "default", "key/é", "w" * 64, 1 << 40, 8),
    generated=(7,),
)
STREAM: list[Message] = [SUBMIT, Cancel(request_id="r1"), SUBMIT, Cancel(request_id="")]
UNIONS = [
    union for name, union in vars(messages).items() if name.partition("To")[2][:1].isupper()
]  # one per direction
DIRECTIONS = [(kind, union) for union in UNIONS for kind in typing.get_args(union) or (union,)]


def values(kind: object) -> st.SearchStrategy[object]:
    """Values of a field's type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*map(values, args))
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is tuple and args[-1] is ...:
        return st.lists(values(args[0]), max_size=4).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, args))
    if origin is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=4)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        fields = msgspec.structs.fields(kind)
        return st.fixed_dictionaries({f.name: values(f.type) for f in fields}).map(
            lambda given: kind(**given)
        )
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return st.sampled_from(list(kind))
    scalars: dict[object, st.SearchStrategy[object]] = {
        str: st.text(max_size=12),
        int: st.integers(-(1 << 63), (1 << 64) - 1),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        type(None): st.none(),
    }
    return scalars[kind]


def test_every_message_has_one_direction() -> None:
    kinds = {
        item for item in vars(messages).values() if isinstance(item, type) and issubclass(item, Message)
    } - {Message}
    assert sorted(kind.__name__ for kind in kinds) == sorted(kind.__name__ for kind, _ in DIRECTIONS)


@pytest.mark.parametrize(("kind", "union"), DIRECTIONS, ids=[kind.__name__ for kind, _ in DIRECTIONS])
def test_every_message_comes_out_as_it_went_in(kind: type[Message], union: object) -> None:
    @settings(max_examples=15, deadline=None, database=None)
    @given(values(kind))
    def roundtrip(message: Message) -> None:
        assert [message] == FrameReader(union).feed(frame(message))

    roundtrip()


def test_frames_may_be_split_at_every_byte() -> None:
    stream = b"".join(map(frame, STREAM))
    for cut in range(len(stream) + 1):
        reader: FrameReader[Message] = FrameReader(RouterToReplica)
        assert reader.feed(stream[:cut]) + reader.feed(stream[cut:]) == STREAM


def test_frames_may_come_byte_by_byte() -> None:
    reader: FrameReader[Message] = FrameReader(RouterToReplica)
    stream = b"".join(map(frame, STREAM))
    assert [message for byte in stream for message in reader.feed(bytes([byte]))] == STREAM


@pytest.mark.parametrize(
    "chunk",
    [
        frame(Rejected(request_id="r")),  # the other direction's
        struct.pack(">I", MAX_FRAME_BYTES + 1),  # refused before it is collected
        struct.pack(">I", 3) + b"\xc1\xc1\xc1",
        struct.pack(">I", 0),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        struct.pack(">I", 1) + b"\x80",  # a map without a tag
    ],
)
def test_what_is_not_the_protocol_is_refused(chunk: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        FrameReader(RouterToReplica).feed(chunk)


class Peer:
    """One end of a connection that notes what comes."""

    def __init__(self, union: object) -> None:
        self.received: list[Message] = []
        self.num_opened = 0
        self.num_closed = 0
        self.news = asyncio.Event()
        self.connection: Connection[Message] = Connection(
            union, self._on_message, self._on_close, self._on_open
        )

    def _on_message(self, connection: Connection[Message], message: Message) -> None:
        assert connection is self.connection
        self.received.append(message)
        self.news.set()

    def _on_close(self, connection: Connection[Message]) -> None:
        assert connection is self.connection
        self.num_closed += 1
        self.news.set()

    def _on_open(self, connection: Connection[Message]) -> None:
        self.num_opened += 1
        self.news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await self.news.wait()
                self.news.clear()


class Server:
    """A replica's side, on a real Unix socket."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.accepted: asyncio.Queue[Peer] = asyncio.Queue()
        self._peers: list[Peer] = []

    async def __aenter__(self) -> Server:
        self._server = await asyncio.get_running_loop().create_unix_server(self._accept, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for peer in self._peers:
            peer.connection.close()
        await self._server.wait_closed()

    def _accept(self) -> Connection[Message]:
        peer = Peer(RouterToReplica)
        self._peers.append(peer)
        self.accepted.put_nowait(peer)
        return peer.connection

    async def connect(self) -> tuple[Peer, Peer]:
        """A client, and the server's end of the same connection."""
        client = Peer(ReplicaToRouter)
        await asyncio.get_running_loop().create_unix_connection(lambda: client.connection, self.path)
        replica = await self.accepted.get()
        await replica.until(lambda: replica.num_opened == 1)
        self._peers.append(client)
        return client, replica


def test_messages_cross_a_socket_in_order_both_ways(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Server(tmp_path / "s") as server:
            client, replica = await server.connect()
            for message in STREAM:
                client.connection.send(message)
            await replica.until(lambda: len(replica.received) == len(STREAM))
            assert replica.received == STREAM
            steps = [
                Step(items=(Progress(request_id="r", tokens=(n,) * 1000, timing=Timing()),))
                for n in range(200)
            ]
            for step in steps:
                replica.connection.send(step)
            await client.until(lambda: len(client.received) == len(steps))
            assert steps == client.received
            assert (client.num_opened, replica.num_opened) == (1, 1)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "garbage", [struct.pack(">I", MAX_FRAME_BYTES + 1), b"GET / HTTP/1.1\r\n\r\n", frame(Evict(digest="d"))]
)
def test_a_peer_that_speaks_something_else_is_closed_alone(garbage: bytes, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Server(tmp_path / "s") as server:
            good, good_side = await server.connect()
            _, bad_side = await server.connect()
            reader, writer = await asyncio.open_unix_connection(server.path)
            writer.write(frame(SUBMIT) + garbage)
            assert await asyncio.wait_for(reader.read(), 20) == b""
            writer.close()
            await writer.wait_closed()
            raw_side = await server.accepted.get()
            await raw_side.until(lambda: raw_side.num_closed == 1)
            good.connection.send(SUBMIT)
            await good_side.until(lambda: good_side.received == [SUBMIT])
            assert (good_side.num_closed, bad_side.num_closed) == (0, 0)

    asyncio.run(scenario())


def test_a_close_is_told_once_on_either_side_and_sending_after_it_does_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Server(tmp_path / "s") as server:
            client, replica = await server.connect()
            assert client.connection.is_open
            client.connection.send(SUBMIT)
            client.connection.close()
            client.connection.close()
            client.connection.send(SUBMIT)
            assert not client.connection.is_open
            await replica.until(lambda: replica.num_closed == 1)
            await client.until(lambda: client.num_closed == 1)
            replica.connection.send(Rejected(request_id="r"))
            replica.connection.close()
            assert replica.received == [SUBMIT]
            assert (client.num_closed, replica.num_closed) == (1, 1)

    asyncio.run(scenario())


async def connect_pair(peer: Peer) -> socket.socket:
    """The other end, without a loop."""
    ours, theirs = socket.socketpair()
    await asyncio.get_running_loop().create_unix_connection(lambda: peer.connection, sock=ours)
    return theirs


def test_what_is_sent_is_in_the_kernels_hands_before_the_loop_turns() -> None:
    async def scenario() -> None:
        replica = Peer(RouterToReplica)
        with await connect_pair(replica) as router:
            for request_id in ("r", ""):
                replica.connection.send(Trial(request_id=request_id))
            heard = router.recv(4096, socket.MSG_DONTWAIT)
            replica.connection.close()
        assert [Trial(request_id="r"), Trial(request_id="")] == FrameReader(ReplicaToRouter).feed(heard)

    asyncio.run(scenario())


def test_a_peers_last_words_are_heard_even_by_who_notices_its_end_when_writing() -> None:
    async def scenario() -> None:
        router = Peer(ReplicaToRouter)
        with await connect_pair(router) as replica:
            replica.sendall(frame(Trial(request_id="r")))
        router.connection.send(SUBMIT)
        await router.until(lambda: router.num_closed == 1)
        assert [Trial(request_id="r")] == router.received

    asyncio.run(scenario())


def test_a_connection_that_never_opened_takes_everything_calmly() -> None:
    connection: Connection[Message] = Connection(RouterToReplica, lambda *_: None, lambda _: None)
    connection.send(SUBMIT)
    connection.close()
    assert not connection.is_open


def test_a_blocking_link_speaks_the_same_frames() -> None:
    left, right = socket.socketpair()
    near: BlockingLink[Message] = BlockingLink(left, HostToReplica)
    far: BlockingLink[Message] = BlockingLink(right, RouterToReplica)
    assert left.fileno() == near.fileno()
    long = Submit(request_id="long", prompt=tuple(range(30_000)), sampling=SUBMIT.sampling)
    near.send(SUBMIT)
    near.send(long)
    received: list[Message] = []
    while len(received) < 2:
        received += far.receive() or []
    assert [SUBMIT, long] == received
    far.send(Drain(timeout_s=1.5))
    assert [Drain(timeout_s=1.5)] == near.receive()
    far.close()
    assert near.receive() is None
    near.close()
