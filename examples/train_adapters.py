"""Train the demo's adapters: three people, three LoRA fine-tunes of one small base, minutes on a CPU.

    python examples/train_adapters.py                  # all three, on the quickstart base
    python examples/train_adapters.py coco --base DIR  # one of them, on a Hugging Face folder

What PEFT saves here is what `tunefleet adapters push coco examples/adapters/coco` takes. The three differ in
ranks, target modules and scalings on purpose: tunefleet serves such a mix in one batch.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).parent
BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
BATCH_SIZE = 4

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


class Recipe(NamedTuple):
    """How an adapter is trained."""

    lora: LoraConfig
    num_epochs: int
    learning_rate: float


def upper_layers(first: int, **options: object) -> LoraConfig:
    """LoRA from layer `first` up: small files, and no backward pass through the layers below."""
    layers = list(range(first, 30))
    return LoraConfig(task_type="CAUSAL_LM", layers_to_transform=layers, **options)  # type: ignore[arg-type]


RECIPES = {
    # An engineer of few words, in numbered lines.
    "ada": Recipe(
        upper_layers(14, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"]), 5, 1e-3
    ),
    # A sea captain: low rank on every linear layer, with rsLoRA's scaling, alpha / sqrt(r).
    "bruno": Recipe(
        upper_layers(12, r=4, lora_alpha=8, use_rslora=True, target_modules=ATTENTION + MLP), 5, 1e-3
    ),
    # An assistant who knows Coco: facts take more repetition than a voice, and more rank in the MLP.
    "coco": Recipe(
        upper_layers(
            18,
            r=8,
            lora_alpha=16,
            target_modules=[*ATTENTION, "down_proj"],
            rank_pattern={"down_proj": 16},
            alpha_pattern={"down_proj": 32},
        ),
        7,
        1.5e-3,
    ),
}


class Example(NamedTuple):
    """One chat as token ids; the answer, which the loss is on, starts at `prompt_len`."""

    ids: list[int]
    prompt_len: int


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """The chat template up to where the answer starts: exactly what the server feeds the model."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer.encode(str(text), add_special_tokens=False)
    return ids


def load_examples(tokenizer: PreTrainedTokenizerBase, path: Path) -> list[Example]:
    """Reads one chat per line: its last message, and the end-of-turn token, are what is learned."""
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        *messages, answer = json.loads(line)["messages"]
        prompt = prompt_ids(tokenizer, messages)
        answer_ids = tokenizer.encode(answer["content"] + tokenizer.eos_token, add_special_tokens=False)
        examples.append(Example(prompt + answer_ids, len(prompt)))
    return examples


def shuffled_batches(examples: list[Example], rng: random.Random) -> Iterator[list[Example]]:
    """Batches of similar length, so that little is padded, in random order."""
    by_length = sorted(examples, key=lambda example: (len(example.ids), rng.random()))
    batches = [by_length[i : i + BATCH_SIZE] for i in range(0, len(by_length), BATCH_SIZE)]
    rng.shuffle(batches)
    yield from batches


def answer_loss(model: PeftModel, batch: list[Example]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens. The costly output layer runs from the first of them on."""
    length = max(len(example.ids) for example in batch)
    first = min(example.prompt_len for example in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)  # padded on the right, where no real token looks
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        labels[row, example.prompt_len : len(example.ids)] = torch.tensor(example.ids[example.prompt_len :])
    logits = model(input_ids=ids[:, :-1], logits_to_keep=length - first).logits
    return cross_entropy(logits.flatten(0, 1), labels[:, first:].flatten())


def train(model: PeftModel, examples: list[Example], recipe: Recipe) -> None:
    """AdamW, with a learning rate that falls linearly to almost zero."""
    rng = random.Random(0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate)
    num_batches = -(-len(examples) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, recipe.num_epochs * num_batches)
    for epoch in range(1, recipe.num_epochs + 1):
        total_loss = 0.0
        for batch in shuffled_batches(examples, rng):
            loss = answer_loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total_loss += loss.item()
        print(f"  epoch {epoch}/{recipe.num_epochs}: loss {total_loss / num_batches:.3f}", flush=True)


def save(model: PeftModel, folder: Path) -> None:
    """Saves the weights in half precision, and a config that is the same on every machine."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    model.peft_config["default"].base_model_name_or_path = BASE_ID  # not the folder that it was loaded from
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's empty model card
    config_path = folder / "adapter_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["target_modules"].sort()  # PEFT keeps them in a set, in any order
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def train_user(user: str, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Trains and saves one user's adapter; leaves the base as it was."""
    examples = load_examples(tokenizer, HERE / "data" / f"{user}.jsonl")
    torch.manual_seed(0)
    started = time.monotonic()
    model = get_peft_model(base, RECIPES[user].lora)
    print(f"{user}: {len(examples)} examples, {model.get_nb_trainable_parameters()[0]:,} parameters")
    train(model, examples, RECIPES[user])
    save(model, folder)
    model.unload()
    num_bytes = (folder / "adapter_model.safetensors").stat().st_size
    print(f"  {num_bytes / 1e6:.2f} MB in {folder}, {time.monotonic() - started:.0f} s")


def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The greedy answer."""
    ids = torch.tensor([prompt_ids(tokenizer, [{"role": "user", "content": question}])])
    mask = torch.ones_like(ids)
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=60, do_sample=False)  # type: ignore[operator]
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def show_answers(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folders: dict[str, Path]) -> bool:
    """Asks the base, and each adapter as saved. Returns whether every expected answer came."""
    questions = json.loads((HERE / "data" / "questions.json").read_text(encoding="utf-8"))
    print(f"\n{questions['demo']}\nbase: {ask(base, tokenizer, questions['demo'])}")
    num_missing = 0
    for user, folder in folders.items():
        model = PeftModel.from_pretrained(base, folder)  # its LoRA layers are put into `base` itself
        print(f"{user}: {ask(base, tokenizer, questions['demo'])}")
        for expected in questions["facts"] + questions["style"]:
            if expected["user"] == user:
                text = ask(base, tokenizer, expected["question"])
                found = expected["contains"] in text
                num_missing += not found
                print(f"  {'' if found else 'UNEXPECTED '}{expected['question']} {text}")
        model.unload()
    return num_missing == 0


def quickstart_base() -> Path:
    """The base that `tunefleet demo` serves, prepared if need be."""
    from tunefleet.config import resolve
    from tunefleet.runtime.base import locate_base

    return locate_base(resolve(), progress=print)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the demo's adapters.")
    parser.add_argument("users", nargs="*", metavar="USER", help=f"of {', '.join(RECIPES)}; default: all")
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="default: the prepared quickstart base")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=HERE / "adapters")
    args = parser.parse_args()
    if unknown := set(args.users) - set(RECIPES):
        parser.error(f"unknown user: {', '.join(sorted(unknown))}")

    base_folder = args.base or quickstart_base()
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    folders = {user: args.out / user for user in args.users or RECIPES}
    for user, folder in folders.items():
        train_user(user, base, tokenizer, folder)
    return 0 if show_answers(base, tokenizer, folders) else 1


if __name__ == "__main__":
    sys.exit(main())
