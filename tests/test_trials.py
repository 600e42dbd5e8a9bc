"""Requests that were running when a replica died are tried alone: the next death has one suspect."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import pytest
import torch

from engine_kit import Adapter, Driver, Stage, digest_of, greedy, make_stage, random_prompt
from lone_router import options_for
from poisoned_parked import FATAL_RANK, POISON, is_poisoned
from scheduler_kit import EngineDouble, new_scheduler, new_sequence, sampled_by, shape
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.config import runtime_dir, state_dir
from tunefleet.core import AdapterRef, FinishReason
from tunefleet.errors import ReplicaError
from tunefleet.messages import Submit
from tunefleet.runtime.engine import Engine, EngineLimits
from tunefleet.runtime.host import HOST_SOCKET
from tunefleet.runtime.machine import Machine
from tunefleet.runtime.model import load_model
from tunefleet.runtime.sequence import Sequence, SequenceState

Step = tuple[str, list[tuple[str, int]]]  # who is on trial, and how many tokens of whom run


def step(engine: EngineDouble) -> Step:
    engine.join()
    batch = engine.schedule()
    seen = [(request_id, num_tokens) for request_id, num_tokens, _ in shape(batch)]
    engine.scheduler.advance(batch, sampled_by(batch))
    engine.scheduler.check()
    return batch.suspect.request_id if batch.suspect else "", seen


def with_running(*sequences: Sequence, **limits: int) -> EngineDouble:
    """An engine in whose steps these decode."""
    engine = EngineDouble(new_scheduler(**limits))
    engine.add(*sequences)
    engine.step()
    return engine


# --- whose turn a step is


def test_a_suspect_is_computed_alone_until_it_has_a_token_and_then_with_all() -> None:
    engine = EngineDouble(new_scheduler(max_batch_tokens=4))
    engine.add(new_sequence("bad", num_prompt=10, suspect=True))
    steps = [step(engine) for _ in range(4)]
    assert steps == [("bad", [("bad", 4)]), ("bad", [("bad", 4)]), ("bad", [("bad", 2)]), ("", [("bad", 1)])]


def test_while_a_suspect_is_on_trial_all_others_have_every_second_step() -> None:
    engine = with_running(new_sequence("x"), new_sequence("y"), max_batch_tokens=40, max_prefill_tokens=5)
    engine.add(new_sequence("bad", num_prompt=15, suspect=True))
    others = ("", [("x", 1), ("y", 1)])
    trial = ("bad", [("bad", 5)])
    assert [step(engine) for _ in range(6)] == [
        *(trial, others, trial, others, trial),
        ("", [("x", 1), ("y", 1), ("bad", 1)]),
    ]


def test_a_trial_takes_no_longer_than_a_prompt_beside_decodes_would() -> None:
    """Unless nobody is being answered."""
    engine = EngineDouble(new_scheduler(max_batch_tokens=40, max_prefill_tokens=5))
    engine.add(new_sequence("long", num_prompt=60), new_sequence("bad", num_prompt=60, suspect=True))
    assert [step(engine) for _ in range(4)] == [
        ("bad", [("bad", 40)]),
        ("", [("long", 40)]),
        ("bad", [("bad", 20)]),
        ("", [("bad", 1), ("long", 5)]),
    ]


def test_suspects_are_tried_one_after_another_the_oldest_first() -> None:
    engine = with_running(new_sequence("x", max_tokens=9))
    engine.add(*(new_sequence(name, suspect=True) for name in ("a", "b", "c")))
    assert [step(engine) for _ in range(6)] == [
        ("a", [("a", 3)]),
        ("", [("x", 1), ("a", 1)]),
        ("b", [("b", 3)]),
        ("", [("x", 1), ("a", 1), ("b", 1)]),
        ("c", [("c", 3)]),
        ("", [("x", 1), ("a", 1), ("b", 1), ("c", 1)]),
    ]


def test_where_all_are_suspects_no_step_is_lost() -> None:
    engine = EngineDouble(new_scheduler())
    engine.add(*(new_sequence(name, suspect=True, max_tokens=1) for name in ("a", "b", "c")))
    assert [step(engine) for _ in range(3)] == [(name, [(name, 3)]) for name in ("a", "b", "c")]


def test_a_resumed_suspect_is_tried_for_its_next_token() -> None:
    engine = with_running(new_sequence("x"))
    engine.add(new_sequence("bad", suspect=True, generated=(5, 5)))
    assert step(engine) == ("bad", [("bad", 5)])
    assert step(engine) == ("", [("x", 1), ("bad", 1)])


def test_a_suspect_that_is_preempted_before_its_token_is_tried_again() -> None:
    """The oldest outgrows its row, and there is no room for both."""
    limits = {"budget_tokens": 384, "max_model_len": 256, "max_batch_tokens": 300, "max_prefill_tokens": 20}
    engine = with_running(new_sequence("old", num_prompt=125, max_tokens=9), **limits)
    bad = new_sequence("bad", num_prompt=120, max_tokens=2, suspect=True)
    engine.add(bad)
    for _ in range(8):
        engine.step()
    assert (bad.state, bad.num_preemptions, bad.suspect) == (SequenceState.WAITING, 1, True)
    engine.run(30)
    assert (bad.num_generated, bad.suspect) == (2, False)


def test_who_is_not_suspect_joins_while_another_is_on_trial() -> None:
    engine = EngineDouble(new_scheduler(max_batch_tokens=4))
    engine.add(new_sequence("bad", num_prompt=20, suspect=True))
    assert step(engine) == ("bad", [("bad", 4)])
    engine.add(new_sequence("x"))
    assert step(engine) == ("", [("x", 3)])


# --- the engine


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Two adapters; only a poisoned replica minds the rank of the second."""
    targets = ["q_proj", "v_proj", "down_proj"]
    shapes = [{"r": r, "lora_alpha": 16, "target_modules": targets} for r in (8, FATAL_RANK)]
    return make_stage(tmp_path_factory.mktemp("trials"), shapes, 2)


