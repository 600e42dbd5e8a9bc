"""A router's runs over replicas that die, drain and start late; the replicas speak the protocol for real."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from adapter_factory import make_manifest
from lone_router import options_for
from scripted_replica import Ends, ScriptedReplica, ScriptedReplicas
from tunefleet.core import ReplicaInfo, ReplicaState, SamplingParams
from tunefleet.errors import CapacityError, ReplicaError
from tunefleet.messages import Submit
from tunefleet.runtime.machine import Machine, host_options
from tunefleet.runtime.memory_link import MemoryHost
from tunefleet.runtime.placing import Placing

LENGTH = 20  # tokens of an answer


class Fleet:
    """Scripted replicas, and as many routers as a test wants."""

    def __init__(self, folder: Path, ends: Ends, max_replicas: int = 1, **given: object) -> None:
        self.options = options_for(folder, max_num_seqs=8, **given)
        self.replicas = ScriptedReplicas(folder, ends, max_replicas=max_replicas, concurrency=8)
        self.host = self.replicas.host
        self._folder = folder
        self._machines: list[Machine] = []

    async def router(self) -> Machine:
        machine = Machine(self.options, make_manifest(), self._folder, self.host.link())
        await machine.start()
        self._machines.append(machine)
        return machine

    async def close(self) -> None:
        for machine in self._machines:
            await machine.close()
        self.replicas.close()

    def submitted(self, number: int, request_id: str) -> Submit:
        """What that replica was told of a request."""
        return next(work for work in self.replicas.all[number].submitted if work.request_id == request_id)

    def suspects(self, number: int) -> dict[str, bool]:
        """The requests that replica got, and whether it was told to compute them alone."""
        return {work.request_id: work.suspect for work in self.replicas.all[number].submitted}


def nothing(together: Sequence[Submit], num_tokens: int) -> bool:
    return False


@contextlib.asynccontextmanager
async def fleet(folder: Path, ends: Ends = nothing, **given: object) -> AsyncIterator[Fleet]:
    made = Fleet(folder, ends, **given)  # type: ignore[arg-type]
    try:
        async with asyncio.timeout(20):
            yield made
    finally:
        await made.close()


def work(request_id: str, num_tokens: int = LENGTH) -> Submit:
    return Submit(request_id=request_id, prompt=(1,), sampling=SamplingParams(max_tokens=num_tokens))


def replica(replica_id: str, state: ReplicaState) -> ReplicaInfo:
    return ReplicaInfo(replica_id=replica_id, state=state, address=replica_id, device="cpu")


async def answer(machine: Machine, request_id: str) -> list[int]:
    return [token async for progress in machine.submit(work(request_id)) for token in progress.tokens]


def answers(machine: Machine, *names: str) -> asyncio.Future[list[list[int] | BaseException]]:
    return asyncio.gather(*(answer(machine, name) for name in names), return_exceptions=True)


def poison(together: Sequence[Submit], num_tokens: int) -> bool:
    """A request whose sixth token ends every replica."""
    return any(each.request_id == "poison" for each in together) and num_tokens >= 5


def crowd(together: Sequence[Submit], num_tokens: int) -> bool:
    """Requests that are harmless alone, and never together."""
    return len(together) > 1


WHOLE = list(range(LENGTH))


def test_a_request_that_ends_replicas_fails_alone_after_its_second_trial(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet(tmp_path, poison) as made:
            machine = await made.router()
            *whole, failed = await answers(machine, "a", "b", "poison")
            assert whole == [WHOLE, WHOLE]
            assert isinstance(failed, ReplicaError)
            assert failed.code == "request_ends_replicas"
            assert "change its prompt" in failed.message
            assert made.suspects(0) == {"a": False, "b": False, "poison": False}
            assert made.suspects(1) == {"a": True, "b": True, "poison": True}
            assert made.suspects(2)["poison"]
            assert "poison" not in made.suspects(3)
            assert len(made.replicas.all) == 4
            assert await answer(machine, "after") == WHOLE

    asyncio.run(scenario())


def test_what_an_earlier_replica_made_is_not_made_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet(tmp_path) as made:
            machine = await made.router()
            run = machine.submit(work("moves"))
            tokens: list[int] = []
            async for progress in run:
                tokens += progress.tokens
                if len(tokens) == 7:
                    made.replicas.all[0].die()
                    made.host.lose("r1")
            assert tokens == WHOLE
            again = made.replicas.all[1].submitted[0]
            assert again.suspect
            assert list(again.generated) == WHOLE[: len(again.generated)]
            assert len(again.generated) >= 7

    asyncio.run(scenario())


def test_anothers_trial_makes_nobody_suspect(tmp_path: Path) -> None:
    """Two routers share the replicas; the poison is the other one's."""

    async def scenario() -> None:
        async with fleet(tmp_path, poison) as made:
            ours, theirs = await made.router(), await made.router()
            whole, failed = await asyncio.gather(answer(ours, "a"), answers(theirs, "poison"))
            assert whole == WHOLE
            assert isinstance(failed[0], ReplicaError)
            assert made.suspects(0) == {"a": False, "poison": False}
            before, after = (made.submitted(number, "a") for number in (1, 2))
            assert before.suspect
            assert after.suspect is (before.generated == after.generated)  # until its first token

    asyncio.run(scenario())


