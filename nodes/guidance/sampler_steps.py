"""At which model calls the steps of a sampler begin, and whether it goes on from what is written into its latent.

A sampler function of the host calls the model once or several times a step, on its own state or on a copy, and tells of
it through a callback after the first call. That is found by rehearsal, on four numbers and with a stand-in for the
model: so samplers of other packs are understood too, or refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...lookahead.method.schedule import chosen_steps


class GuidedStep(NamedTuple):
    """A guided step: its number, that of the model call with which it begins, its noise level and the next one; whether
    it is the first and the last of those that are guided."""

    number: int
    call: int
    sigma: float
    sigma_next: float
    first: bool = True
    last: bool = True


class _Rehearsal(NamedTuple):
    sigmas: list[float]  # of all calls
    begins: list[int]  # call with which each step begins
    result: Tensor


def guided_steps(
    function: Callable, options: dict[str, Any], model: Any, sigmas: Tensor, start_sigma: float, count: int
) -> list[GuidedStep]:
    """The steps of a run of the sampler function that are guided: see `chosen_steps`.

    Raises ValueError, one sentence, for a sampler that has no fixed steps or keeps its state elsewhere.
    """
    name = getattr(function, "__name__", type(function).__name__).removeprefix("sample_").removesuffix("_function")
    refused = f"The sampler {name} {{}}, so its steps cannot be guided: use another one, such as euler or dpmpp_2m."
    end_sigma, sigmas = float(sigmas[-1]), _rehearsed(sigmas)

    def rehearse(answer: float, offset_at: int = -1) -> _Rehearsal:
        return _rehearse(function, options, model, sigmas, answer, offset_at)

    with torch.random.fork_rng(devices=[]):
        try:
            rehearsals = {answer: rehearse(answer) for answer in (0.0, 1.0)}
        except Exception as error:
            raise ValueError(refused.format(f"cannot be rehearsed ({error})")) from error
        plan = rehearsals[0.0]
        if plan.sigmas != rehearsals[1.0].sigmas or plan.begins != rehearsals[1.0].begins or not plan.begins:
            raise ValueError(refused.format("has no fixed steps"))
        levels = [plan.sigmas[call] for call in plan.begins]
        chosen = chosen_steps(levels, start_sigma, count, end_sigma)
        for call in {plan.begins[n] for n in (1, *chosen[:1]) if n < len(levels) and chosen}:
            # An offset of 1 must either stay in the state, whatever the model answers, or act through the answer alone.
            stays, through = (rehearse(a, call).result - rehearsals[a].result for a in (0.0, 1.0))
            if not (stays.abs().min() > 1e-11 or (through - 1).abs().max() < 1e-6):
                raise ValueError(refused.format("does not go on from the latent that it shows the model"))
    following = [*levels[1:], 0.0]
    ends = [(n == chosen[0], n == chosen[-1]) for n in chosen]
    return [GuidedStep(n, plan.begins[n], levels[n], following[n], *end) for n, end in zip(chosen, ends, strict=True)]


def steps_shown(function: Callable, options: dict[str, Any], model: Any, sigmas: Tensor) -> int:
    """Counts the steps that a run of the sampler function tells of: by rehearsal, else by its noise levels."""
    with torch.random.fork_rng(devices=[]):
        try:
            return len(_rehearse(function, options, model, _rehearsed(sigmas), 0.0, -1).begins) or len(sigmas) - 1
        except Exception:
            return len(sigmas) - 1


def _rehearsed(sigmas: Tensor) -> Tensor:
    """The noise levels of a rehearsal: a last step to no noise would forget everything."""
    sigmas = sigmas.detach().float().cpu().clone()
    if len(sigmas) > 1 and sigmas[-1] == 0:
        sigmas[-1] = sigmas[-2] / 2
    return sigmas


def _rehearse(function, options, model, sigmas: Tensor, answer: float, offset_at: int) -> _Rehearsal:
    stand_in = _StandIn(model, answer, offset_at)
    begins: list[int] = []
    x = torch.ones(1, 4, 1, 1, dtype=torch.float64) * sigmas[0]
    extra = {"model_options": {}, "seed": 0, "denoise_mask": None}
    torch.default_generator.manual_seed(0)  # the CPU's alone, which is put back: that of a GPU stays as it is

    def callback(_):
        begins.append(len(stand_in.called) - 1)

    result = function(stand_in, x, sigmas, extra_args=extra, callback=callback, disable=True, **options)
    return _Rehearsal(stand_in.called, begins, result)


class _StandIn:
    """Answers `answer` times its input; adds 1 to the input of one call, in place, but answers to it as it is then."""

    def __init__(self, model: Any, answer: float, offset_at: int):
        self._model, self._answer, self._offset_at = model, answer, offset_at
        self.called: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict[str, Any] | None = None, **_: Any) -> Tensor:
        if len(self.called) == self._offset_at:
            x += 1
        self.called.append(float(sigma.flatten()[0]))
        out = x * self._answer
        for function in (model_options or {}).get("sampler_post_cfg_function", ()):  # CFG++ samplers read from there
            names = "denoised", "cond_denoised", "uncond_denoised"
            function({**dict.fromkeys(names, out), "input": x, "sigma": sigma, "model": self._model, "cond_scale": 1.0})
        return out