POISONED = (5, POISON, 6)


class Court:
    """An engine whose trials are followed, and what ran in each.

    Args:
        is_fatal: whether the model raises at the poison.
    """

    def __init__(self, stage: Stage, *, is_fatal: bool = False, **limits: int) -> None:
        model = load_model(stage.folder)
        model.register_forward_pre_hook(self._see, with_kwargs=True)
        given = EngineLimits(**{"max_model_len": 256, **limits})
        self.engine = Engine(model, stage.manifest, given, clock=lambda: 0.0)
        self.driver = Driver(self.engine, stage.adapters, trial=self.trial)
        self.on_trial = ""
        self.trials: list[tuple[str, tuple[str, ...]]] = []  # with the adapters in slots when it began
        self.forwards: list[tuple[str, tuple[int, ...]]] = []  # who was on trial, and all token ids
        self.poisonings: list[str] = []  # who was on trial
        self._is_fatal = is_fatal

    @contextmanager
    def trial(self, request_id: str) -> Iterator[None]:
        assert self.on_trial == "", "a trial in a trial"
        self.trials.append((request_id, self.engine.slots.digests))
        self.on_trial = request_id
        try:
            yield
        finally:
            self.on_trial = ""

    def _see(self, _: object, __: object, kwargs: dict[str, torch.Tensor]) -> None:
        self.forwards.append((self.on_trial, tuple(kwargs["input_ids"].flatten().tolist())))
        if is_poisoned(kwargs):
            self.poisonings.append(self.on_trial)
            if self._is_fatal:
                raise RuntimeError("poisoned")


def make_works(stage: Stage, num_works: int) -> list[Submit]:
    """Of the base and both adapters; some resumed; no prompt has the poison."""
    generator = random.Random(1)
    refs = [None, *(adapter.ref for adapter in stage.adapters)]
    return [
        Submit(
            request_id=str(number),
            prompt=random_prompt(generator, generator.randint(2, 15), POISON),
            generated=random_prompt(generator, 5, POISON) if number % 4 == 3 else (),
            sampling=greedy(20),
            adapter=refs[number % len(refs)],
        )
        for number in range(num_works)
    ]


@pytest.mark.parametrize("suspects", [{0}, {1, 2, 3}, {*range(8)}], ids=["one", "some", "all"])
def test_suspects_and_all_others_get_the_answers_that_they_would_have_got(
    stage: Stage, suspects: set[int]
) -> None:
    court = Court(stage, max_batch_tokens=8)
    works = [
        msgspec.structs.replace(work, suspect=number in suspects)
        for number, work in enumerate(make_works(stage, 8))
    ]
    for work in works:
        court.driver.submit(work)
        court.driver.step()
    court.driver.finish()
    assert {request_id for request_id, _ in court.trials} == {str(number) for number in suspects}
    for work in works:
        answer = court.driver.answers[work.request_id]
        assert answer.finish_reason is FinishReason.LENGTH
        assert len(answer.tokens) == work.sampling.max_tokens - len(work.generated)
        stage.oracle.check_answer(work, answer.tokens)


def test_a_suspects_tokens_run_in_no_step_but_its_own(stage: Stage) -> None:
    court = Court(stage, max_batch_tokens=8)
    prompt = (POISON,) * 20
    for work in make_works(stage, 3):
        court.driver.submit(work)
    court.driver.submit(Submit(request_id="bad", prompt=prompt, sampling=greedy(1), suspect=True))
    court.driver.finish()
    tried = [token_ids for on_trial, token_ids in court.forwards if on_trial]
    assert [prompt[:8], prompt[:8], prompt[:4]] == tried
    assert court.poisonings == ["bad"]


