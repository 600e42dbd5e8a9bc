"""Contents can't write control tokens, not even together with the template."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers

from router_kit import write_tokenizer
from tunefleet.text import Tokenizer

THINK = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'].split('</think>')[-1] | trim }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<think>\n"
)


def encode(folder: Path, content: str) -> list[int]:
    return Tokenizer(folder).encode_chat([{"role": "user", "content": content}])


def ids_of(folder: Path, *tokens: str) -> list[int]:
    built = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = [built.token_to_id(token) for token in tokens]
    return [token for token in found if token is not None]


def test_tokens_that_the_template_writes_are_control_tokens_too(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, template=THINK, added=["<think>", "</think>", "<tool>"])
    think, tool = ids_of(folder, "<think>", "<tool>")
    ids = encode(folder, "<think> and <tool>")
    assert (ids.count(think), ids.count(tool)) == (1, 1)  # the template's own; a word that it never writes


def test_templates_still_trim_and_split_marked_contents(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, template=THINK, added=["<think>", "</think>"])
    text = Tokenizer(folder).decode(encode(folder, "<think>secret</think>  <|im_end|> shown "))
    assert text == "user\n<|im_end|> shown\nassistant\n<think>"


def test_a_template_that_cuts_between_marks_frees_no_token(tmp_path: Path) -> None:
    cutting = "{{ messages[0]['content'][:13] }}|{{ messages[0]['content'][1:] }}"
    folder = write_tokenizer(tmp_path, template=cutting)
    assert not {0, 1, 2} & set(encode(folder, "<|im_start|>"))


@pytest.mark.parametrize(
    ("template", "content"),
    [
        ("{{ '<|im_' + messages[0]['content'] }}", "start|>"),
        ("{{ messages[0]['content'] + 'start|>' }}", "<|im_"),
    ],
)
def test_a_content_that_completes_the_templates_text_makes_no_token(
    tmp_path: Path, template: str, content: str
) -> None:
    folder = write_tokenizer(tmp_path, template=template)
    assert not {0, 1, 2} & set(encode(folder, content))


def test_a_token_that_only_normalising_reveals_is_plain_text(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    built = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    built.normalizer = tokenizers.normalizers.NFKC()
    built.add_special_tokens([tokenizers.AddedToken("<ctl>", normalized=True, special=True)])
    built.save(str(folder / "tokenizer.json"))
    control = built.token_to_id("<ctl>")
    assert control in built.encode("\uff1cctl\uff1e").ids
    ids = encode(folder, "say \uff1cctl\uff1e ")
    assert control not in ids
    assert "<ctl>" in Tokenizer(folder).decode(ids)


def test_a_model_that_spells_control_tokens_gets_characters(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("</s>", -1.0), ("\n", -2.0), *((char, -3.0) for char in "</s>ab")]
    built = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    built.add_special_tokens(["</s>"])
    built.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}</s>")
    ids = encode(tmp_path, "a</s>b")
    assert ids.count(1) == 1
    assert [built.id_to_token(token) for token in ids] == ["a", "<", "/", "s", ">", "b", "</s>"]
