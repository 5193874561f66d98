"""The cheapest way to part a graph, beside all ways there are."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from onnxforge.mincut import Cut

EDGES = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 9)), max_size=20
)


def cost(side: set[int], edges: list[tuple[int, int, int]]) -> int:
    return sum(c for tail, head, c in edges if tail in side and head not in side)


@given(EDGES)
def test_no_other_way_is_cheaper_and_none_as_cheap_is_smaller(
    edges: list[tuple[int, int, int]],
) -> None:
    cut = Cut(7)
    for edge in edges:
        cut.edge(*edge)
    found = cut.source_side()
    assert 0 in found
    assert 1 not in found
    ways = [{0, *more} for n in range(6) for more in itertools.combinations(range(2, 7), n)]
    lowest = min(cost(way, edges) for way in ways)
    assert cost(found, edges) == lowest
    assert all(found <= way for way in ways if cost(way, edges) == lowest)


def test_what_is_endless_is_never_cut() -> None:
    cut = Cut(3)
    middle = cut.vertex()
    cut.edge(0, 2, Cut.ENDLESS)
    cut.edge(2, middle, 5)
    cut.edge(middle, 1, 7)
    assert cut.source_side() == {0, 2}
