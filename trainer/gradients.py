"""Gradients of several losses, one after another in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .recipe import Outcome


def gradients(
    losses: nn.Module,
    parts: Sequence[str],
    samples: Sequence[tuple[Any, Any]],
    trained: Sequence[nn.Parameter],
    *,
    backward: Callable[[Tensor], None] = Tensor.backward,
    unsynchronised: Callable[[], AbstractContextManager[None]] = nullcontext,
    measure: bool = False,
) -> tuple[dict[str, Outcome], dict[str, Tensor]]:
    """Add the gradients of some samples to `trained`: first of one loss, forward and backward, then of the next.

    losses: `Recipe.losses`, or what wraps it; parts: the names of its losses, in this order. samples: (batch, draws) of
    equal size, one after another in memory (gradient accumulation): the result is that of one large batch.
    unsynchronised: a context in which processes do not exchange gradients. measure: also give the norm of each loss's
    own gradient, at the price of a copy of it (and of an exchange a loss). Returns the outcome of each loss, over all
    samples and without its graph, and the norms.
    """
    outcomes: dict[str, Outcome] = {}
    norms: dict[str, Tensor] = {}
    before = _copies(trained) if measure else []
    for part in parts:
        exchange, done = measure or part == parts[-1], []
        for number, (batch, draws) in enumerate(samples, 1):
            with nullcontext() if exchange and number == len(samples) else unsynchronised():
                outcome = losses(part, batch, draws)
                backward(outcome.loss / len(samples))
            done.append(replace(outcome, loss=outcome.loss.detach()))
            del outcome
        outcomes[part] = _joined(done)
        if measure:
            now = _copies(trained)
            change = [a if b is None else a - b for a, b in zip(now, before, strict=True) if a is not None]
            norms[part], before = torch.nn.utils.get_total_norm(change), now
    return outcomes, norms


def _joined(done: Sequence[Outcome]) -> Outcome:
    """The outcome of all samples: the mean of the losses, and the samples' values in a row."""

    def cat(values: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(values))

    terms: Mapping[str, Tensor] = {name: cat([o.terms[name] for o in done]) for name in done[0].terms}
    loss = torch.stack([o.loss for o in done]).mean()
    return Outcome(loss, cat([o.values for o in done]), cat([o.valid for o in done]), terms)


def _copies(trained: Sequence[nn.Parameter]) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.detach().clone() for p in trained]
