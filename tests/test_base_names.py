from __future__ import annotations

import pytest
from hypothesis import strategies as st

import hazards
from tunefleet.adapters_store.base_names import base_warning

BASE = "SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    "hint",
    [
        BASE,
        f"HuggingFaceTB/{BASE}",
        f"unsloth/{BASE}",
        f"unsloth/{BASE.lower()}",
        f"/models/{BASE}/",
        f"C:\\models\\{BASE}",
    ],
)
def test_a_base_of_the_same_name_is_no_warning(hint: str) -> None:
    assert base_warning(hint, BASE) is None


@pytest.mark.parametrize(
    "ending",
    ["-bnb-4bit", "-unsloth-bnb-4bit", "-4bit", "-AWQ", "-GPTQ-Int4", "-GGUF", "-FP8-Dynamic", "-mlx-4bit"],
)
def test_a_quantised_copy_is_told_apart_from_another_model(ending: str) -> None:
    warning = base_warning(f"unsloth/{BASE}{ending}", BASE) or ""
    assert "a quantised copy of SmolLM2-135M-Instruct" in warning


@pytest.mark.parametrize(
    ("hint", "says"),
    [
        (None, "is empty"),
        ("", "is empty"),
        ("/content/out/checkpoint-60", "a folder where it was trained"),
        ("./merged", "a folder where it was trained"),
        ("~/models/mine", "a folder where it was trained"),
        ("C:\\Users\\me\\model", "a folder where it was trained"),
        ("meta-llama/Llama-3.2-1B", "this base is SmolLM2-135M-Instruct"),
        ("HuggingFaceTB/SmolLM2-135M", "this base is SmolLM2-135M-Instruct"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct-v2", "this base is SmolLM2-135M-Instruct"),
        ("http://169.254.169.254/latest", "this base is SmolLM2-135M-Instruct"),
    ],
)
def test_any_other_name_is_a_warning_that_says_what_is_known(hint: str | None, says: str) -> None:
    assert says in (base_warning(hint, BASE) or "")


@hazards.examples(100)
def test_whatever_is_named_is_at_most_a_short_printable_warning(num_examples: int) -> None:
    def check(hint: str) -> None:
        warning = base_warning(hint, BASE) or ""
        assert warning.isprintable()
        assert warning.isascii()
        assert len(warning) < 1600

    hazards.generate("B", num_examples, check, st.text(max_size=300))
