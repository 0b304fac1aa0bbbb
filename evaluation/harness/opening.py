"""The back ends by name. A new one is a module with `open_backend` and its name here."""

from __future__ import annotations

from contextlib import AbstractContextManager

from .backends import Backend, Setting
from .scenes import DIFFUSERS, HOST

NAMES = (HOST, DIFFUSERS)


def opened(name: str, setting: Setting) -> AbstractContextManager[Backend]:
    """Opens a back end by its name. Their modules are imported here, since that of diffusers takes seconds."""
    from . import host, pipeline

    return {HOST: host.open_backend, DIFFUSERS: pipeline.open_backend}[name](setting)
