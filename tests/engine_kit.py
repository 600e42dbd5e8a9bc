"""What engine tests share: tiny models, adapters made by PEFT, and the oracle that checks answers."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tunefleet.adapters_store.prepare import prepare_adapter
from tunefleet.adapters_store.slot_layout import SlotLayout
from tunefleet.adapters_store.validation import check_adapter
from tunefleet.core import AdapterRef, FinishReason, Manifest, SamplingParams
from tunefleet.messages import Progress, Submit, TokenLogprob
from tunefleet.runtime.base import MANIFEST_FILE
from tunefleet.runtime.engine import Engine, EngineLimits
from tunefleet.runtime.model import load_model, save_model
from tunefleet.runtime.prepare import describe, write_manifest
from tunefleet.runtime.sampling import sample
from tunefleet.runtime.trials import TrialOf

TIE = 1e-3  # logits closer than this are a tie: rounding may decide either way
VOCAB = 128

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,  # tied, a random model repeats its input
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SMALL),
    "qwen2": Qwen2Config(**_SMALL),  # biases on q, k, v
    "qwen3": Qwen3Config(**_SMALL),  # norms on q and k
    "mistral": MistralConfig(**_SMALL, sliding_window=8),
    "gemma2": Gemma2Config(
        **_SMALL, sliding_window=8, query_pre_attn_scalar=8
    ),  # soft caps, alternating windows
    "gemma3": Gemma3TextConfig(**_SMALL, sliding_window=8, query_pre_attn_scalar=8),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=512,
        eos_token_id=1,
        tie_word_embeddings=False,
    ),  # Conv1D
}


def tiny_model(name: str) -> PreTrainedModel:
    """A random model of an architecture, fp32, spread enough that its argmax is no tie."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.25)
    return model.eval()


