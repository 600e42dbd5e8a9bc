"""Base models as people have them: a folder with weights, configuration and tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 128


def spread_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A random fp32 model whose layers all matter to its logits, as a trained one's do."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.25)
    return model.eval()


def write_base(model: PreTrainedModel, folder: Path) -> Path:
    """The model as ``save_pretrained`` leaves it, with a tokenizer of one word per id."""
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    words = {f"w{number}": number for number in range(VOCAB - 1)}
    tokenizer = Tokenizer(WordLevel({**words, "<unk>": VOCAB - 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
