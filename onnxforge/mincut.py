"""The cheapest way to part a graph in two."""

from __future__ import annotations

from collections import deque

__all__ = ["Cut"]


class Cut:
    """A graph whose edges have costs; an edge is paid if it leads out of the source's side.

    Vertices are numbers. Of several cheapest cuts, the one with the smallest source's side is
    taken.
    """

    ENDLESS = 1 << 60
    """A cost that is never paid."""

    def __init__(self, count: int) -> None:
        """Start with ``count`` vertices and no edges; vertex 0 is the source, 1 the sink."""
        self._edges: list[list[int]] = [[] for _ in range(count)]
        self._heads: list[int] = []
        self._left: list[int] = []

    def vertex(self) -> int:
        """Add a vertex."""
        self._edges.append([])
        return len(self._edges) - 1

    def edge(self, tail: int, head: int, cost: int) -> None:
        """Add an edge."""
        for start, end, left in ((tail, head, cost), (head, tail, 0)):
            self._edges[start].append(len(self._heads))
            self._heads.append(end)
            self._left.append(left)

    def source_side(self) -> set[int]:
        """The vertices on the source's side; the costs are used up by that."""
        while levels := self._levels():
            places = [0] * len(self._edges)
            while path := self._path(levels, places):
                flow = min(self._left[edge] for edge in path)
                for edge in path:
                    self._left[edge] -= flow
                    self._left[edge ^ 1] += flow
        return set(self._reached())

    def _reached(self) -> dict[int, int]:
        """Vertices that can be reached from the source, and in how many steps."""
        levels = {0: 0}
        waiting = deque([0])
        while waiting:
            vertex = waiting.popleft()
            for edge in self._edges[vertex]:
                head = self._heads[edge]
                if self._left[edge] and head not in levels:
                    levels[head] = levels[vertex] + 1
                    waiting.append(head)
        return levels

    def _levels(self) -> dict[int, int]:
        levels = self._reached()
        return levels if 1 in levels else {}

    def _path(self, levels: dict[int, int], places: list[int]) -> list[int]:
        """Edges of a shortest way to the sink with something left, or none."""
        path: list[int] = []
        vertex = 0
        while vertex != 1:
            edges = self._edges[vertex]
            while places[vertex] < len(edges):
                edge = edges[places[vertex]]
                head = self._heads[edge]
                if self._left[edge] and levels.get(head) == levels[vertex] + 1:
                    path.append(edge)
                    vertex = head
                    break
                places[vertex] += 1
            else:
                if not path:
                    return []
                vertex = self._heads[path.pop() ^ 1]
                places[vertex] += 1
        return path
