"""The engine's answers are each adapter's own, whatever else is in the batch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import torch
from transformers import PreTrainedModel

from engine_kit import (
    Adapter,
    Driver,
    Oracle,
    greedy,
    make_adapter,
    new_engine,
    prepare_model,
    random_prompt,
    tiny_model,
)
from tunefleet.core import FinishReason, Manifest, SamplingParams
from tunefleet.messages import Submit
from tunefleet.runtime.engine import MAX_OFFERS
from tunefleet.runtime.lora import LoraLayer

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
SHAPES: list[dict[str, object]] = [
    {"r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]},
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    {"r": 8, "lora_alpha": 8, "target_modules": ALL, "use_rslora": True},
    {"r": 8, "lora_alpha": 16, "target_modules": ["down_proj"]},
    {
        "r": 16,
        "lora_alpha": 16,
        "target_modules": ATTENTION,
        "rank_pattern": {"q_proj": 4, "layers.1.self_attn.v_proj": 2},
    },
    {"r": 12, "lora_alpha": 8, "target_modules": ALL, "alpha_pattern": {"o_proj": 30, "up_proj": 3}},
    {"r": 32, "lora_alpha": 16, "target_modules": ["gate_proj", "up_proj"], "layers_to_transform": [1, 2]},
    {"r": 64, "lora_alpha": 32, "target_modules": ALL},
    {
        "r": 3,
        "lora_alpha": 9,
        "target_modules": ["k_proj", "o_proj"],
        "use_rslora": True,
        "rank_pattern": {"k_proj": 7},
    },
]


class Tiny(NamedTuple):
    """A tiny Llama with adapters of every shape."""

    model: PreTrainedModel
    folder: Path
    manifest: Manifest
    adapters: list[Adapter]
    oracle: Oracle


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    model = tiny_model("llama")
    manifest = prepare_model(model, root / "base")
    adapters = [
        make_adapter(model, manifest, root / f"adapter-{seed}", seed, **shape)
        for seed, shape in enumerate(SHAPES)
    ]
    return Tiny(model, root / "base", manifest, adapters, Oracle(model, adapters))


def test_mixed_adapters_of_every_shape_answer_as_peft_does(tiny: Tiny) -> None:
    """Arrivals and departures at random, ranks 1 to 64 and none, more adapters than slots."""
    generator = random.Random(7)
    driver = Driver(
        new_engine(tiny.folder, tiny.manifest, max_num_seqs=6, max_active_adapters=4), tiny.adapters
    )
    choices = [*tiny.adapters, None]
    works = [
        Submit(
            request_id=f"{index}",
            prompt=random_prompt(generator, generator.randrange(1, 60)),
            sampling=greedy(generator.randrange(1, 40)),
            adapter=adapter.ref if adapter else None,
        )
        for index, adapter in enumerate(choices * 6)
    ]
    generator.shuffle(works)
    for work in works:
        driver.submit(work)
        for _ in range(generator.randrange(3)):
            driver.step()
    driver.finish()
    for work in works:
        answer = driver.answers[work.request_id]
        assert answer.finish_reason is FinishReason.LENGTH
        assert len(answer.tokens) == work.sampling.max_tokens
        tiny.oracle.check(work.adapter.digest if work.adapter else None, list(work.prompt), answer.tokens)
    assert max(answer.num_adapters for answer in driver.answers.values()) >= 3


def test_each_adapter_changes_the_answer(tiny: Tiny) -> None:
    """Else the oracle would pass with the base's weights."""
    prompt = random_prompt(random.Random(1), 20)
    driver = Driver(
        new_engine(tiny.folder, tiny.manifest, max_num_seqs=16, max_active_adapters=16), tiny.adapters
    )
    for index, adapter in enumerate(tiny.adapters):
        driver.submit(Submit(request_id=str(index), prompt=prompt, sampling=greedy(24), adapter=adapter.ref))
    driver.finish()
    for index in range(len(tiny.adapters)):
        assert not tiny.oracle.agrees(None, list(prompt), driver.answers[str(index)].tokens)