def test_requests_that_end_replicas_only_together_fail_in_the_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet(tmp_path, crowd) as made:
            machine = await made.router()
            for failed in await answers(machine, "a", "b"):
                assert isinstance(failed, ReplicaError)
                assert failed.code == "replica_lost"
            assert len(made.replicas.all) == 9

    asyncio.run(scenario())


def test_a_replica_that_drains_takes_nothing_new_and_nobody_is_to_blame(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet(tmp_path) as made:
            machine = await made.router()
            await machine.warmup()
            draining = made.replicas.all[0]
            draining.is_draining = True
            asyncio.get_running_loop().call_later(0.05, made.host.lose, "r1")  # the router is told late
            assert await answer(machine, "a") == WHOLE
            assert (draining.num_rejected, draining.submitted) == (1, [])
            assert made.suspects(1) == {"a": False}

    asyncio.run(scenario())


def test_an_answer_that_is_read_late_keeps_nobody_waiting(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet(tmp_path, max_replicas=2) as made:
            machine = await made.router()
            unread = [aiter(machine.submit(work(f"{number}"))) for number in range(8)]
            for run in unread:
                await anext(run)
            made.host.update(replica("r9", ReplicaState.NEW))
            assert await answer(machine, "next") == WHOLE  # not held for r9
            for run in unread:
                assert [token async for progress in run for token in progress.tokens] == WHOLE[1:]

    asyncio.run(scenario())


def test_a_burst_at_zero_fills_the_replicas_that_start_and_starts_no_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet(tmp_path, max_replicas=3) as made:
            machine = await made.router()
            made.replicas.may_start.clear()
            burst = answers(machine, *map(str, range(24)))
            while machine.num_held < 24:
                await asyncio.sleep(0)
            made.replicas.may_start.set()
            assert await burst == [WHOLE] * 24
            assert [len(replica.submitted) for replica in made.replicas.all] == [8, 8, 8]
            assert not made.host.waiting

    asyncio.run(scenario())


def test_so_many_requests_are_held_and_no_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet(tmp_path, max_queue=3) as made:
            machine = await made.router()
            made.replicas.may_start.clear()
            held = answers(machine, "a", "b", "c")
            while machine.num_held < 3:
                await asyncio.sleep(0)
            with pytest.raises(CapacityError, match="3 requests wait") as refused:
                await answer(machine, "one too many")
            assert refused.value.code == "cold_start_queue_full"
            assert refused.value.retry_after_s > 0
            made.replicas.may_start.set()
            assert await held == [WHOLE] * 3
            assert await answer(machine, "again") == WHOLE

    asyncio.run(scenario())


def test_a_request_is_held_for_its_time_and_then_given_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet(tmp_path, cold_start_timeout_s=0.1) as made:
            machine = await made.router()
            made.replicas.may_start.clear()
            with pytest.raises(CapacityError) as refused:
                await answer(machine, "held")
            assert refused.value.code == "cold_start_timeout"
            await asyncio.sleep(0)
            assert (machine.num_held, made.host.waiting) == (0, {})

    asyncio.run(scenario())


def test_a_run_that_is_closed_while_held_waits_no_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet(tmp_path) as made:
            machine = await made.router()
            made.replicas.may_start.clear()
            running = asyncio.ensure_future(answer(machine, "held"))
            while not made.host.waiting:
                await asyncio.sleep(0)
            running.cancel()
            await asyncio.wait([running])
            assert (machine.num_held, made.host.waiting) == (0, {})

    asyncio.run(scenario())


def test_a_held_request_says_how_long_and_a_placed_one_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet(tmp_path) as made:
            machine = await made.router()
            for name, was_held in (("first", True), ("second", False)):
                run = machine.submit(work(name))
                assert [token async for progress in run for token in progress.tokens] == WHOLE
                assert run.cold_base is was_held
                assert (run.wake_s > 0) is was_held

    asyncio.run(scenario())


@contextlib.asynccontextmanager
async def ninth_held(folder: Path) -> AsyncIterator[tuple[Fleet, Machine, asyncio.Task[list[int]]]]:
    """Eight requests fill the one replica that is READY, and another replica never gets there."""
    async with fleet(folder, max_replicas=2) as made:
        machine = await made.router()
        await machine.warmup()
        standing = made.replicas.all[0]
        standing.stepping.clear()
        running = answers(machine, *map(str, range(8)))
        while standing.num_running < 8:
            await asyncio.sleep(0)
        made.host.update(replica("r9", ReplicaState.NEW))
        ninth = asyncio.create_task(answer(machine, "ninth"))
        while not made.host.waiting:
            await asyncio.sleep(0)
        yield made, machine, ninth
        standing.stepping.set()
        assert await running == [WHOLE] * 8


def test_a_held_request_takes_the_first_place_that_comes_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with ninth_held(tmp_path) as (made, machine, ninth):
            made.replicas.all[0].stepping.set()  # and the host process has no news
            assert await ninth == WHOLE
            assert machine.num_held == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("is_refused", [True, False])
def test_a_start_that_fails_holds_nobody_who_has_a_replica_to_queue_on(
    tmp_path: Path, is_refused: bool
) -> None:
    """Whether it is tried again already, or given up."""

    async def scenario() -> None:
        async with ninth_held(tmp_path) as (made, _, ninth):
            if is_refused:
                made.host.refuse("replica r8: no memory")
            else:
                made.host.lose("r9")
            while made.replicas.all[0].num_running < 9:
                await asyncio.sleep(0)
            made.replicas.all[0].stepping.set()
            assert await ninth == WHOLE

    asyncio.run(scenario())


def test_a_place_that_comes_too_late_is_given_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet(tmp_path) as made:
            made.replicas.may_start.clear()
            options = host_options(options_for(tmp_path, max_num_seqs=1), make_manifest(), tmp_path)
            link = made.host.link()
            placing = Placing(link, options)
            await link.join()
            late = asyncio.create_task(placing.place("late", None))
            while not placing.num_held:
                await asyncio.sleep(0)
            made.host.update(replica("r1", ReplicaState.READY))
            late.cancel()
            await asyncio.wait([late])
            made.host.update(replica("r2", ReplicaState.NEW))
            assert not (await placing.place("next", None)).was_held

    asyncio.run(scenario())


def test_a_start_that_fails_is_an_error_with_its_reason(tmp_path: Path) -> None:
    async def fail(replica_id: str) -> str:
        raise ReplicaError("no memory left on cuda:0")

    async def scenario() -> None:
        host = MemoryHost(fail)
        machine = Machine(options_for(tmp_path), make_manifest(), tmp_path, host.link())
        await machine.start()
        with pytest.raises(CapacityError, match="no memory left on cuda:0") as refused:
            await answer(machine, "a")
        assert refused.value.code == "replica_start_failed"
        assert refused.value.retry_after_s > 0
        assert "no memory left" in (await machine.status()).last_error
        await machine.close()

    asyncio.run(scenario())


def test_who_is_being_answered_outwaits_starts_that_fail(tmp_path: Path) -> None:
    """The client has part of the answer: it can't be told to come again."""

    def ends(together: Sequence[Submit], num_tokens: int) -> bool:
        return len(made.replicas.all) == 1 and num_tokens == 5

    async def scenario() -> None:
        async with fleet(tmp_path, ends, max_queue=2) as fleet_made:
            nonlocal made
            made = fleet_made
            machine = await made.router()
            made.replicas.num_failures = 2
            assert await answers(machine, "a", "b") == [WHOLE, WHOLE]
            assert len(made.host.errors) == 2

    made: Fleet
    asyncio.run(scenario())


def test_a_replica_may_be_anywhere_that_its_address_says(tmp_path: Path) -> None:
    async def on_tcp(replica_id: str) -> str:
        await replica.serve(port=0)
        return replica.address

    replica = ScriptedReplica("")

    async def scenario() -> None:
        machine = Machine(options_for(tmp_path), make_manifest(), tmp_path, MemoryHost(on_tcp).link())
        await machine.start()
        assert await answer(machine, "a") == WHOLE
        assert replica.address.startswith("tcp://127.0.0.1:")
        await machine.close()
        replica.die()

    asyncio.run(scenario())
