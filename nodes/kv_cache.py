"""What is kept of reference passes, so that a second run with the same reference, noise and schedule makes none."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from torch import Tensor

# By self-attention, one pair (keys, values) [tokens, channels] a row; image i of a batch reads row i (modulo the rows).
Rows = dict[tuple[str, int, int], list[tuple[Tensor, Tensor]]]
KeysValues = dict[bool, Rows]  # by role: conditional or not


@dataclass
class KVCache:
    """Reference KV of earlier runs, in host memory; lives with the reference.

    runs: by what a run depends on, its entries by (sigma, role); the run that was used last is at the end.
    """

    runs: OrderedDict[tuple, dict[tuple[float, bool], Rows]] = field(default_factory=OrderedDict)

    def get(self, run: tuple, at: tuple[float, bool]) -> Rows | None:
        if run not in self.runs:
            return None
        self.runs.move_to_end(run)
        return self.runs[run].get(at)

    def put(self, run: tuple, at: tuple[float, bool], rows: Rows, bound: int) -> bool:
        """Keep an entry; False where there is no room. Whole earlier runs make way, oldest first, never this one:
        a cache that is smaller than a run would otherwise never hit."""
        need = _bytes(rows)
        own = sum(map(_bytes, self.runs.get(run, {}).values()))
        if own + need > bound:
            return False
        entries = self.runs.setdefault(run, {})
        self.runs.move_to_end(run)
        while self.size() + need > bound:
            self.runs.popitem(last=False)
        entries[at] = {key: [(k.cpu(), v.cpu()) for k, v in pairs] for key, pairs in rows.items()}
        return True

    def size(self) -> int:
        """Bytes of all entries."""
        return sum(_bytes(rows) for entries in self.runs.values() for rows in entries.values())


def _bytes(rows: Rows) -> int:
    return sum(t.nbytes for pairs in rows.values() for pair in pairs for t in pair)
