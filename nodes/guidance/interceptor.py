"""What stands in the place of the model that a sampler function calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .preview import Call
from .sampler_steps import GuidedStep


class Interceptor:
    """Passes each call of a sampler function on to the model, and remembers the last one; guides at the first call of a
    guided step before that.

    steps: the guided steps by the number of the call with which they begin; guide: moves the sampler's state x in
    place. Everything else of the model is seen through it, and set on it.
    """

    def __init__(
        self,
        model: Any,
        steps: Mapping[int, GuidedStep] | None = None,
        guide: Callable[[Tensor, Call, GuidedStep], None] | None = None,
    ):
        self.__dict__.update(_model=model, _guide=guide, _steps=steps or {}, _calls=0, last=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            self.__dict__[name] = value
        else:
            setattr(self._model, name, value)

    def __call__(self, x: Tensor, sigma: Tensor, **options: Any) -> Tensor:
        self.last = Call(self._model, sigma, options, x)
        step = self._steps.get(self._calls)
        self._calls += 1
        if step is not None:
            self._guide(x, Call(self._model, sigma, options), step)
        return self._model(x, sigma, **options)
