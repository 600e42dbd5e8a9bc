"""Where an adapter's matrices lie in a slot: one flat run of numbers, in a prepared file and on a device.

A slot of rank class R is ``R * features`` numbers, where ``features`` counts the inputs and outputs of all
linear layers. Layers are taken by parent module, in the manifest's order: first the A of each sibling
(``[R, in]``), then the B of each (``[R, out]``, scaled). So siblings that read the same input (q, k and v;
gate and up) have one A ``[3R, in]``. Rows above an adapter's own rank are zero, as is a layer that it doesn't
target.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from tunefleet.core import LinearSpec

SMALLEST_RANK_CLASS = 8
LAYOUT_VERSION = "1"


def rank_class_of(rank: int) -> int:
    """The smallest power of two >= ``rank`` (at least 8): the padded rank of its slot."""
    return max(SMALLEST_RANK_CLASS, 1 << (rank - 1).bit_length())


class Place(NamedTuple):
    """Where a layer's matrices begin, in numbers per unit of rank: times R in a slot of class R."""

    a_start: int
    b_start: int


class Span(NamedTuple):
    """Columns of a matrix."""

    start: int
    size: int


class Matrix(NamedTuple):
    """One matrix of a slot: ``[R, features]``."""

    path: str
    kind: Literal["A", "B"]
    features: int


class SlotLayout:
    """The layout of one base's slots.

    Args:
        linears: by module path, in the manifest's order.
    """

    def __init__(self, linears: Mapping[str, LinearSpec]) -> None:
        self.linears = linears
        self.matrices = tuple(_matrices(linears))  # in the order in which they lie in a slot
        starts: dict[tuple[str, str], int] = {}
        self.features = 0
        for matrix in self.matrices:
            starts[matrix.path, matrix.kind] = self.features
            self.features += matrix.features
        self._places = {path: Place(starts[path, "A"], starts[path, "B"]) for path in linears}
        self._runs: dict[tuple[str, ...], tuple[tuple[str, ...], ...]] = {}
        self._columns: dict[tuple[str, ...], dict[str, Span]] = {}

    def place(self, path: str) -> Place:
        return self._places[path]

    def runs(self, paths: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
        """The same layers in the order of the layout, cut where their A's are not one block."""
        if paths not in self._runs:
            self._runs[paths] = tuple(self._cut(paths))
        return self._runs[paths]

    def columns(self, paths: tuple[str, ...]) -> dict[str, Span]:
        """Where each layer's outputs are when those of ``paths`` stand one after another."""
        if paths not in self._columns:
            sizes = [self.linears[path].out_features for path in paths]
            starts = itertools.accumulate(sizes, initial=0)
            self._columns[paths] = {
                path: Span(start, size) for path, start, size in zip(paths, starts, sizes, strict=False)
            }
        return self._columns[paths]

    def _cut(self, paths: tuple[str, ...]) -> list[tuple[str, ...]]:
        runs: list[tuple[str, ...]] = []
        end = -1
        for path in sorted(paths, key=lambda path: self._places[path].a_start):
            start = self._places[path].a_start
            if start == end:
                runs[-1] += (path,)
            else:
                runs.append((path,))
            end = start + self.linears[path].in_features
        return runs


def _matrices(linears: Mapping[str, LinearSpec]) -> Iterator[Matrix]:
    siblings: dict[str, list[str]] = {}
    for path in linears:
        siblings.setdefault(path.rpartition(".")[0], []).append(path)
    for paths in siblings.values():
        yield from (Matrix(path, "A", linears[path].in_features) for path in paths)
        yield from (Matrix(path, "B", linears[path].out_features) for path in paths)
