"""How often a greedy token is the one that fp32 would choose, told the same text so far.

The engine answers in the dtype it serves; transformers, with the same weights in fp32, is asked at each place
what it would have said. Beside it, transformers in the served dtype on the same texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from tests.benchmarks.adapters import make_adapters, prepared, shelve
from tests.benchmarks.bench import Bench
from tests.benchmarks.engines import EngineClient
from tests.benchmarks.figures import Figure, counted, figure
from tests.benchmarks.references import load_reference
from tests.benchmarks.traces import Trace

from tunefleet.text import Tokenizer

QUESTIONS = (
    "Why is the sky blue?",
    "Write a short letter that thanks a neighbour for watering the plants.",
    "What is the difference between a crocodile and an alligator?",
    "Explain to a child how a bicycle stays upright.",
    "List five things to pack for a week by the sea.",
    "How do I cook rice so that it does not stick?",
    "Summarise the story of Romeo and Juliet.",
    "Who invented the telephone, and who disputed it?",
    "Give three reasons to learn a second language.",
    "What happens to money that is left in a savings account?",
    "Describe a thunderstorm without the word rain.",
    "How does a vaccine work?",
    "Name some rivers of Europe and the seas they reach.",
    "What should I ask before I rent a flat?",
    "Write a limerick about a cat that is afraid of mice.",
    "Why do leaves change their colour in autumn?",
)
RANK = 8
NUM_ADAPTERS = 4


def measure(bench: Bench) -> Iterator[Figure]:
    tokenizer = Tokenizer(bench.base_dir)
    questions = QUESTIONS[: bench.size(len(QUESTIONS), 2)]
    prompts = [tuple(tokenizer.encode_chat([{"role": "user", "content": text}])) for text in questions]
    made = make_adapters(bench, [RANK] * bench.size(NUM_ADAPTERS, 1), seed=6)
    disk_dir = bench.folder / "agreement-disk"
    refs = shelve(made, disk_dir, len(made))
    num_tokens = bench.size(64, 4)
    with prepared(bench, disk_dir, refs) as paths:
        client = EngineClient(bench, paths, max_num_seqs=len(prompts))
        plain = _texts(prompts, client.burst(prompts, num_tokens))
        own = [_texts(prompts, client.burst(prompts, num_tokens, [ref] * len(prompts))) for ref in refs]
    yield from _agreement(bench, "no adapter", [plain], [None])
    yield from _agreement(bench, counted(len(made), "adapter"), own, made)


class _Text:
    """A prompt and its answer."""

    def __init__(self, prompt: tuple[int, ...], answer: Sequence[int]) -> None:
        self.tokens = torch.tensor([[*prompt, *answer]])
        self.answer = torch.tensor(list(answer))

    @torch.inference_mode()
    def choices(self, model: torch.nn.Module) -> torch.Tensor:
        """``[answer]``: what the model would say at each place of the answer."""
        logits = model(input_ids=self.tokens, use_cache=False).logits[0]
        choices: torch.Tensor = logits[-len(self.answer) - 1 : -1].argmax(-1)
        return choices


def _texts(prompts: Sequence[tuple[int, ...]], traces: Sequence[Trace]) -> list[_Text]:
    return [_Text(prompt, trace.tokens) for prompt, trace in zip(prompts, traces, strict=True)]


def _agreement(
    bench: Bench, name: str, groups: Sequence[Sequence[_Text]], folders: Sequence[Path | None]
) -> Iterator[Figure]:
    """One group of texts per adapter."""
    exact = [_choices(bench, "float32", texts, folder) for texts, folder in zip(groups, folders, strict=True)]
    served = [
        _choices(bench, bench.manifest.dtype, texts, folder)
        for texts, folder in zip(groups, folders, strict=True)
    ]
    answers = [torch.cat([text.answer for text in texts]) for texts in groups]
    dtype = bench.manifest.dtype
    yield figure(f"engine in {dtype} as fp32, {name}", "%", _percent(answers, exact))
    yield figure(f"transformers in {dtype} as fp32, {name}", "%", _percent(served, exact))


def _percent(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> list[float]:
    return [100 * float((a == b).float().mean()) for a, b in zip(found, exact, strict=True)]


def _choices(bench: Bench, dtype: str, texts: Sequence[_Text], folder: Path | None) -> torch.Tensor:
    model: torch.nn.Module = load_reference(bench, dtype)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).eval()
    return torch.cat([text.choices(model) for text in texts])
