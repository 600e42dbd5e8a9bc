"""What scheduler tests share: small schedulers, sequences, and a double of the engine around them."""

from __future__ import annotations

from tunefleet.core import AdapterRef, FinishReason, SamplingParams
from tunefleet.messages import Submit
from tunefleet.runtime.prefixes import PrefixTable, Scope
from tunefleet.runtime.rows import Drop, KvOp, Load, Move, Resize, Row, RowTable, Save
from tunefleet.runtime.scheduler import Batch, Scheduler
from tunefleet.runtime.sequence import Sequence, SequenceState
from tunefleet.runtime.slots import Slot, SlotTable

EOS = 1
RANKS = {"a": 4, "b": 8, "c": 16, "d": 33, "e": 64}


def new_scheduler(
    *,
    max_slots: int = 4,
    num_pages: int = 64,
    budget_tokens: int = 100_000,
    max_num_seqs: int = 4,
    max_batch_tokens: int = 64,
    max_model_len: int = 300,
    **limits: int,
) -> Scheduler:
    return Scheduler(
        SlotTable(max_slots, num_pages),
        RowTable(max_model_len, budget_tokens),
        PrefixTable(),
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        max_model_len=max_model_len,
        eos_token_ids=frozenset({EOS}),
        **limits,
    )


def new_sequence(
    request_id: str,
    digest: str | None = None,
    *,
    user_id: str = "alice",
    num_prompt: int = 3,
    prompt: tuple[int, ...] = (),
    max_tokens: int = 5,
    ignore_eos: bool = False,
    generated: tuple[int, ...] = (),
    rank: int | None = None,
    suspect: bool = False,
) -> Sequence:
    """An adapter not named in RANKS has ``rank``, or 8."""
    rank = rank or RANKS.get(digest or "", 8)
    return Sequence.of(
        Submit(
            request_id=request_id,
            prompt=prompt or (7,) * num_prompt,
            sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos),
            adapter=None if digest is None else AdapterRef(digest, "default", "", "", 1, rank),
            generated=generated,
            user_id=user_id,
            suspect=suspect,
        )
    )


class KvDouble:
    """Carries out KvOps on lists: row -> whose KV of which tokens it holds."""

    def __init__(self) -> None:
        self.rows: dict[Row, list[tuple[Scope, int]]] = {}
        self.entries: dict[int, list[tuple[Scope, int]]] = {}
        self.capacity: dict[int, int] = {}

    @property
    def num_tokens(self) -> int:
        rows = sum(length * num_rows for length, num_rows in self.capacity.items())
        return rows + sum(map(len, self.entries.values()))

    def apply(self, ops: list[KvOp], budget_tokens: int) -> None:
        for op in ops:
            self._apply(op)
            assert self.num_tokens <= budget_tokens, f"{op} is over the budget"

    def write(self, row: Row, start: int, written: list[tuple[Scope, int]]) -> None:
        held = self._held(row)
        assert len(held) >= start, "there is a gap"
        assert start + len(written) <= row.length, "written beyond the row"
        self.rows[row] = held[:start] + written

    def _apply(self, op: KvOp) -> None:
        match op:
            case Move():
                self._put(op.target, self._held(op.source)[: op.num_tokens])
            case Save():
                saved = self._held(op.row)[: op.num_tokens]
                assert op.entry not in self.entries, "an entry is saved twice"
                assert op.num_tokens == len(saved), "an entry of what was never computed"
                self.entries[op.entry] = saved
            case Load():
                assert op.num_tokens <= len(self.entries[op.entry])
                self._put(op.row, self.entries[op.entry][: op.num_tokens])
            case Drop():
                del self.entries[op.entry]
            case Resize():
                self.capacity[op.length] = op.num_rows
                self.rows = {row: held for row, held in self.rows.items() if self._exists(row)}

    def _put(self, row: Row, held: list[tuple[Scope, int]]) -> None:
        assert self._exists(row), "there is no such row"
        self.rows[row] = held

    def _held(self, row: Row) -> list[tuple[Scope, int]]:
        assert self._exists(row), "there is no such row"
        return self.rows.get(row, [])

    def _exists(self, row: Row) -> bool:
        return row.index < self.capacity.get(row.length, 0)


