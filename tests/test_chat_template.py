"""Templates render as transformers renders them."""

from __future__ import annotations

import pytest

from tunefleet.chat_template import ChatTemplate
from tunefleet.errors import BaseModelError, RequestInvalid

MESSAGES = [{"role": "user", "content": "hé <b>"}, {"role": "assistant", "content": "hi"}]


def render(source: str, **tokens: str) -> str:
    return ChatTemplate(source, tokens).render(MESSAGES)


def test_special_tokens_and_the_generation_prompt_are_there() -> None:
    assert render("{{ bos_token }}{% if add_generation_prompt %}A{% endif %}", bos_token="<s>") == "<s>A"


def test_tojson_escapes_nothing() -> None:
    assert render("{{ messages[0]['content'] | tojson }}") == '"hé <b>"'


def test_blocks_are_trimmed_and_loops_may_break() -> None:
    source = "{% for message in messages %}\n  {{- message.role }}\n  {% break %}\n{% endfor %}"
    assert render(source) == "user\n"


def test_generation_blocks_are_their_text() -> None:
    assert render("{% generation %}text{% endgeneration %}") == "text"


def test_namespaces_keep_state_but_no_internals() -> None:
    assert render("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}") == "2"
    with pytest.raises(RequestInvalid):
        render("{% set ns = namespace() %}{% set ns._x = 1 %}")


def test_the_date_can_be_asked_for() -> None:
    assert render("{{ strftime_now('%Y') }}").isdigit()


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(RequestInvalid):
        render(f"{source}{{{{ undefined.x }}}}")


def test_a_template_that_does_not_compile_is_the_bases_fault() -> None:
    with pytest.raises(BaseModelError, match="can't be compiled"):
        render("{% if %}")