def test_a_sequence_that_joins_changes_nobody_elses_tokens(tiny: Tiny) -> None:
    prompt = random_prompt(random.Random(2), 30)
    work = Submit(request_id="alone", prompt=prompt, sampling=greedy(30), adapter=tiny.adapters[2].ref)
    alone = Driver(new_engine(tiny.folder, tiny.manifest), tiny.adapters)
    alone.submit(work)
    alone.finish()
    crowd = Driver(new_engine(tiny.folder, tiny.manifest, max_num_seqs=12), tiny.adapters)
    crowd.submit(work)
    generator = random.Random(3)
    for index, adapter in enumerate(tiny.adapters * 2):
        crowd.step()
        crowd.submit(
            Submit(
                request_id=str(index),
                prompt=random_prompt(generator, 40),
                sampling=greedy(20),
                adapter=adapter.ref,
            )
        )
    crowd.finish()
    tiny.oracle.check(tiny.adapters[2].ref.digest, list(prompt), crowd.answers["alone"].tokens)
    assert alone.answers["alone"].tokens == crowd.answers["alone"].tokens


def test_a_long_prompt_is_prefilled_in_chunks_beside_decoding_sequences(tiny: Tiny) -> None:
    driver = Driver(new_engine(tiny.folder, tiny.manifest, max_batch_tokens=16), tiny.adapters)
    short = Submit(request_id="short", prompt=(5, 6), sampling=greedy(60), adapter=tiny.adapters[1].ref)
    long = Submit(
        request_id="long",
        prompt=random_prompt(random.Random(4), 150),
        sampling=greedy(80),
        adapter=tiny.adapters[7].ref,
    )
    driver.submit(short)
    for _ in range(6):
        driver.step()
    before = len(driver.answers["short"].tokens)
    driver.submit(long)
    while not driver.answers["long"].tokens:
        driver.step()
    assert len(driver.answers["short"].tokens) >= before + 8
    driver.finish()
    for work in (short, long):
        assert work.adapter is not None
        tiny.oracle.check(work.adapter.digest, list(work.prompt), driver.answers[work.request_id].tokens)


def test_a_cancelled_sequence_frees_row_and_slot_at_once(tiny: Tiny) -> None:
    driver = Driver(new_engine(tiny.folder, tiny.manifest), tiny.adapters, load_steps=1)
    driver.submit(Submit(request_id="a", prompt=(3, 4), sampling=greedy(50), adapter=tiny.adapters[0].ref))
    driver.step()
    driver.step()
    digest = tiny.adapters[0].ref.digest
    assert driver.engine.slots.is_pinned(digest)
    driver.engine.cancel("a")
    driver.engine.check()
    assert not driver.engine.slots.is_pinned(digest)
    assert sum(driver.engine.rows.num_rows(length) for length in driver.engine.rows.lengths) == 0
    assert driver.step() == []


def test_a_failed_adapter_ends_only_those_who_wait_for_it(tiny: Tiny) -> None:
    engine = new_engine(tiny.folder, tiny.manifest)
    driver = Driver(engine, tiny.adapters, load_steps=1)
    driver.submit(Submit(request_id="good", prompt=(3, 4), sampling=greedy(5), adapter=tiny.adapters[0].ref))
    driver.step()
    driver.submit(Submit(request_id="bad", prompt=(3, 4), sampling=greedy(5), adapter=tiny.adapters[1].ref))
    assert [ref.digest for ref in engine.missing_adapters()] == [tiny.adapters[1].ref.digest]
    engine.adapter_failed(tiny.adapters[1].ref.digest, "gone", "adapter_load_failed")
    driver.finish()
    driver.step()
    assert driver.answers["bad"].error_code == "adapter_load_failed"
    assert driver.answers["good"].finish_reason is FinishReason.LENGTH


def test_objects_that_failed_end_only_those_who_have_them(tiny: Tiny) -> None:
    engine = new_engine(tiny.folder, tiny.manifest)
    driver = Driver(engine, tiny.adapters, load_steps=1)
    lost = msgspec.structs.replace(tiny.adapters[0].ref, key="lost")
    sound = msgspec.structs.replace(lost, key="sound")
    for request_id, ref in (("sound", sound), ("lost", lost)):
        work = Submit(request_id=request_id, prompt=(3, 4), sampling=greedy(5), adapter=ref)
        driver.submit(work)
    assert len(engine.missing_adapters()) == 1
    engine.adapter_failed(lost.digest, "gone", "adapter_lost", 10.0, key=lost.key)
    driver.finish()
    driver.step()
    assert driver.answers["lost"].error_code == "adapter_lost"
    assert driver.answers["sound"].finish_reason is FinishReason.LENGTH