class EngineDouble:
    """Does what the engine does around a scheduler, and checks it after each step.

    ``loaded`` are the adapters whose files are at hand. A fill takes ``fill_steps`` steps.
    """

    def __init__(self, scheduler: Scheduler, *, fill_steps: int = 0) -> None:
        self.scheduler = scheduler
        self.loaded: set[str] = set()
        self.fill_steps = fill_steps
        self.filling: dict[str, int] = {}  # digest -> steps that it still takes
        self.kv = KvDouble()
        self.joined: list[str] = []  # request ids, in their order
        self.num_steps = 0
        self.num_evicted = 0

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.scheduler.add(sequence)

    def fill(self) -> None:
        """Fills slots as far as they can be had."""
        while (activation := self.scheduler.next_activation(self.loaded)) is not None:
            self.loaded.remove(activation.digest)
            self.filling[activation.digest] = self.fill_steps
            self.num_evicted += len(activation.evicted)
            self.finish_fills()
        self.filling = {digest: steps - 1 for digest, steps in self.filling.items()}
        self.finish_fills()

    def finish_fills(self) -> None:
        for digest in [digest for digest, steps in self.filling.items() if steps <= 0]:
            del self.filling[digest]
            self.scheduler.activated(digest)

    def join(self) -> list[str]:
        """Fills slots and lets in who can run; who joined."""
        self.fill()
        joined = []
        while (sequence := self.scheduler.join()) is not None:
            assert SequenceState.RUNNING is sequence.state
            joined.append(sequence.request_id)
        self.joined += joined
        return joined

    def schedule(self) -> Batch:
        """The next batch, carried out on the KV double."""
        batch = self.scheduler.schedule()
        self.kv.apply(batch.kv_ops, self.scheduler.rows.budget_tokens)
        for sequence in self.scheduler.running:
            self._holds_its_own(sequence)
        for sequence, num_tokens, slot in batch.scheduled:
            assert slot == (None if sequence.digest is None else self.scheduler.slots.lookup(sequence.digest))
            start = sequence.num_computed
            tokens = sequence.tokens[start : start + num_tokens]
            row = self.scheduler.rows.row_of(sequence.request_id)
            self.kv.write(row, start, [(scope_of(sequence), token) for token in tokens])
        return batch

    def step(self, token: int = 5) -> list[str]:
        """One step, in which all that sample get ``token``; who is finished now."""
        self.num_steps += 1
        self.join()
        batch = self.schedule()
        finished = self.scheduler.advance(batch, sampled_by(batch, token))
        self.scheduler.check()
        return [sequence.request_id for sequence in finished]

    def run(self, max_steps: int, token: int = 5) -> None:
        """Until all are finished."""
        for _ in range(max_steps):
            if not self.scheduler:
                return
            self.step(token)
        assert not self.scheduler, f"not finished after {max_steps} steps"

    def run_until(self, request_id: str, max_steps: int) -> int:
        """Steps until a sequence runs."""
        for num_steps in range(max_steps):
            if request_id in self.joined:
                return num_steps
            self.step()
        raise AssertionError(f"{request_id} did not join within {max_steps} steps")

    def cancel(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence, FinishReason.CANCELLED)
        self.scheduler.check()

    def slots(self) -> dict[str, Slot]:
        """Of the sequences that run."""
        slots = {s.request_id: self.scheduler.slots.lookup(s.digest or "") for s in self.scheduler.running}
        return {request_id: slot for request_id, slot in slots.items() if slot is not None}

    def _holds_its_own(self, sequence: Sequence) -> None:
        """All sequences, those that the step leaves out as well."""
        if sequence.num_computed:
            held = self.kv.rows[self.scheduler.rows.row_of(sequence.request_id)][: sequence.num_computed]
            own = [(scope_of(sequence), token) for token in sequence.tokens[: sequence.num_computed]]
            assert own == held, f"{sequence.request_id} doesn't find its own KV"


def scope_of(sequence: Sequence) -> Scope:
    """Whose KV it computes, whatever the code under test takes it for."""
    return Scope(sequence.tenant, sequence.user_id, sequence.adapter.digest if sequence.adapter else None)


def sampled_by(batch: Batch, token: int = 5) -> dict[str, int]:
    return {entry.sequence.request_id: token for entry in batch.scheduled if entry.samples}


def shape(batch: Batch) -> list[tuple[str, int, bool]]:
    return [(entry.sequence.request_id, entry.num_tokens, entry.samples) for entry in batch.scheduled]
