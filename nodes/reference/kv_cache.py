"""What is kept of reference passes, so that a second run with the same reference, noise and schedule makes none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor

# By self-attention, one pair (keys, values) [tokens, channels] a row; image i of a batch reads row i (modulo the rows).
KVByBlock = dict[tuple[str, int, int], list[tuple[Tensor, Tensor]]]
KVByRole = dict[bool, KVByBlock]  # by role: conditional or not


@dataclass
class KVCache:
    """Reference KV of earlier runs, in host memory; lives with the reference.

    runs: by what a run depends on, its entries by (sigma, role); the run that was used last is at the end.
    """

    runs: OrderedDict[tuple, dict[tuple[float, bool], KVByBlock]] = field(default_factory=OrderedDict)

    def get(self, run: tuple, at: tuple[float, bool]) -> KVByBlock | None:
        if run not in self.runs:
            return None
        self.runs.move_to_end(run)
        return self.runs[run].get(at)

    def put(self, run: tuple, sigma: float, kv: KVByRole, bound: int, current: Collection[tuple] = ()) -> bool:
        """Keep what one evaluation gave, all of it or nothing (so that the next is the same to the bit); False where
        there is no room. Whole earlier runs make way, oldest first, never this one or another in `current`, which goes
        on beside it: a cache that is smaller than a run would otherwise never hit."""
        keep = {run, *current}
        need = sum(map(_bytes, kv.values()))
        if need + self.size(keep) > bound:
            return False
        for earlier in [other for other in self.runs if other not in keep]:
            if need + self.size() <= bound:
                break
            del self.runs[earlier]
        entries = self.runs.setdefault(run, {})
        for role, rows in kv.items():
            entries[sigma, role] = {key: [(k.cpu(), v.cpu()) for k, v in pairs] for key, pairs in rows.items()}
        self.runs.move_to_end(run)
        return True

    def size(self, runs: Collection[tuple] | None = None) -> int:
        """Bytes of all entries, or of those of some runs."""
        known = self.runs if runs is None else self.runs.keys() & runs
        return sum(_bytes(rows) for run in known for rows in self.runs[run].values())


def _bytes(rows: KVByBlock) -> int:
    return sum(t.nbytes for pairs in rows.values() for pair in pairs for t in pair)
