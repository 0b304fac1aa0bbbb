"""What a process takes from the source, step by step, read ahead by workers where the source allows it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from accelerate import Accelerator

from .ahead import Ahead
from .config import RunConfig
from .recipe import ReadAhead, Source
from .seeds import order

SampleNumbers = range


class Feed:
    """The batches of one process from a step on: a function of the step, whatever was read before and by whom."""

    def __init__(self, accelerator: Accelerator, config: RunConfig, source: Source, first: int):
        self.config, self.source, self.device = config, source, accelerator.device
        self.share = slice(accelerator.process_index, None, accelerator.num_processes)
        self.number, self._ahead = first, None
        if isinstance(source, ReadAhead):
            jobs = (self._job(numbers) for step in range(first, config.steps) for numbers in self._parts(step))
            self._ahead = Ahead(source.loader, jobs, config.workers, self.device.type == "cuda")
        self._spent, self._since = 0.0, time.perf_counter()

    def step(self) -> list[tuple[SampleNumbers, Any]]:
        """(numbers of the samples, batch) of each accumulated part of this process's share of the next step."""
        begun = time.perf_counter()
        out = []
        for numbers in self._parts(self.number):
            if self._ahead is None:
                batch = self.source.batch(*self._job(numbers), self.device)
            else:
                batch = self.source.finish(next(self._ahead), self.device)  # type: ignore[attr-defined]  # ReadAhead
            out.append((numbers, batch))
        self.number += 1
        self._spent += time.perf_counter() - begun
        return out

    def waiting(self) -> float:
        """The share of the time since the last call in which the step waited for its batches."""
        now = time.perf_counter()
        share = self._spent / max(now - self._since, 1e-9)
        self._spent, self._since = 0.0, now
        return share

    def close(self) -> None:
        """End the workers."""
        if self._ahead is not None:
            self._ahead.close()

    def _parts(self, step: int) -> Iterator[SampleNumbers]:
        mine = range(step * self.config.batch, (step + 1) * self.config.batch)[self.share]
        return (mine[part :: self.config.accumulate] for part in range(self.config.accumulate))

    def _job(self, numbers: SampleNumbers) -> tuple[Sequence[int], Sequence[int]]:
        return order(len(self.source), self.config.seed, numbers), list(numbers)
