"""Processes that know nothing of the tests', without the seconds that each would take to import the libraries.

multiprocessing's fork server is a new interpreter that imports them once and does nothing else; each process is a fork
of it. What must find nothing imported, or is about how an interpreter ends, starts one of its own instead.
"""

from __future__ import annotations

import gc
import importlib.util
import inspect
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

LIBRARIES = ("lcm_lookahead.trainer", "lcm_lookahead.cli.assemble", "pytest")  # the first cures what the others import


def start(
    function: Callable[..., Any], *arguments: Any, output: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Starts a process that calls a function of a test's file. It prints into `output`; its environment is this one's
    by default."""
    place = multiprocessing.get_context("forkserver")
    place.set_forkserver_preload([*LIBRARIES])
    where = inspect.getfile(function), function.__name__
    own = dict(os.environ if environment is None else environment)
    process = place.Process(target=_run, args=(*where, arguments, str(output), own), daemon=True)
    process.start()
    return process


def check(process: BaseProcess, output: Path, seconds: float = 300) -> None:
    """Waits for its end, and fails with what it has printed where that was no good one."""
    process.join(seconds)
    assert process.exitcode == 0, output.read_text(errors="replace")


def _run(file: str, name: str, arguments: tuple[Any, ...], output: str, environment: Mapping[str, str]) -> None:
    gc.freeze()  # else it would go through the libraries again and again
    with open(output, "wb") as into:
        for stream in (1, 2):
            os.dup2(into.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    # By its file: the tests are in no package.
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, name)(*arguments)
