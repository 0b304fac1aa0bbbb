"""What the training loop asks of its data: pictures of people, several a person, ready to be trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ..lookahead.step import Batch


class Source(Protocol):
    """Pictures to train on."""

    latent_shape: tuple[int, ...]  # of one target, [4, h, w]

    def __len__(self) -> int:
        """How many targets there are."""
        ...

    def digest(self) -> str:
        """Of all that decides which sample is which: a run goes on with the same data only."""
        ...

    def batch(self, targets: Sequence[int], numbers: Sequence[int], device: torch.device) -> Batch:
        """The targets of these places, each with another picture of its person as the reference.

        Which one is a function of the sample's number in the run (`draws.generator`), not of earlier calls.
        """
        ...

    def prepare(self, device: torch.device) -> None:
        """What is better done before the run begins, on the device that it will run on."""
        ...
