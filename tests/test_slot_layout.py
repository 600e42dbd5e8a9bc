from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_kit import LAYOUT, LINEARS
from tunefleet.adapters_store.slot_layout import SlotLayout, rank_class_of
from tunefleet.core import LinearSpec


@pytest.mark.parametrize(
    ("rank", "rank_class"),
    [(1, 8), (7, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 128)],
)
def test_a_rank_is_padded_to_a_power_of_two_of_at_least_eight(rank: int, rank_class: int) -> None:
    assert rank_class == rank_class_of(rank)


def test_siblings_a_s_lie_before_their_b_s_and_parents_one_after_another() -> None:
    assert [tuple(matrix) for matrix in LAYOUT.matrices] == [
        ("0.attn.q", "A", 12),
        ("0.attn.k", "A", 12),
        ("0.attn.v", "A", 12),
        ("0.attn.o", "A", 12),
        ("0.attn.q", "B", 12),
        ("0.attn.k", "B", 4),
        ("0.attn.v", "B", 4),
        ("0.attn.o", "B", 12),
        ("0.mlp.up", "A", 12),
        ("0.mlp.down", "A", 20),
        ("0.mlp.up", "B", 20),
        ("0.mlp.down", "B", 12),
        ("1.attn.q", "A", 12),
        ("1.attn.q", "B", 12),
    ]
    assert (LAYOUT.place("0.attn.k").a_start, LAYOUT.place("0.attn.k").b_start - 8) == (12, 52)
    assert sum(spec.in_features + spec.out_features for spec in LINEARS.values()) == LAYOUT.features


def test_siblings_belong_together_wherever_the_manifest_names_them() -> None:
    scattered = SlotLayout({"0.q": LinearSpec(4, 4), "1.q": LinearSpec(4, 4), "0.k": LinearSpec(4, 2)})
    assert [matrix.path for matrix in scattered.matrices] == ["0.q", "0.k", "0.q", "0.k", "1.q", "1.q"]


@pytest.mark.parametrize(
    ("paths", "runs"),
    [
        (("0.attn.q",), [("0.attn.q",)]),
        (("0.attn.q", "0.attn.k", "0.attn.v"), [("0.attn.q", "0.attn.k", "0.attn.v")]),
        (("0.attn.v", "0.attn.q", "0.attn.k"), [("0.attn.q", "0.attn.k", "0.attn.v")]),
        (("0.attn.q", "0.attn.v"), [("0.attn.q",), ("0.attn.v",)]),
        (("0.attn.v", "0.mlp.up"), [("0.attn.v",), ("0.mlp.up",)]),
    ],
)
def test_layers_are_one_run_where_nothing_lies_between_their_a_s(
    paths: tuple[str, ...], runs: list[tuple[str, ...]]
) -> None:
    assert runs == list(LAYOUT.runs(paths))


def test_columns_are_in_the_order_of_the_paths() -> None:
    columns = LAYOUT.columns(("0.attn.v", "0.attn.q", "0.attn.k"))
    assert columns == {"0.attn.v": (0, 4), "0.attn.q": (4, 12), "0.attn.k": (16, 4)}


@given(st.permutations(list(LINEARS)))
def test_matrices_cover_the_slot_without_overlap(paths: list[str]) -> None:
    layout = SlotLayout({path: LINEARS[path] for path in paths})
    covered: list[int] = []
    for path, spec in LINEARS.items():
        place = layout.place(path)
        covered += range(place.a_start, place.a_start + spec.in_features)
        covered += range(place.b_start, place.b_start + spec.out_features)
    assert list(range(layout.features)) == sorted(covered)
