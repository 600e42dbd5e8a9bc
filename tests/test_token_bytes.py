"""Tokens to the bytes that they write, in both kinds of vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from router_kit import IM_END, write_tokenizer
from tunefleet.text import Tokenizer
from tunefleet.token_bytes import TokenBytes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("base"), added=["<think>"]))


def sentence_piece() -> tokenizers.Tokenizer:
    """A vocabulary as Llama 2 and Gemma have it, with single bytes for what has no token."""
    pieces = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁hi", "▁", "é"]
    built = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: at for at, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    decoders = tokenizers.decoders
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    built.add_special_tokens(["<s>"])
    return built


@given(st.text())
def test_the_bytes_of_a_texts_tokens_are_the_texts(tokenizer: Tokenizer, text: str) -> None:
    written = [tokenizer.token_bytes.of(token) for token in tokenizer.encode(text)]
    assert b"".join(part or b"" for part in written) == tokenizer.decode(tokenizer.encode(text)).encode()


def test_a_part_of_a_character_is_written_as_escapes(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("🎉")
    assert [tokenizer.token_bytes.of(token) for token in tokens] == [b"\xf0", b"\x9f", b"\x8e", b"\x89"]
    assert tokenizer.token_bytes.name(tokens[0]) == "\\xf0"


def test_control_tokens_write_nothing_and_other_added_ones_their_text(tokenizer: Tokenizer) -> None:
    assert (tokenizer.token_bytes.of(IM_END), tokenizer.token_bytes.name(IM_END)) == (None, "<|im_end|>")
    (think,) = tokenizer.encode("<think>")
    assert tokenizer.token_bytes.of(think) == b"<think>"


def test_an_id_beyond_the_tokenizers_vocabulary_writes_nothing(tokenizer: Tokenizer) -> None:
    """Models have more rows than tokens, for their size's sake."""
    assert (tokenizer.token_bytes.of(9999), tokenizer.token_bytes.name(9999)) == (None, "token_id:9999")


def test_sentencepiece_spells_spaces_and_bytes_its_own_way() -> None:
    built = sentence_piece()
    tokens = TokenBytes(built)
    ids = {piece: built.token_to_id(piece) or 0 for piece in ("<s>", "<0x0A>", "<0xF0>", "▁hi", "é")}
    assert {piece: tokens.of(token) for piece, token in ids.items()} == {
        "<s>": None,
        "<0x0A>": b"\n",
        "<0xF0>": b"\xf0",
        "▁hi": b" hi",
        "é": "é".encode(),
    }
    assert [tokens.name(ids[piece]) for piece in ("<0x0A>", "<0xF0>", "▁hi")] == ["\n", "\\xf0", " hi"]


def test_without_a_decoder_pieces_are_text(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hi": 0}, unk_token="hi"))
    assert TokenBytes(words).of(0) == b"hi"
