"""The cache keeps what reference passes gave: a second run of one reference, noise and schedule makes none.

Keys and values of a reference have three forms on their way to the picture:

1. The image prompt's are packed along the channels, [rows, tokens, 2 * sum(widths)]: `LoadedEncoder.keys_values` makes
   them once, `Subject` carries them, `cross_attention.PromptRows` takes a layer's slice for the rows of a UNet pass.
2. A reference pass gives the normed inputs of the self-attentions by block (`InputsByBlock`), which are half of their
   keys and values and a quarter in 8 bit: these are kept here. `reference_pass` projects them to those of KV injection
   (`KVByBlock`), a pair (keys, values) a row, each [tokens, channels], since masks leave rows of different lengths.
3. In a UNet pass `self_attention.KVRows` chooses the pair of each row of the picture, and the replacement stacks these
   to [rows, tokens, channels], or attends row by row where lengths differ.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor

# By self-attention, one pair (keys, values) [tokens, channels] a row; image i of a batch reads row i (modulo the rows).
# Where AdaIN asks for them the statistics of the queries [2, channels] come third.
KVByBlock = dict[tuple[str, int, int], list[tuple[Tensor, ...]]]
KVByRole = dict[bool, KVByBlock]  # by role: conditional or not
# By self-attention, a row each: its normed input [tokens, channels], or the parts of it in 8 bit, then the statistics.
InputsByBlock = dict[tuple[str, int, int], list[tuple[Tensor, ...]]]
InputsByRole = dict[bool, InputsByBlock]


@dataclass
class KVCache:
    """The cache holds what earlier runs read of a reference in main memory, and lives as long as its `Subject`.

    runs: by the signature of a run (all that its inputs depend on), its entries by (sigma, role); the run that
    was used last is at the end.
    """

    runs: OrderedDict[tuple, dict[tuple[float, bool], InputsByBlock]] = field(default_factory=OrderedDict)

    def get(self, run: tuple, at: tuple[float, bool]) -> InputsByBlock | None:
        if run not in self.runs:
            return None
        self.runs.move_to_end(run)
        return self.runs[run].get(at)

    def put(self, run: tuple, sigma: float, inputs: InputsByRole, bound: int, current: Collection[tuple] = ()) -> bool:
        """Keep what one evaluation gave, all of it or nothing (so that the next is the same to the bit); False where
        there is no room. Whole earlier runs make way, oldest first, never this one or another in `current`, which goes
        on beside it: a cache that is smaller than a run would otherwise never hit."""
        keep = {run, *current}
        need = sum(map(_bytes, inputs.values()))
        if need + self.size(keep) > bound:
            return False
        for earlier in [other for other in self.runs if other not in keep]:
            if need + self.size() <= bound:
                break
            del self.runs[earlier]
        entries = self.runs.setdefault(run, {})
        for role, rows in inputs.items():
            entries[sigma, role] = {
                key: [tuple(part.cpu() for part in row) for row in of_block] for key, of_block in rows.items()
            }
        self.runs.move_to_end(run)
        return True

    def size(self, runs: Collection[tuple] | None = None) -> int:
        """Bytes of all entries, or of those of some runs."""
        known = self.runs if runs is None else self.runs.keys() & runs
        return sum(_bytes(rows) for run in known for rows in self.runs[run].values())


def _bytes(rows: InputsByBlock) -> int:
    return sum(t.nbytes for pairs in rows.values() for pair in pairs for t in pair)
