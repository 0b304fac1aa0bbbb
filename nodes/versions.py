"""Graphs of other versions of this pack, and hosts that are too old for it."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

OLDEST_HOST = "0.16.3"  # as requires-comfyui of pyproject.toml

AnyNode = TypeVar("AnyNode", bound=type)


def leaves_out_unknown(node: AnyNode) -> AnyNode:
    """The node itself, whose functions from now on leave out inputs that they do not have, with a line in the log.

    A graph of another version of the pack may link such inputs; unknown values the host leaves out by itself.
    """
    for name in ("execute", "fingerprint_inputs"):
        if name in vars(node):
            setattr(node, name, classmethod(_tolerant(vars(node)[name].__func__)))
    return node


def _tolerant(function: Callable[..., Any]) -> Callable[..., Any]:
    parameters = inspect.signature(function).parameters.values()
    known = {parameter.name for parameter in parameters}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return function

    @functools.wraps(function)
    def call(cls, *args: Any, **inputs: Any) -> Any:
        unknown = inputs.keys() - known
        if unknown and function.__name__ == "execute":
            logging.warning(
                "[LCM-Lookahead] %s has no input %s: left out, since the graph is of another version of this pack.",
                cls.__name__,
                " and no ".join(sorted(unknown)),
            )
        return function(cls, *args, **{name: value for name, value in inputs.items() if name in known})

    return call


@contextmanager
def needs_a_newer_host() -> Iterator[None]:
    """Raises RuntimeError, one sentence, for what fails inside because the host is too old."""
    try:
        yield
    except (ImportError, AttributeError, TypeError) as error:
        version = host_version()
        if version is not None and _numbers(version) >= _numbers(OLDEST_HOST):
            raise
        raise RuntimeError(
            f"LCM-Lookahead needs ComfyUI {OLDEST_HOST} or newer, and this is {version or 'an older one'} ({error}): "
            "update ComfyUI; until then none of its nodes is there."
        ) from error


def host_version() -> str | None:
    """The host's version, None where it does not say."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return None
    return str(__version__)


def _numbers(version: str) -> list[int]:
    return [int(part) if part.isdecimal() else 0 for part in version.split(".")[:3]]
