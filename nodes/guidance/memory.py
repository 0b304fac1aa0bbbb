"""What a guided run does when memory runs out: it evaluates the loss with less of it, step by step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import comfy.model_management
import torch
from torch import Tensor

from .autograd import Checkpointing

AUTO, ALWAYS, NEVER = "auto", "always", "never"
T = TypeVar("T")


class MemoryLadder:
    """Each time that memory runs out, the run takes one step down and stays there: every block is computed twice,
    pictures are decoded one by one, previews are decoded at half their size. Lives as long as the run.

    mode: of gradient checkpointing (AUTO, ALWAYS, NEVER); notes: gets a sentence for each step down.
    """

    def __init__(self, mode: str, notes: list[str]):
        self.checkpointing = Checkpointing(enabled=mode != NEVER)
        self.chunk_size: int | None = None  # how many pictures are decoded at once; None for all
        self.half_size = False  # of previews
        self._mode, self._notes = mode, notes

    def attempt(self, evaluate: Callable[[], T], z: Tensor, gradient: bool) -> T:
        """Returns the answer of `evaluate`, which is called again with less memory as long as that runs out.

        z: the latents [n, ...] that it evaluates; gradient: whether with their gradient. Raises ValueError, one
        sentence, where the last step down is not enough.
        """
        measured = bool(self.checkpointing.saved)
        while True:
            try:
                out = evaluate()
                if gradient and not measured and self.checkpointing.saved and self._mode == AUTO:
                    self._fit_memory(z.device)
                return out
            except Exception as error:
                if not _out_of_memory(error):
                    raise
                self._step_down(len(z))
            # Outside of the handler: until it ends, the error keeps everything alive that did not fit.
            comfy.model_management.soft_empty_cache()

    def _fit_memory(self, device: torch.device) -> None:
        """The first iteration has measured every block: keep as many as fit into the memory that is free."""
        c = self.checkpointing
        free = comfy.model_management.get_free_memory(device)
        c.keep_what_fits(0.8 * free)
        logging.info(
            "[LCM-Lookahead] the gradient keeps %.2f GB where no block is computed twice, and %.2f GB are free: %d "
            "of %d blocks are computed twice.",
            *(c.total / 2**30, free / 2**30, len(c.saved) - len(c.kept), len(c.saved)),
        )

    def _step_down(self, images: int) -> None:
        if self.checkpointing.kept or not self.checkpointing.enabled:
            self.checkpointing.kept.clear()
            self.checkpointing.enabled = True
            what = "every block is computed twice"
        elif self.chunk_size is None and images > 1:
            self.chunk_size = 1
            what = "pictures are decoded one by one"
        elif not self.half_size:
            self.half_size = True
            what = "previews are decoded at half their size"
        else:
            raise ValueError(
                "The memory is too small for the gradient, even with previews of half the size: use a smaller picture "
                "or batch, TAESD as the shortcut's vae, or close other programs."
            )
        logging.warning("[LCM-Lookahead] out of memory: from now on, %s.", what)
        self._notes.append(f"Out of memory: from then on, {what}.")


def _out_of_memory(error: Exception) -> bool:
    is_oom = getattr(comfy.model_management, "is_oom", None)
    oom = getattr(comfy.model_management, "OOM_EXCEPTION", torch.OutOfMemoryError)
    return bool(is_oom(error)) if is_oom else isinstance(error, oom)
