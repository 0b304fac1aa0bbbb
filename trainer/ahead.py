"""Reading ahead: worker processes prepare what the next steps need while this one computes.

torch's DataLoader carries it, one job a batch. What a job gives is a function of the job, so nothing depends on the
number of workers or on who was faster; and nothing has to be saved, since a run that goes on begins with a later job.
"""

from __future__ import annotations

import atexit
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

AnyJob = TypeVar("AnyJob")
Made = TypeVar("Made")
PREFETCH = 3  # jobs that a worker has under way


class Ahead(Generic[AnyJob, Made]):
    """Iterates over what `make` makes of each job, in their order. waited: seconds that whoever iterates has waited.

    make, jobs and what is made travel between processes; a job may be asked for several places early, so an iterator of
    jobs is read ahead too. workers: processes, 0 for none; pinned: tensors lie where a GPU copies from quickly.
    """

    def __init__(self, make: Callable[[AnyJob], Made], jobs: Iterable[AnyJob], workers: int, pinned: bool = False):
        self.waited = 0.0
        self._end: Callable[[], None] | None = None
        if workers:
            loader: DataLoader[Any] = DataLoader(
                _Jobs(make),
                batch_size=None,
                sampler=_Order(jobs),
                num_workers=workers,
                prefetch_factor=PREFETCH,
                worker_init_fn=_begin,
                pin_memory=pinned,
            )
            made: Any = iter(loader)
            self._made: Iterator[Any] = made
            self._end = made._shutdown_workers
            # Python itself would end them by a signal that they ignore, and wait for ever.
            atexit.register(made._shutdown_workers)
        else:
            self._made = map(_Jobs(make).__getitem__, jobs)

    def __iter__(self) -> Iterator[Made]:
        return self

    def __next__(self) -> Made:
        """Raises what `make` raised for this job."""
        begun = time.perf_counter()
        made = next(self._made)
        self.waited += time.perf_counter() - begun
        if isinstance(made, _Failed):
            raise made.error
        return made

    def close(self) -> None:
        """End the workers."""
        if self._end is not None:
            self._end()
            atexit.unregister(self._end)
        self._made, self._end = iter(()), None


class _Order:
    """The jobs as a sampler: anything that can be iterated over."""

    def __init__(self, jobs: Iterable[Any]):
        self.jobs = jobs

    def __iter__(self) -> Iterator[Any]:
        return iter(self.jobs)


class _Failed:
    """An error on its way out of a worker: torch would make a page of it."""

    def __init__(self, error: Exception):
        self.error = error


class _Jobs(Dataset[Any]):
    def __init__(self, make: Callable[[Any], Any]):
        self.make = make

    def __getitem__(self, job: Any) -> Any:
        try:
            return self.make(job)
        except Exception as error:
            return _Failed(error)


def _begin(_: int) -> None:
    """Who stops a run tells the whole group of processes; only the loop knows when it needs no more."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    torch.set_num_threads(1)