def prepare_model(model: PreTrainedModel, folder: Path) -> Manifest:
    """A prepared base without tokenizer or probe."""
    folder.mkdir(parents=True)
    manifest = describe(model, name=folder.name, weights_sha256="0" * 64, dtype="float32")
    model.config.save_pretrained(folder)
    save_model(model, folder)
    write_manifest(manifest, folder)
    assert (folder / MANIFEST_FILE).exists()
    return manifest


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter in all its shapes: PEFT folder, prepared file, reference."""

    folder: Path
    prepared: Path
    ref: AdapterRef


def make_adapter(
    model: PreTrainedModel, manifest: Manifest, folder: Path, seed: int, *, std: float = 0.2, **config: object
) -> Adapter:
    """A random adapter that PEFT made and saved, checked and prepared as an upload would be."""
    torch.manual_seed(seed)
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(init_lora_weights=False, **config))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
    peft_model.save_pretrained(folder)
    return check_and_prepare(manifest, folder)


def check_and_prepare(manifest: Manifest, folder: Path) -> Adapter:
    checked = check_adapter(folder, manifest, max_rank=64)
    prepared = folder / "prepared.safetensors"
    layout = SlotLayout(manifest.linears)
    prepare_adapter(folder, checked, prepared, layout=layout, dtype="float32")
    ref = AdapterRef(checked.digest, "default", "", checked.weights_sha256, checked.size_bytes, checked.rank)
    return Adapter(folder, prepared, ref)


class Oracle:
    """Teacher-forced forwards of PEFT: is each greedy token the reference's, or a tie?

    Holds a merged copy of the base per adapter, ``max_models`` at once.
    """

    def __init__(self, model: PreTrainedModel, adapters: list[Adapter], *, max_models: int = 100) -> None:
        self._base = model
        self._max_models = max_models
        self._models: dict[str, PreTrainedModel | PeftModel] = {}
        self._folders = {adapter.ref.digest: adapter.folder for adapter in adapters}

    def logits(self, digest: str | None, prompt: list[int], answer: list[int]) -> torch.Tensor:
        """``[answer, vocab]``: what the reference would choose from at each place."""
        with torch.inference_mode():
            input_ids = torch.tensor([prompt + answer])
            output = self._model(digest)(input_ids=input_ids, use_cache=False)
        return output.logits[0, len(prompt) - 1 : -1].float()

    def check(self, digest: str | None, prompt: list[int], answer: list[int]) -> None:
        logits = self.logits(digest, prompt, answer)
        best = logits.max(dim=-1)
        chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        gaps = best.values - chosen
        assert float(gaps.max()) < TIE, f"{digest}: token {int(gaps.argmax())} is not the reference's"

    def check_sampled(
        self, digest: str | None, prompt: list[int], answer: list[int], params: SamplingParams, first: int = 0
    ) -> None:
        """Each token is drawn from the reference's logits, or from some that differ by less than ``TIE``.

        Args:
            first: the index of the first token of ``answer``.
        """
        logits = self.logits(digest, prompt, answer)
        wanted = torch.tensor(answer)
        indexes = list(range(first, first + len(answer)))
        generator = torch.Generator().manual_seed(0)
        right = torch.zeros_like(wanted, dtype=torch.bool)
        for width in [0.0, *[TIE] * 40]:
            noise = (torch.rand(logits.shape, generator=generator) - 0.5) * width
            right |= torch.tensor(sample(logits + noise, [params] * len(answer), indexes).tokens) == wanted
            if right.all():
                return
        raise AssertionError(f"{digest}: token {int(right.int().argmin())} is not the reference's")

    def check_logprobs(self, work: Submit, answer: Answer) -> None:
        """As many as tokens where they were asked for, each what the reference would say."""
        if work.sampling.logprobs is None:
            assert answer.logprobs == []
            return
        own = [found.logprob for found in answer.logprobs]
        prompt = [*work.prompt, *work.generated]
        logprobs = self.logits(digest_of(work), prompt, answer.tokens).log_softmax(dim=-1)
        expected = logprobs.gather(1, torch.tensor(answer.tokens).unsqueeze(1)).squeeze(1)
        assert own == pytest.approx(expected.tolist(), abs=TIE)
        assert {len(found.top) for found in answer.logprobs} == {work.sampling.logprobs}

    def check_answer(self, work: Submit, tokens: list[int]) -> None:
        """Greedy or sampled, from the first token or resumed."""
        digest, prompt = digest_of(work), [*work.prompt, *work.generated]
        if not tokens:
            return
        if work.sampling.temperature == 0:
            self.check(digest, prompt, tokens)
        else:
            self.check_sampled(digest, prompt, tokens, work.sampling, len(work.generated))

    def agrees(self, digest: str | None, prompt: list[int], answer: list[int]) -> bool:
        return bool((self.logits(digest, prompt, answer).argmax(-1) == torch.tensor(answer)).all())

    def _model(self, digest: str | None) -> PreTrainedModel | PeftModel:
        if digest is None:
            return self._base
        if digest not in self._models:
            if len(self._models) == self._max_models:
                del self._models[next(iter(self._models))]
            model = PeftModel.from_pretrained(copy.deepcopy(self._base), self._folders[digest])
            self._models[digest] = model.merge_and_unload().eval()
        return self._models[digest]


class Stage(NamedTuple):
    """A tiny base, adapters of it, and what knows their answers."""

    model: PreTrainedModel
    folder: Path
    manifest: Manifest
    adapters: list[Adapter]
    oracle: Oracle

    def engine(self, **limits: int) -> Engine:
        return new_engine(self.folder, self.manifest, **limits)

    def driver(self, **limits: int) -> Driver:
        return Driver(self.engine(**limits), self.adapters)


def make_stage(root: Path, shapes: list[dict[str, object]], num_adapters: int) -> Stage:
    """Random adapters of the tiny Llama, of one shape after another."""
    model = tiny_model("llama")
    manifest = prepare_model(model, root / "base")
    adapters = [
        make_adapter(model, manifest, root / f"adapter-{seed}", seed, **shapes[seed % len(shapes)])
        for seed in range(num_adapters)
    ]
    return Stage(model, root / "base", manifest, adapters, Oracle(model, adapters))


@dataclasses.dataclass
class Answer:
    tokens: list[int] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    error_code: str = ""
    cached_tokens: int = 0
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    shared_with: int = 0  # most sequences in a step with it
    num_adapters: int = 0

    def take(self, progress: Progress) -> None:
        self.tokens += progress.tokens
        self.logprobs += progress.logprobs
        self.finish_reason = progress.finish_reason
        self.error_code = progress.error_code
        if progress.timing is not None:
            self.cached_tokens = progress.timing.cached_tokens
        self.shared_with = max(self.shared_with, progress.batch_size)
        self.num_adapters = max(self.num_adapters, progress.num_adapters)


class Driver:
    """Steps an engine and plays the host process: adapters arrive some steps after they were asked for.

    Args:
        load_steps: how many; a function is asked for each.
        trial: entered for what the engine does for a suspect alone.
    """

    def __init__(
        self,
        engine: Engine,
        adapters: list[Adapter],
        *,
        load_steps: int | Callable[[], int] = 2,
        trial: TrialOf = nullcontext,
    ) -> None:
        self.engine = engine
        self.answers: dict[str, Answer] = {}
        self._paths = {adapter.ref.digest: adapter.prepared for adapter in adapters}
        self._arriving: list[tuple[int, str]] = []
        self._trial = trial
        self._load_steps = load_steps if callable(load_steps) else lambda: load_steps

    def submit(self, work: Submit) -> Answer:
        answer = self.answers[work.request_id] = Answer()
        self.engine.add(work)
        return answer

    def step(self) -> list[Progress]:
        self._arriving += [(self._load_steps(), ref.digest) for ref in self.engine.missing_adapters()]
        self._arriving = [(steps - 1, digest) for steps, digest in self._arriving]
        for steps, digest in list(self._arriving):
            if steps <= 0:
                self._arriving.remove((steps, digest))
                self.deliver(digest)
        news = self.engine.step(self._trial)
        self.engine.check()
        for progress in news:
            self.answers[progress.request_id].take(progress)
        return news

    def deliver(self, digest: str) -> None:
        """The adapter is in the host tier."""
        self.engine.adapter_loaded(digest, self._paths[digest], 0.0, 0.0)

    def finish(self) -> None:
        while self.engine.scheduler:
            self.step()


def new_engine(folder: Path, manifest: Manifest, **limits: int) -> Engine:
    return Engine(
        load_model(folder), manifest, EngineLimits(**{"max_model_len": 256, **limits}), clock=lambda: 0.0
    )


def random_prompt(generator: random.Random, length: int, vocab: int = VOCAB) -> tuple[int, ...]:
    return tuple(generator.randrange(2, vocab) for _ in range(length))


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def ask(
    request_id: str,
    adapter: Adapter | None,
    prompt: tuple[int, ...],
    max_tokens: int = 24,
    *,
    user_id: str | None = "alice",
    tenant: str = "acme",
) -> Submit:
    """A greedy request of somebody's, for an adapter or the base."""
    return Submit(
        request_id=request_id,
        prompt=prompt,
        sampling=greedy(max_tokens),
        adapter=adapter.ref if adapter else None,
        tenant=tenant,
        user_id=user_id,
    )


def digest_of(work: Submit) -> str | None:
    return work.adapter.digest if work.adapter else None