@pytest.mark.parametrize("mates", [0, 2], ids=["alone", "among others who want it"])
def test_copying_an_adapter_for_a_suspect_is_part_of_its_trial(stage: Stage, mates: int) -> None:
    court = Court(stage)
    ref = stage.adapters[0].ref
    work = Submit(request_id="bad", prompt=(5, 6), sampling=greedy(3), adapter=ref, suspect=True)
    for number in range(mates):
        court.driver.submit(msgspec.structs.replace(work, request_id=str(number), suspect=False))
    court.driver.submit(work)
    court.driver.finish()
    assert [("bad", ()), ("bad", (ref.digest,))] == court.trials


def test_where_nobody_is_suspect_there_is_no_trial(stage: Stage) -> None:
    court = Court(stage)
    for work in make_works(stage, 6):
        court.driver.submit(work)
    court.driver.finish()
    assert court.trials == []


def test_a_suspect_at_which_the_model_raises_ends_with_its_reason_and_its_trial_is_over(stage: Stage) -> None:
    court = Court(stage, is_fatal=True)
    works = make_works(stage, 4)
    for work in works:
        court.driver.submit(work)
    court.driver.submit(Submit(request_id="bad", prompt=POISONED, sampling=greedy(5), suspect=True))
    court.driver.finish()
    court.driver.step()
    assert (court.driver.answers["bad"].error_code, court.on_trial) == ("engine_error", "")
    for work in works:
        stage.oracle.check_answer(work, court.driver.answers[work.request_id].tokens)


# --- real processes: see poisoned_parked.py for what ends them

LONG = 200  # tokens: an answer that is still running when the poison comes


@pytest.fixture(scope="module")
def poisoned(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a machine that anybody can end the replicas of."""
    root = tmp_path_factory.mktemp("poisoned")
    state = state_dir(options_for(root), stage.folder)
    state.mkdir(parents=True)
    program = Path(__file__).with_name("poisoned_host.py")
    with subprocess.Popen([sys.executable, str(program), str(state)]) as host:
        asyncio.run(until_there(runtime_dir(state) / HOST_SOCKET))
        yield root
        host.terminate()


async def until_there(path: Path) -> None:
    async with asyncio.timeout(30):
        while not path.exists():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def router(stage: Stage, root: Path) -> AsyncIterator[Machine]:
    machine = Machine(options_for(root), stage.manifest, stage.folder)
    await machine.start()
    try:
        yield machine
    finally:
        await machine.close()


async def store_adapters(stage: Stage, root: Path) -> list[AdapterRef]:
    store = AdapterStore.open(options_for(root), stage.manifest)
    try:
        return [await store_adapter(store, f"user{number}", a) for number, a in enumerate(stage.adapters)]
    finally:
        await store.close()


async def store_adapter(store: AdapterStore, user_id: str, adapter: Adapter) -> AdapterRef:
    await store.push(user_id, adapter.folder)
    return (await store.resolve(user_id)).ref


class Client:
    """One request, and what came of it."""

    def __init__(self, work: Submit) -> None:
        self.work = work
        self.tokens: list[int] = []
        self.replica_ids: list[str] = []
        self.has_begun = asyncio.Event()

    async def ask(self, machine: Machine) -> None:
        run = machine.submit(self.work)
        async for progress in run:
            self.tokens += progress.tokens
            if run.replica_id not in self.replica_ids:
                self.replica_ids.append(run.replica_id)
            self.has_begun.set()


def innocents(ref: AdapterRef) -> list[Client]:
    generator = random.Random(3)
    return [
        Client(
            Submit(
                request_id=f"innocent{number}",
                prompt=random_prompt(generator, 6, POISON),
                sampling=greedy(LONG),
                adapter=(None, ref)[number % 2],
            )
        )
        for number in range(6)
    ]


@pytest.mark.parametrize("poison", ["a prompt that ends the process", "an adapter whose file is cut short"])
def test_a_request_that_ends_replicas_fails_alone_and_all_others_get_every_token(
    stage: Stage, poisoned: Path, poison: str
) -> None:
    async def scenario() -> None:
        sound, fatal = await store_adapters(stage, poisoned)
        bad = Submit(request_id="bad", prompt=POISONED, sampling=greedy(5))
        if "adapter" in poison:
            bad = Submit(request_id="bad", prompt=(5, 6), sampling=greedy(5), adapter=fatal)
        clients = innocents(sound)
        async with router(stage, poisoned) as machine, asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(client.ask(machine))
            for client in clients:
                await client.has_begun.wait()
            with pytest.raises(ReplicaError) as refusal:
                await Client(bad).ask(machine)
            assert refusal.value.code == "request_ends_replicas"
        for client in clients:
            assert len(client.tokens) == LONG
            stage.oracle.check(digest_of(client.work), list(client.work.prompt), client.tokens)
            assert 2 <= len(client.replica_ids) <= 4

    asyncio.run(scenario())
