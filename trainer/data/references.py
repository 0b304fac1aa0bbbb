"""Which pictures are copies of each other, and who may be whose reference: in nearly linear time and memory, since one
person may have thousands of pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# Two pictures of one person in one place differ by several grey levels, a copy by less than one on the average.
MEAN, MOST = 1.5, 12  # grey levels, over a look and at its worst place
_ROWS = 16  # looks that are compared with their neighbours at once


@dataclass(frozen=True, eq=False)
class References:
    """The pictures that may be the reference of one: those of its person (`members`, places in the order of the
    pictures, one list for all of a person's) without itself and its copies (`without`, places in `members`)."""

    members: list[int]
    without: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.members) - len(self.without)

    def __getitem__(self, number: int) -> int:
        """Place of the picture that is the reference of this number, from 0. Raises IndexError."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        for place in self.without:
            if place > number:
                break
            number += 1
        return self.members[number]

    def __iter__(self) -> Iterator[int]:
        left_out = set(self.without)
        return (member for place, member in enumerate(self.members) if place not in left_out)


def copies(looks: Sequence[str]) -> list[list[int]]:
    """For each look (`pairs.look_of`) the places of those that are copies of it, itself among them, in order.

    Copies: the same picture, saved anew, or made smaller. Looks are compared with those of nearly the same brightness
    alone, and first by the brightness of their 4x4 parts, neither of which can leave a copy out.
    """
    n = len(looks)
    if n == 0:
        return []
    pixels = np.frombuffer(bytes.fromhex("".join(looks)), np.uint8).reshape(n, 4, 4, 4, 4).astype(np.int32)
    parts, pixels = pixels.sum((2, 4)).reshape(n, 16), pixels.reshape(n, 256).astype(np.int16)
    near = int(MEAN * 256)
    order = np.argsort(parts.sum(1), kind="stable")
    brightness = parts.sum(1)[order]
    found = []
    for first in range(0, n, _ROWS):
        rows = order[first : first + _ROWS]
        end = np.searchsorted(brightness, brightness[first + len(rows) - 1] + near, "right")
        window = order[first:end]
        a, b = np.nonzero(np.abs(parts[rows][:, None] - parts[window]).sum(2) <= near)
        a, b = rows[a], window[b]
        apart = np.abs(pixels[a] - pixels[b])
        same = (apart.sum(1, dtype=np.int32) <= near) & (apart.max(1) <= MOST)
        found += [a[same] * n + b[same], b[same] * n + a[same]]
    pairs = np.unique(np.concatenate(found))
    bounds = np.searchsorted(pairs // n, np.arange(n + 1))
    others = (pairs % n).tolist()
    return [others[start:stop] for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
