"""The rows that a page holds: all, or a seeded sample and the extremes of each number."""

import heapq
import random
from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]
SAMPLE = ("", 0)  # the key of the records with the lowest draws


class Selection:
    """Chooses at most `most` of the records that it is given, and keeps only a few times as many.

    If there are more, the lowest and the highest records of each number are chosen, up to half of
    `most` in all, and the rest are drawn from all records.
    """

    def __init__(self, most: int, seed: int) -> None:
        self.most, self.count = most, 0
        self._draws = random.Random(seed)
        # By number and end, or SAMPLE: the highest (value, -place, record) so far, as a heap.
        self._heaps: dict[tuple[str, int], list[tuple[float, int, Record]]] = {}

    def add(self, record: Record) -> None:
        """Consider a record; record["numbers"] holds its numbers by name."""
        self.count += 1
        self._offer(SAMPLE, -self._draws.random(), record, self.most)
        for name, value in record["numbers"].items():
            for sign in (1, -1):
                self._offer((name, sign), sign * value, record, self.most // 4 + 1)

    def _offer(self, key: tuple[str, int], value: float, record: Record, size: int) -> None:
        heap = self._heaps.setdefault(key, [])
        entry = (value, -self.count, record)  # the root is the first to go
        if len(heap) < size:
            heapq.heappush(heap, entry)
        elif entry > heap[0]:
            heapq.heapreplace(heap, entry)

    def chosen(self) -> tuple[list[Record], str]:
        """The chosen records in the order of the rows, and in words how they were chosen."""
        drawn = sorted(self._heaps.pop(SAMPLE, []), reverse=True)
        ends = self._heaps.values()
        each = self.most // (2 * len(ends)) if ends and self.count > self.most else 0
        chosen = {
            -place: record
            for heap in ends
            for _, place, record in sorted(heap, reverse=True)[:each]
        }
        extremes = len(chosen)
        for _, place, record in drawn:
            if len(chosen) < self.most:
                chosen[-place] = record
        words = "all of them"
        if self.count > self.most:
            words = (
                f"the {each:,} lowest and the {each:,} highest of each number ({extremes:,} rows), "
                f"and {len(chosen) - extremes:,} drawn from all rows"
            )
        return [chosen[place] for place in sorted(chosen)], words
