"""What the training loop asks of a method of personalisation, and nothing more.

The loop (`train.py`), the checkpoints and the log know no method. A recipe says what is trained and at which rates,
which losses a step has, what is drawn at random for a sample, what is exported and how, what a validation does and
which figures are logged. `lookahead/` is one; tests/trainer/test_recipe.py has a small one, a linear regression.

To add a recipe: a folder beside `lookahead/` with a config (of `RunConfig`), a module of losses, and a class with what
`Recipe` lists; then a command in cli/ that makes it and calls `train`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class SampleBatch(Protocol):
    """B samples as a source gives them. What else is in it is between the source and the losses."""

    @property
    def names(self) -> Sequence[str]:
        """Names each sample for messages, B of them."""
        ...


class Source(Protocol):
    """Examples to train on."""

    def __len__(self) -> int:
        """How many targets there are: an epoch."""
        ...

    def digest(self) -> str:
        """A hash of all that decides which sample is which: a run goes on with the same data only."""
        ...

    def batch(self, targets: Sequence[int], numbers: Sequence[int], device: torch.device) -> Any:
        """The targets of these places, as a `SampleBatch`.

        What is drawn at random for a sample (its reference, say) is a function of its number in the run
        (`seeds.generator`), not of earlier calls.
        """
        ...

    def prepare(self, device: torch.device) -> None:
        """Do what is better done before the run begins, on the device that it will run on."""
        ...


@runtime_checkable
class ReadAhead(Protocol):
    """A source that reads samples apart from its models, so that workers can do it ahead of the step.

    loader: (targets, numbers), as in `batch` -> what `finish` makes the batch of; it can be sent to other processes.
    """

    @property
    def loader(self) -> Callable[[tuple[Sequence[int], Sequence[int]]], Any]: ...

    def finish(self, loaded: Any, device: torch.device) -> Any:
        """Makes what `batch` gives, of what the loader has read."""
        ...


@dataclass(frozen=True, eq=False)
class Outcome:
    """One loss of B samples. Only `loss` has a graph.

    loss: scalar, the mean over the batch. values [B]: of each sample; a sample whose value is not finite is named in
    skipped.jsonl. valid: bool [B], the samples whose values are in the loss. terms: further values [B] for the log.
    """

    loss: Tensor
    values: Tensor
    valid: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)


class Validator(Protocol):
    """A validator draws and measures every `validate_every` steps. It draws from no generator of the run."""

    @property
    def by(self) -> str:
        """Names what measures, for the log."""
        ...

    def __call__(self, trained: Any, rows: int, grid: Path) -> dict[str, float]:
        """The figures of `trained` (or of an average of it), at most `rows` samples at a time; its pictures go to the
        file `grid`, a PNG."""
        ...


class Recipe(Protocol):
    """A method that the loop trains.

    losses: the module that DDP wraps: `losses(part, batch, draws) -> Outcome`, with all frozen models in it.
    trained: the part of it that has gradients; it is what is saved, averaged and exported.
    parts: names of the losses of a step. Each runs forward and backward before the next, so that their graphs never
    stand in memory together; the optimiser steps once, on the sum.
    about: what is known of the models (`encoder_file.METADATA_FIELDS`); a run goes on with one base_model_hash only.
    monitor: the figure of a validation by which the best checkpoint is kept, the higher the better.
    """

    @property
    def losses(self) -> nn.Module: ...

    @property
    def trained(self) -> nn.Module: ...

    @property
    def parts(self) -> tuple[str, ...]: ...

    @property
    def about(self) -> Mapping[str, str]: ...

    @property
    def monitor(self) -> str: ...

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """The trained tensors by learning rate. Their order is part of a checkpoint."""
        ...

    def draw(self, numbers: Sequence[int], batch: Any) -> Any:
        """Draws what is random for a batch, on its device: a function of the samples' numbers in the run alone.

        What depends on the step does so through them: step = number // config.batch.
        """
        ...

    def figures(self, outcomes: Mapping[str, Outcome], mean: Callable[[Tensor], float]) -> dict[str, float]:
        """Computes a step's figures for the log. mean: a scalar's mean over all processes; all must call it alike."""
        ...

    def export(self, path: Path, trained: Any, steps: int) -> Path:
        """Write the file that users load, of `trained` (or of an average of it), after so many steps.

        Raises OSError, RuntimeError or EncoderFileError.
        """
        ...

    def validator(self, source: Any, device: torch.device) -> Validator | None:
        """Makes what validates on this data, None where it holds nothing for that. The main process alone asks."""
        ...

    def compile(self) -> None:
        """torch.compile what is worth it (`config.compile`)."""
        ...

    def savings(self, processes: int) -> Mapping[str, float]:
        """Estimates the GB that a change of the configuration ("accumulate=2") saves; asked when memory runs out."""
        ...
