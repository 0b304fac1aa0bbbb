"""What the pipeline makes of a reference once, and what it keeps of a run with it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..lookahead.method.guidance import Scales
from .encoder import KeysValues


@dataclass(frozen=True, eq=False)
class Text:
    """An encoded prompt: context [rows, tokens, channels] and pooled [rows, channels]."""

    context: Tensor
    pooled: Tensor

    @property
    def zeros(self) -> Text:
        """The null text of SDXL: zeros, not the encoding of an empty prompt."""
        return Text(torch.zeros_like(self.context), torch.zeros_like(self.pooled))


@dataclass(frozen=True, eq=False)
class EncodedReference:
    """A picture of a person and all that is derived from it.

    image_prompt, null_image_prompt: behind the projections of every cross-attention, [1, tokens, C]; latents:
    [1, 4, h, w], scaled as the UNet reads them; text: the KV encoder's own prompt, one row.
    """

    image_prompt: KeysValues
    null_image_prompt: KeysValues
    latents: Tensor
    text: Text


@dataclass(frozen=True, eq=False)
class KeptKV:
    """Reference KV of a whole run, in host memory, to be replayed under other prompts.

    steps: (time step, KV under the KV prompt or None, KV under null text or None), one a step. It depends on the
    reference, the initial noise, the steps and the weights, never on the prompt. (SDXL, 16 bit, 1024 pixels: 0.84 GB a
    step and picture.)
    """

    reference: EncodedReference
    steps: list[tuple[float, KeysValues | None, KeysValues | None]] = field(default_factory=list)

    def keep(self, t: Tensor, kv: KeysValues | None, null_kv: KeysValues | None) -> None:
        """Add a step."""
        self.steps.append((float(t), _moved(kv, "cpu"), _moved(null_kv, "cpu")))

    def at(self, step: int, device: torch.device) -> tuple[KeysValues | None, KeysValues | None]:
        """KV under the KV prompt and under null text of a step, on a device."""
        _, kv, null_kv = self.steps[step]
        return _moved(kv, device), _moved(null_kv, device)

    def check(self, timesteps: Tensor, scales: Scales) -> None:
        """Raise ValueError, one sentence, where it is not of these steps, or lacks what a scale needs."""
        asked, kept = [float(t) for t in timesteps], [t for t, _, _ in self.steps]
        if asked != kept:
            raise ValueError(
                f"The reference KV to replay is of {len(kept)} steps, which are not the {len(asked)} of this run: use "
                "the same scheduler and number of steps, or leave replay out."
            )
        _, kv, null_kv = self.steps[0]
        for name, lacks in {"full": kv is None and scales.full, "kv": null_kv is None and scales.kv}.items():
            if lacks:
                raise ValueError(
                    f"The reference KV to replay is of a run whose scale {name} was 0, and here it is not: keep it "
                    "from a run with that scale, or set it to 0."
                )


def _moved(kv: KeysValues | None, device: torch.device | str) -> KeysValues | None:
    return None if kv is None else {path: (k.to(device), v.to(device)) for path, (k, v) in kv.items()}
