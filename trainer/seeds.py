"""Random numbers that are a function of the run's seed and the sample's number, whatever ran before.

So a run that was stopped goes on exactly as it would have, on any number of processes, with nothing to save.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch


def generator(*key: int) -> torch.Generator:
    """A CPU generator that belongs to these numbers."""
    # torch's CPU generator reads 32 bits of a seed only: all numbers must be mixed into them.
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def order(samples: int, seed: int, numbers: Sequence[int]) -> list[int]:
    """The example that each sample of the run is: each of `samples` once an epoch, in an order of that epoch's own."""
    return [int(_shuffled(samples, seed, n // samples)[n % samples]) for n in numbers]


@lru_cache(maxsize=4)
def _shuffled(samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(samples)