def test_a_broken_prepared_file_ends_only_its_own_sequences(tiny: Tiny, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(tiny.adapters[1].prepared.read_bytes()[:-7])
    engine = new_engine(tiny.folder, tiny.manifest)
    driver = Driver(engine, tiny.adapters, load_steps=1)
    driver.submit(Submit(request_id="good", prompt=(3, 4), sampling=greedy(5), adapter=tiny.adapters[0].ref))
    driver.step()
    driver.submit(Submit(request_id="bad", prompt=(3, 4), sampling=greedy(5), adapter=tiny.adapters[1].ref))
    engine.missing_adapters()
    engine.adapter_loaded(tiny.adapters[1].ref.digest, broken, 0.0, 0.0)
    driver.finish()
    driver.step()
    assert driver.answers["bad"].error_code == "adapter_load_failed"
    assert driver.answers["good"].finish_reason is FinishReason.LENGTH


def test_a_full_queue_refuses_the_new_and_never_who_ran_elsewhere_already(tiny: Tiny) -> None:
    engine = new_engine(tiny.folder, tiny.manifest, max_queue=1)
    for request_id, changes in (
        ("first", {}),
        ("new", {}),
        ("answered in part", {"generated": (9,)}),
        ("maybe to blame", {"suspect": True}),
    ):
        engine.add(Submit(request_id=request_id, prompt=(3, 4), sampling=greedy(2), **changes))
    refused = [progress.request_id for progress in engine.step() if progress.error_code == "queue_full"]
    assert refused == ["new"]


def test_a_prepared_file_that_is_gone_is_fetched_again_but_not_for_ever(tiny: Tiny, tmp_path: Path) -> None:
    engine = new_engine(tiny.folder, tiny.manifest)
    ref = tiny.adapters[0].ref
    for request_id, num_gone in (("comes back", MAX_OFFERS - 1), ("never there", MAX_OFFERS)):
        engine.evict(ref.digest)
        engine.add(Submit(request_id=request_id, prompt=(3, 4), sampling=greedy(5), adapter=ref))
        for _ in range(num_gone):
            assert engine.missing_adapters() == [ref]
            engine.adapter_loaded(ref.digest, tmp_path / "gone.safetensors", 0.0, 0.0)
        if engine.missing_adapters():
            engine.adapter_loaded(ref.digest, tiny.adapters[0].prepared, 0.0, 0.0)
        news = [progress for _ in range(5) for progress in engine.step()]
        failed = request_id == "never there"
        assert ("adapter_unavailable" if failed else "") == news[-1].error_code
        assert len(news) == (1 if failed else 5)


def test_a_sequence_whose_logits_are_not_finite_ends_alone_and_leaves_nothing_behind(tiny: Tiny) -> None:
    engine = new_engine(tiny.folder, tiny.manifest)
    driver = Driver(engine, tiny.adapters, load_steps=1)
    prompt = random_prompt(random.Random(5), 12)
    driver.submit(Submit(request_id="good", prompt=prompt, sampling=greedy(30), adapter=tiny.adapters[0].ref))
    driver.submit(Submit(request_id="bad", prompt=prompt, sampling=greedy(30), adapter=tiny.adapters[2].ref))
    for _ in range(4):
        driver.step()
    slot = engine.slots.lookup(tiny.adapters[2].ref.digest)
    assert slot is not None
    engine.banks.values(slot).fill_(float("nan"))
    driver.step()
    driver.submit(
        Submit(request_id="after", prompt=prompt, sampling=greedy(30), adapter=tiny.adapters[1].ref)
    )
    driver.finish()
    assert driver.answers["bad"].error_code == "non_finite_logits"
    tiny.oracle.check(tiny.adapters[0].ref.digest, list(prompt), driver.answers["good"].tokens)
    tiny.oracle.check(tiny.adapters[1].ref.digest, list(prompt), driver.answers["after"].tokens)


def test_a_slot_that_is_used_again_shows_nothing_of_what_was_in_it(tiny: Tiny) -> None:
    """A wide adapter, then a narrow one of the same rank class in the only slot."""
    driver = Driver(new_engine(tiny.folder, tiny.manifest, max_active_adapters=1), tiny.adapters)
    prompt = random_prompt(random.Random(6), 20)
    for index in (2, 3, 2, 0):
        request_id = f"{index}-{len(driver.answers)}"
        driver.submit(
            Submit(
                request_id=request_id, prompt=prompt, sampling=greedy(20), adapter=tiny.adapters[index].ref
            )
        )
        driver.finish()
        tiny.oracle.check(tiny.adapters[index].ref.digest, list(prompt), driver.answers[request_id].tokens)


def test_a_sequence_goes_on_elsewhere_from_the_tokens_already_sent(tiny: Tiny) -> None:
    """Greedy and sampled: the second engine gives what the first would have given."""
    for params in (
        greedy(40),
        SamplingParams(max_tokens=40, temperature=0.9, top_p=0.9, seed=11, ignore_eos=True),
    ):
        work = Submit(request_id="a", prompt=(7, 8, 9), sampling=params, adapter=tiny.adapters[5].ref)
        whole = Driver(new_engine(tiny.folder, tiny.manifest), tiny.adapters)
        whole.submit(work)
        whole.finish()
        tokens = whole.answers["a"].tokens
        rest = Driver(new_engine(tiny.folder, tiny.manifest), tiny.adapters)
        rest.submit(
            Submit(
                request_id="a",
                prompt=work.prompt,
                sampling=params,
                adapter=work.adapter,
                generated=tuple(tokens[:17]),
            )
        )
        rest.finish()
        assert tokens[17:] == rest.answers["a"].tokens


def test_an_end_token_ends_the_answer_and_is_not_part_of_it(tiny: Tiny) -> None:
    prompt = (9, 10, 11)
    free = Driver(new_engine(tiny.folder, tiny.manifest), tiny.adapters)
    free.submit(Submit(request_id="a", prompt=prompt, sampling=greedy(10)))
    free.finish()
    tokens = free.answers["a"].tokens
    manifest = msgspec.structs.replace(tiny.manifest, eos_token_ids=(tokens[4],))
    ended = Driver(new_engine(tiny.folder, manifest), tiny.adapters)
    ended.submit(Submit(request_id="a", prompt=prompt, sampling=SamplingParams(max_tokens=10)))
    ended.finish()
    assert ended.answers["a"].finish_reason is FinishReason.STOP
    assert ended.answers["a"].tokens == tokens[: tokens.index(tokens[4])]


@pytest.mark.parametrize(
    ("work", "code"),
    [
        (Submit(request_id="a", prompt=(), sampling=greedy(1)), "invalid_request"),
        (Submit(request_id="a", prompt=(1,) * 256, sampling=greedy(1)), "context_length_exceeded"),
        (Submit(request_id="a", prompt=(10**6,), sampling=greedy(1)), "invalid_request"),
    ],
)
def test_a_sequence_that_can_not_run_is_refused_and_the_engine_goes_on(
    tiny: Tiny, work: Submit, code: str
) -> None:
    driver = Driver(new_engine(tiny.folder, tiny.manifest), tiny.adapters)
    driver.submit(work)
    driver.step()
    assert driver.answers["a"].error_code == code
    driver.submit(Submit(request_id="b", prompt=(2,), sampling=greedy(1)))
    driver.finish()
    assert driver.answers["b"].finish_reason is FinishReason.LENGTH


def test_wrapped_layers_still_show_their_base(tiny: Tiny) -> None:
    base = torch.nn.Linear(3, 4)
    layer = LoraLayer(base, "x")
    assert layer.weight is base.weight
    assert layer.in_features == 3


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2"])
def test_other_architectures_answer_as_peft_does(name: str, tmp_path: Path) -> None:
    """Sliding windows, soft caps, biases, Conv1D: prompts and answers run past every window."""
    model = tiny_model(name)
    manifest = prepare_model(model, tmp_path / "base")
    targets = {"gpt2": [["c_attn"], ["c_attn", "c_proj", "c_fc"]]}.get(name, [["q_proj", "v_proj"], ALL])
    extra = {"fan_in_fan_out": True} if name == "gpt2" else {}
    adapters = [
        make_adapter(
            model,
            manifest,
            tmp_path / f"a{seed}",
            seed,
            r=rank,
            lora_alpha=16,
            target_modules=target,
            **extra,
        )
        for seed, (rank, target) in enumerate([(4, targets[0]), (16, targets[1])])
    ]
    driver = Driver(new_engine(tmp_path / "base", manifest), adapters)
    generator = random.Random(8)
    works = [
        Submit(
            request_id=str(index),
            prompt=random_prompt(generator, 3 + 9 * index),
            sampling=greedy(30),
            adapter=adapter.ref if adapter else None,
        )
        for index, adapter in enumerate([*adapters, None] * 2)
    ]
    for work in works:
        driver.submit(work)
        driver.step()
    driver.finish()
    oracle = Oracle(model, adapters)
    for work in works:
        digest = work.adapter.digest if work.adapter else None
        tokens = driver.answers[work.request_id].tokens
        oracle.check(digest, list(work.prompt), tokens)
        assert digest is None or not oracle.agrees(None, list(work.prompt), tokens)
